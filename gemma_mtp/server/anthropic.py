"""Answers in Anthropic's form: a message made of blocks, at once or as events."""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_mtp.generation import Generation, Piece
from gemma_mtp.server.choices import Choice
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.openai import named_event

Object = dict[str, Any]

_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class AnthropicWriter:
    """Implements Writer. model: its name for clients."""

    def __init__(self, model: str, stream: bool):
        self.id, self.stream, self._model = f"msg_{uuid.uuid4().hex}", stream, model
        self._blocks = 0  # begun so far
        self._kind: str | None = None  # of the one that is open
        self._called = False

    def whole(self, choices: Sequence[Choice]) -> Object:
        (choice,) = choices
        blocks: list[Object] = []
        for piece in choice.pieces:
            for block in _blocks(piece):
                kind = block["type"]
                if blocks and kind != "tool_use" and blocks[-1]["type"] == kind:
                    blocks[-1][kind] += block[kind]
                else:
                    blocks.append(block)
        self._called = any(block["type"] == "tool_use" for block in blocks)
        answer = choice.generation
        return self._message(blocks) | self._ending(answer) | {"usage": _usage(answer, answer.stats.tokens)}

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        (choice,) = choices
        answer = choice.generation
        ending = {"stop_reason": None, "stop_sequence": None, "usage": _usage(answer, 0)}
        yield named_event("message_start", message=self._message([]) | ending)

    def piece(self, choice: Choice, piece: Piece) -> Iterator[str]:
        for block in _blocks(piece):
            kind = block["type"]
            if kind == "tool_use":
                yield from self._begin(block | {"input": {}})
                yield self._delta("input_json_delta", partial_json=json.dumps(block["input"], ensure_ascii=False))
                yield from self._end()
                self._called = True
            else:
                if self._kind != kind:
                    yield from self._begin(block | {kind: ""})
                yield self._delta(f"{kind}_delta", **{kind: block[kind]})

    def ended(self, choice: Choice, choices: Sequence[Choice], last: bool) -> Iterator[str]:
        yield from self._end()
        usage = _usage(choice.generation, choice.generation.stats.tokens)
        yield named_event("message_delta", delta=self._ending(choice.generation), usage=usage)

    def closing(self, choices: Sequence[Choice]) -> Iterator[str]:
        yield named_event("message_stop")

    def failure(self, error: ApiError) -> str:
        return named_event(**error.anthropic())

    def _begin(self, block: Object) -> Iterator[str]:
        yield from self._end()
        yield named_event("content_block_start", index=self._blocks, content_block=block)
        self._blocks, self._kind = self._blocks + 1, block["type"]

    def _delta(self, kind: str, **of_delta: str) -> str:
        return named_event("content_block_delta", index=self._blocks - 1, delta={"type": kind, **of_delta})

    def _end(self) -> Iterator[str]:
        if self._kind is not None:
            yield named_event("content_block_stop", index=self._blocks - 1)
        self._kind = None

    def _message(self, blocks: list[Object]) -> Object:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": blocks}

    def _ending(self, answer: Generation) -> Object:
        reason = _REASONS.get(answer.finish_reason or "", "end_turn")
        if answer.stop_string is not None:
            reason = "stop_sequence"
        elif self._called and reason == "end_turn":
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": answer.stop_string}


def _blocks(piece: Piece) -> Iterator[Object]:
    """What a piece adds to the content."""
    if piece.channel == "reasoning" and piece.text:
        yield {"type": "thinking", "thinking": piece.text, "signature": ""}
    elif piece.text:
        yield {"type": "text", "text": piece.text}
    if piece.tool_call:
        call = piece.tool_call
        yield {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": call.arguments}


def _usage(answer: Generation, output: int) -> Object:
    return {
        "input_tokens": answer.stats.prompt_tokens - answer.stats.cached_tokens,
        "output_tokens": output,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.stats.cached_tokens,
    }
