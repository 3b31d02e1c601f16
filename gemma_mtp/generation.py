"""What a generation gives: pieces while it runs, and all of it in the end."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gemma_mtp.decoding.drafting import draft_sources
from gemma_mtp.decoding.progress import FinishReason, Origin, Progress, TokenLogprobs
from gemma_mtp.decoding.progress import Piece as DecodedPiece
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.verification import draft_and_verify
from gemma_mtp.engine.interface import AnyEngine
from gemma_mtp.text.chat_parser import ChatEvent, ToolCall
from gemma_mtp.text.chat_text import ChatText

Channel = Literal["content", "reasoning", "tool_call"]


class Piece(NamedTuple):
    """A part of the output: neighbouring tokens of one origin and one channel, and the text they released.

    Outside a chat everything is content. Tokens of markup, and those of a tool call but the last, count to the channel
    they follow. The piece that completes a tool call holds it, and no text.
    """

    text: str
    tokens: list[int]
    origin: Origin
    logprobs: list[TokenLogprobs] | None = None
    channel: Channel = "content"
    tool_call: ToolCall | None = None


@dataclass
class Generation:
    """A finished generation. `tokens` ends with the stop token, if one ended it; `text` leaves it out.

    In a chat `text` is the answer alone, `reasoning` what the model thought, `tool_calls` what it asks to be called.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while it runs
    stats: Stats = field(default_factory=Stats)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt's tokens but the first
    stop_string: str | None = None  # the one that ended the text
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Appends what a piece says; the tokens are not its to add."""
        if piece.channel == "reasoning":
            self.reasoning += piece.text
        else:
            self.text += piece.text
        if piece.tool_call:
            self.tool_calls.append(piece.tool_call)
        if self.logprobs is not None and piece.logprobs:
            self.logprobs += piece.logprobs

    def message(self) -> dict[str, Any]:
        """The assistant's message, in OpenAI's form, for the conversation to go on with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for number, call in enumerate(self.tool_calls)
            ]
        return message


class Stream:
    """Iterate it for the pieces of a generation; `generation` holds what has come so far, and the end of it."""

    def __init__(
        self, progress: Progress, engine: AnyEngine, prediction: Sequence[int] = (), chat: ChatText | None = None
    ):
        self.generation = Generation(
            stats=progress.stats,
            tokens=progress.tokens,
            logprobs=[] if progress.params.logprobs else None,
            prompt_logprobs=progress.prompt_logprobs if progress.params.prompt_logprobs else None,
        )
        self._pieces = self._run(progress, engine, prediction, chat)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation here and frees its cache."""
        self._pieces.close()
        self.generation.finish_reason = self.generation.finish_reason or "cancelled"  # of one that never began

    def _run(
        self, progress: Progress, engine: AnyEngine, prediction: Sequence[int], chat: ChatText | None
    ) -> Generator[Piece, None, None]:
        sequence = engine.create()
        progress.draft_from(draft_sources(engine, sequence, progress.params, prediction))
        generation, decoded = self.generation, draft_and_verify(engine, sequence, progress)
        pieces = in_channels(decoded, chat) if chat else (Piece(*piece) for piece in decoded)
        try:
            for piece in pieces:
                generation.add(piece)
                yield piece
        finally:
            decoded.close()  # while there still is the sequence, which it leaves in order
            generation.finish_reason = progress.finish_reason or "cancelled"
            generation.stop_string = progress.stop_string
            engine.release(sequence)


@dataclass
class _Part:
    """Neighbouring tokens of a decoded piece that are of one channel."""

    channel: Channel
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of its tokens in the decoded piece

    def add(self, event: ChatEvent) -> None:
        self.text += event.text
        if event.tool_call:
            self.calls.append(event.tool_call)


class Channels:
    """Splits the pieces of a decoding by channel. `chat` is what that decoding reads its text with."""

    def __init__(self, chat: ChatText):
        self._chat = chat
        self._channel: Channel = "content"

    def split(self, piece: DecodedPiece) -> Iterator[Piece]:
        parts: list[_Part] = []
        for place, events in enumerate(self._chat.take(len(piece.tokens))):
            for event in events:
                self._channel = event.kind
                self._part(parts).add(event)
            self._part(parts).places.append(place)
            if self._channel == "tool_call":  # this token completed it
                self._channel = "content"
        contents = [part for part in parts if part.channel == "content"]
        if piece.text and not contents:
            contents.append(_Part("content"))
            parts += contents
        # Where there are stop strings, the text that is out is not what the events say: the last part takes the rest.
        rest = piece.text
        for part in contents[:-1]:
            part.text, rest = rest[: len(part.text)], rest[len(part.text) :]
        if contents:
            contents[-1].text = rest
        for part in parts:
            yield from _pieces(piece, part)

    def _part(self, parts: list[_Part]) -> _Part:
        """The last part, if it is of the channel that is open now, or else a new one."""
        if not parts or parts[-1].channel != self._channel:
            parts.append(_Part(self._channel))
        return parts[-1]

    def rest(self) -> Iterator[Piece]:
        """What comes after the last piece."""
        for event in self._chat.take_rest():
            yield Piece(event.text, [], "target", channel=event.kind, tool_call=event.tool_call)


def in_channels(decoded: Iterable[DecodedPiece], chat: ChatText) -> Iterator[Piece]:
    """Pieces, each split by channel."""
    channels = Channels(chat)
    for piece in decoded:
        yield from channels.split(piece)
    yield from channels.rest()


def _pieces(whole: DecodedPiece, part: _Part) -> Iterator[Piece]:
    """One piece; of the channel of tool calls, one for each."""
    tokens = [whole.tokens[place] for place in part.places]
    logprobs = None if whole.logprobs is None else [whole.logprobs[place] for place in part.places]
    yield Piece(part.text, tokens, whole.origin, logprobs, part.channel, part.calls[0] if part.calls else None)
    for call in part.calls[1:]:
        yield Piece("", [], whole.origin, None, part.channel, call)
