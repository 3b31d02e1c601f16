"""Answers in OpenAI's form, whole and in chunks, with llama.cpp's timings."""

import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from gemma_mtp.decoding.progress import TokenLogprobs
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.generation import Piece
from gemma_mtp.server.choices import Choice
from gemma_mtp.server.errors import ApiError
from gemma_mtp.text.chat_parser import ToolCall
from gemma_mtp.text.tokenizer import Tokenizer

Object = dict[str, Any]


class Form(Protocol):
    """How a kind of answer is written."""

    name: str  # of the answer's object
    chunk_name: str
    id: str

    def opening(self) -> Object | None:
        """What a stream starts a choice with."""

    def closing(self, choice: Choice) -> Object:
        """What a stream ends a choice with."""

    def delta(self, choice: Choice, piece: Piece) -> Object | None:
        """A piece as a stream sends it, as part of its choice."""

    def whole(self, choice: Choice) -> Object:
        """The choice as it is sent at once."""

    def finish_reason(self, choice: Choice) -> str | None: ...


class ChatForm:
    name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, spelling: "Spelling", top: int | None):
        """top: how many of the likeliest tokens to report; None: no log probabilities."""
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._spelling, self._top = spelling, top

    def opening(self) -> Object | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def closing(self, choice: Choice) -> Object:
        return {"delta": {}, "logprobs": None}

    def delta(self, choice: Choice, piece: Piece) -> Object | None:
        delta: Object = {}
        if piece.tool_call:
            delta["tool_calls"] = [{"index": choice.tool_calls, **_call(piece.tool_call)}]
            choice.tool_calls += 1
        elif piece.channel == "reasoning":
            delta["reasoning_content"] = piece.text
        else:
            delta["content"] = piece.text
        logprobs = self._logprobs([piece])
        if not (piece.text or piece.tool_call or (logprobs and logprobs["content"])):
            return None
        return {"delta": delta, "logprobs": logprobs}

    def whole(self, choice: Choice) -> Object:
        answer = choice.generation
        message: Object = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
            choice.tool_calls = len(answer.tool_calls)
        return {"message": message, "logprobs": self._logprobs(choice.pieces)}

    def finish_reason(self, choice: Choice) -> str | None:
        reason = choice.generation.finish_reason
        return "tool_calls" if choice.tool_calls and reason == "stop" else reason

    def _logprobs(self, pieces: Sequence[Piece]) -> Object | None:
        if self._top is None:
            return None
        return {"content": [self._entry(*pair) for pair in self._spelling.of_content(pieces)], "refusal": None}

    def _entry(self, token: int, found: TokenLogprobs) -> Object:
        top = [self._spelling.spell(other) | {"logprob": logprob} for other, logprob in found.top[: self._top]]
        return self._spelling.spell(token) | {"logprob": found.chosen, "top_logprobs": top}


class Echo(NamedTuple):
    """A prompt that an answer starts with: its text, and its tokens.

    hidden: how long the spelling of the first tokens is that the text leaves out, such as that of <bos>.
    """

    text: str
    tokens: list[int]
    hidden: int


class CompletionForm:
    name = chunk_name = "text_completion"

    def __init__(self, spelling: "Spelling", top: int | None, echoes: Sequence[Echo] = ()):
        """echoes: what each choice starts with; none: its text is what was generated alone."""
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._spelling, self._top, self._echoes = spelling, top, echoes

    def opening(self) -> Object | None:
        return None

    def closing(self, choice: Choice) -> Object:
        if self._echoes and not choice.echoed:
            return self._part(choice, "", [])
        return {"text": "", "logprobs": None}

    def delta(self, choice: Choice, piece: Piece) -> Object | None:
        part = self._part(choice, piece.text, [piece])
        return part if part["text"] or (part["logprobs"] and part["logprobs"]["tokens"]) else None

    def whole(self, choice: Choice) -> Object:
        return self._part(choice, choice.generation.text, choice.pieces)

    def finish_reason(self, choice: Choice) -> str | None:
        return choice.generation.finish_reason

    def _part(self, choice: Choice, text: str, pieces: Sequence[Piece]) -> Object:
        """A part of a choice, the first one with the prompt before it if that is asked for."""
        echo = self._echoes[choice.index] if self._echoes and not choice.echoed else None
        choice.echoed = True
        found: list[tuple[int, TokenLogprobs | None]] = [*self._spelling.of_content(pieces)]
        if echo is not None:
            of_prompt = [None, *(choice.generation.prompt_logprobs or ())]  # nothing is before the first token
            found = [*zip(echo.tokens, of_prompt, strict=False), *found]
            text = echo.text + text
            choice.offset = -echo.hidden
        return {"text": text, "logprobs": None if self._top is None else self._logprobs(choice, found)}

    def _logprobs(self, choice: Choice, found: Sequence[tuple[int, TokenLogprobs | None]]) -> Object:
        tokens, chosen, top, offsets = [], [], [], []
        for token, of_token in found:
            spelled = self._spelling.text(token)
            tokens.append(spelled)
            chosen.append(of_token and of_token.chosen)
            top.append(of_token and self._likeliest(of_token))
            offsets.append(max(choice.offset, 0))
            choice.offset += len(spelled)
        tops = top if self._top else None
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _likeliest(self, found: TokenLogprobs) -> Object:
        return {self._spelling.text(other): logprob for other, logprob in found.top[: self._top]}


def echo(tokenizer: Tokenizer, prompt: str | Sequence[int], tokens: list[int]) -> Echo:
    """What of a prompt an answer repeats: its text as it was given, or that of the tokens that were."""
    begun = tokenizer.add_bos if isinstance(prompt, str) else tokens[:1] == [tokenizer.bos_id]
    text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens[1:] if begun else tokens)
    return Echo(text, tokens, len(tokenizer.token_text(tokens[0])) if begun else 0)


class Spelling:
    """Tokens as log probabilities name them. ends: the tokens that end an answer, which are no part of it."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]):
        self._tokenizer, self._ends = tokenizer, ends

    def of_content(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, TokenLogprobs]]:
        for piece in pieces:
            if piece.channel == "content":
                for token, found in zip(piece.tokens, piece.logprobs or (), strict=False):
                    if token not in self._ends:
                        yield token, found

    def text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")

    def spell(self, token: int) -> Object:
        return {"token": self.text(token), "bytes": list(self._tokenizer.token_bytes(token))}


class OpenAIWriter:
    """Implements Writer. model: its name for clients. per_prompt: how many choices each prompt has. with_usage: whether
    a stream ends with the usage. with_timings: whether each event has timings. with_ids: whether choices have the ids
    of their tokens."""

    def __init__(
        self,
        form: Form,
        model: str,
        *,
        stream: bool,
        per_prompt: int,
        with_usage: bool = False,
        with_timings: bool = False,
        with_ids: bool = False,
    ):
        self.id, self.stream = form.id, stream
        self._form, self._model, self._per_prompt, self._with_usage = form, model, per_prompt, with_usage
        self._with_timings, self._with_ids = with_timings, with_ids
        self._created = now()

    def whole(self, choices: Sequence[Choice]) -> Object:
        written = [
            self._written(choice, self._form.whole(choice) | self._ids(choice.generation.tokens), ended=True)
            for choice in choices
        ]
        return self._envelope(self._form.name, written) | self._figures(choices)

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        for choice in choices:
            if opening := self._form.opening():
                yield self._chunk(self._written(choice, opening, ended=False))

    def piece(self, choice: Choice, piece: Piece) -> Iterator[str]:
        delta = self._form.delta(choice, piece)
        if delta is None and self._with_ids and piece.tokens:  # tokens without text, as the one that ends it
            delta = self._form.closing(choice)
        if delta is None:
            return
        came = {"origin": piece.origin, "tokens": len(piece.tokens)}  # which OpenAI's form has no place for
        more = {"timings": timings([choice.generation.stats])} if self._with_timings else {}
        yield self._chunk(self._written(choice, delta | came | self._ids(piece.tokens), ended=False), **more)

    def ended(self, choice: Choice, choices: Sequence[Choice], last: bool) -> Iterator[str]:
        shown = last and not self._with_usage
        more = {"timings": timings([one.generation.stats for one in choices])} if shown else {}
        yield self._chunk(self._written(choice, self._form.closing(choice), ended=True), **more)

    def closing(self, choices: Sequence[Choice]) -> Iterator[str]:
        if self._with_usage:
            yield self._chunk(**self._figures(choices))
        yield "data: [DONE]\n\n"

    def failure(self, error: ApiError) -> str:
        return event(error.content())

    def _ids(self, tokens: Sequence[int]) -> Object:
        return {"token_ids": tokens} if self._with_ids else {}

    def _chunk(self, *written: Object, **more: Any) -> str:
        usage = {"usage": None} if self._with_usage else {}
        return event(self._envelope(self._form.chunk_name, list(written)) | usage | more)

    def _envelope(self, name: str, choices: list[Object]) -> Object:
        return {"id": self.id, "object": name, "created": self._created, "model": self._model, "choices": choices}

    def _written(self, choice: Choice, part: Object, *, ended: bool) -> Object:
        """A choice or a part of it, with its index and how it ended."""
        return {"index": choice.index, **part, "finish_reason": self._form.finish_reason(choice) if ended else None}

    def _figures(self, choices: Sequence[Choice]) -> Object:
        return {
            "usage": usage(choices, self._per_prompt),
            "timings": timings([choice.generation.stats for choice in choices]),
        }


def usage(choices: Sequence[Choice], per_prompt: int) -> Object:
    """Counts of all choices; the prompt that `per_prompt` of them share counts once."""
    stats = [choice.generation.stats for choice in choices]
    prompt, completion = sum(s.prompt_tokens for s in stats[::per_prompt]), sum(s.tokens for s in stats)
    accepted = sum(s.accepted for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in stats[::per_prompt])},
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(s.drafted for s in stats) - accepted,
        },
    }


def timings(stats: Sequence[Stats]) -> Object:
    """llama.cpp's, added up over all choices."""
    cache_n, predicted_n = sum(s.cached_tokens for s in stats), sum(s.tokens for s in stats)
    prompt_n = sum(s.prompt_tokens for s in stats) - cache_n
    prompt_ms = 1000 * sum(s.seconds_prompt for s in stats)
    predicted_ms = 1000 * sum(s.seconds_decode for s in stats)
    return {
        "cache_n": cache_n,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
        "prompt_per_second": _ratio(1000 * prompt_n, prompt_ms),
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, predicted_n),
        "predicted_per_second": _ratio(1000 * predicted_n, predicted_ms),
        "draft_n": sum(s.drafted for s in stats),
        "draft_n_accepted": sum(s.accepted for s in stats),
    }


def now() -> int:
    return int(time.time())


def event(content: Object) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def named_event(type: str, **content: Any) -> str:
    """The same in the forms whose events have names too: Anthropic's, and OpenAI's Responses."""
    return f"event: {type}\n{event({'type': type, **content})}"


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _call(call: ToolCall) -> Object:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
