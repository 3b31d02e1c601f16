"""A model's answer taken apart while it streams: its reasoning, its tool calls, and the rest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

# Gemma 4's markup: <|channel>thought\n...<channel|> and <|tool_call>call:name{key:value,...}<tool_call|>, with strings
# as <|"|>...<|"|>. Each of these is one token.
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
_CHANNEL_NAME = "thought"
_MAX_DEPTH = 64  # of nested arguments
_OPEN_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}({_CHANNEL_NAME}\n?)?\Z")
_CALL_HEAD = re.compile(r"\s*call:([^\s{}:]+)\s*(?=\{)")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is beyond all numbers")
    return number


# Numbers, true, false, null, strings in plain quotes.
_SCALARS = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatEvent:
    """A piece of an answer: `text` of the kinds 'content' and 'reasoning', `tool_call` of the kind 'tool_call'."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    tool_call: ToolCall | None = None


class ChatParser:
    """Parses an answer as it streams. `push` holds back what may be the start of markup; `flush` ends the answer.

    reasoning, tool_calls: which markup to look for; without any, all text is content. prompt: what the answer goes on
    from; where it ends by opening a channel, the answer starts in it. A tool call that cannot be read, or that does not
    end, is content as it stands: nothing the model said is lost.
    """

    def __init__(self, *, reasoning: bool = True, tool_calls: bool = True, prompt: str = "") -> None:
        self._markers = (CHANNEL, CHANNEL_END) * reasoning + (CALL,) * tool_calls
        self.markup = self._markers + (CALL_END, QUOTE) * tool_calls  # the tokens it must see, special ones or not
        self._buffer = ""
        self._state = self._content
        if reasoning and (opening := _OPEN_CHANNEL.search(prompt)):
            self.push(opening[0])

    @property
    def in_reasoning(self) -> bool:
        """Whether a channel is open."""
        return self._state in (self._channel_name, self._reasoning)

    def push(self, text: str) -> list[ChatEvent]:
        """What this text completes."""
        self._buffer += text
        return list(self._events(final=False))

    def flush(self) -> list[ChatEvent]:
        """What is left at the end of the answer."""
        return list(self._events(final=True))

    def _events(self, final: bool) -> Iterator[ChatEvent]:
        """Runs the state, a generator that takes from the buffer what it can, until nothing moves any more."""
        before = None
        while before != (before := (self._state, self._buffer)):
            yield from self._state(final)

    def _content(self, final: bool) -> Iterator[ChatEvent]:
        text, marker = self._take(self._markers, final)
        if text:
            yield ChatEvent("content", text)
        if marker == CHANNEL:
            self._state = self._channel_name
        elif marker == CALL:
            self._state = self._call
        # A channel's end without its start says nothing; the model sometimes adds one.

    def _channel_name(self, final: bool) -> Iterator[ChatEvent]:
        name = _CHANNEL_NAME + "\n"
        if not final and (name.startswith(self._buffer) or CHANNEL.startswith(self._buffer)):
            return
        if self._buffer.startswith(CHANNEL):  # opened once more
            self._buffer = self._buffer.removeprefix(CHANNEL)
            return
        self._buffer = self._buffer.removeprefix(_CHANNEL_NAME).removeprefix("\n")
        self._state = self._reasoning
        yield from ()

    def _reasoning(self, final: bool) -> Iterator[ChatEvent]:
        text, marker = self._take(("\n" + CHANNEL_END, CHANNEL_END), final)
        if text:
            yield ChatEvent("reasoning", text)
        if marker:
            self._state = self._content

    def _call(self, final: bool) -> Iterator[ChatEvent]:
        end = _unquoted(self._buffer, CALL_END)
        if end < 0 and not final:
            return
        raw = self._buffer if end < 0 else self._buffer[: end + len(CALL_END)]
        self._buffer = self._buffer[len(raw) :]
        self._state = self._content
        try:
            yield ChatEvent("tool_call", tool_call=_parse_call(raw.removesuffix(CALL_END) if end >= 0 else ""))
        except ValueError:
            yield ChatEvent("content", CALL + raw)

    def _take(self, markers: tuple[str, ...], final: bool) -> tuple[str, str]:
        """Takes the text before the first marker, and the marker ('': there is none yet) from the buffer."""
        found = [(at, marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, marker = min(found)
        else:
            marker = ""
            at = len(self._buffer) - (0 if final else _started(self._buffer, markers))
        text, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
        return text, marker


def _started(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the start of a marker."""
    lengths = (n for marker in markers for n in range(1, len(marker)) if text.endswith(marker[:n]))
    return max(lengths, default=0)


def _unquoted(text: str, marker: str) -> int:
    """Where `marker` first stands outside of strings; -1: nowhere."""
    start = 0
    for number, part in enumerate(text.split(QUOTE)):
        if number % 2 == 0 and (at := part.find(marker)) >= 0:
            return start + at
        start += len(part) + len(QUOTE)
    return -1


def _parse_call(text: str) -> ToolCall:
    """From "call:name{key:value,...}". Raises ValueError."""
    head = _CALL_HEAD.match(text)
    if head is None:
        raise ValueError("no function is named")
    arguments, end = _parse_value(text, head.end(), 0)
    if not isinstance(arguments, dict) or text[end:].strip():
        raise ValueError("the arguments are not one object")
    return ToolCall(head[1], arguments)


def _parse_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value at text[at:] and where it ends. Raises ValueError."""
    if depth > _MAX_DEPTH:
        raise ValueError("the arguments are nested too deeply")
    at = _skip_space(text, at)
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith(("{", "["), at):
        return _parse_members(text, at, depth)
    if text.startswith("None", at):  # how the templates print a null
        return None, at + len("None")
    value, end = _SCALARS.raw_decode(text, at)
    if isinstance(value, str):
        value.encode()  # of a lone surrogate this is a ValueError
    return value, end


def _parse_members(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The object or the list at text[at:] and where it ends."""
    in_object = text[at] == "{"
    members: list[Any] = []
    at = _skip_space(text, at + 1)
    closing = "}" if in_object else "]"
    while not text.startswith(closing, at):
        if members:
            at = _expect(text, at, ",")
        if in_object:
            key, at = _parse_key(text, at, depth)
            value, at = _parse_value(text, _expect(text, at, ":"), depth + 1)
            members.append((key, value))
        else:
            value, at = _parse_value(text, at, depth + 1)
            members.append(value)
        at = _skip_space(text, at)
    return (dict(members) if in_object else members), at + 1


def _parse_key(text: str, at: int, depth: int) -> tuple[str, int]:
    """A key, bare or quoted."""
    at = _skip_space(text, at)
    if text.startswith((QUOTE, '"'), at):
        key, end = _parse_value(text, at, depth)
        return key, _skip_space(text, end)
    end = text.index(":", at)
    return text[at:end].strip(), end


def _expect(text: str, at: int, symbol: str) -> int:
    if not text.startswith(symbol, at):
        raise ValueError(f"'{symbol}' is missing")
    return at + len(symbol)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
