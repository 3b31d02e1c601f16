"""Answers in the form of OpenAI's Responses: items, at once or as events."""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_mtp.generation import Piece
from gemma_mtp.server.choices import Choice
from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.openai import named_event, now, timings
from gemma_mtp.text.chat_parser import ToolCall

Object = dict[str, Any]

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # what an item's text is a part of


class ResponsesWriter:
    """Implements Writer. model: its name for clients. echoed: what a response repeats of its request."""

    def __init__(self, model: str, stream: bool, echoed: Object):
        self.id, self.stream = _id("resp"), stream
        self._fixed = {"id": self.id, "object": "response", "created_at": now(), "model": model, **echoed}
        self._events = 0  # sent so far
        self._output: list[Object] = []
        self._open = False  # whether the last of them may go on

    def whole(self, choices: Sequence[Choice]) -> Object:
        (choice,) = choices
        for piece in choice.pieces:
            list(self._add(piece))
        list(self._end(choice))
        return self._response(choice)

    def opening(self, choices: Sequence[Choice]) -> Iterator[str]:
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self._response(None))

    def piece(self, choice: Choice, piece: Piece) -> Iterator[str]:
        return self._add(piece)

    def ended(self, choice: Choice, choices: Sequence[Choice], last: bool) -> Iterator[str]:
        yield from self._end(choice)
        response = self._response(choice)
        yield self._event(f"response.{response['status']}", response=response)

    def closing(self, choices: Sequence[Choice]) -> Iterator[str]:
        yield from ()

    def failure(self, error: ApiError) -> str:
        told = {"code": error.code or "server_error", "message": error.message}
        response = self._response(None) | {"status": "failed", "error": told}
        return self._event("response.failed", response=response)

    def _add(self, piece: Piece) -> Iterator[str]:
        """Adds a piece to the output; the events that say so."""
        if piece.text:
            kind = "reasoning" if piece.channel == "reasoning" else "message"
            if not self._open or self._output[-1]["type"] != kind:
                yield from self._close()
                yield from self._begin(kind)
            item = self._output[-1]
            item["content"][0]["text"] += piece.text
            yield self._of_part(f"response.{_PARTS[kind]}.delta", delta=piece.text, **_more(kind))
        if piece.tool_call:
            yield from self._close()
            yield from self._call(piece.tool_call)

    def _begin(self, kind: str) -> Iterator[str]:
        item: Object = {"id": _id("msg" if kind == "message" else "rs"), "type": kind, "status": "in_progress"}
        item["role" if kind == "message" else "summary"] = "assistant" if kind == "message" else []
        yield from self._begin_item(item | {"content": []})
        part: Object = {"type": _PARTS[kind], "text": "", **_more(kind)}
        if kind == "message":
            part["annotations"] = []
        yield self._of_part("response.content_part.added", part=part)
        self._output[-1]["content"] = [part]
        self._open = True

    def _close(self, status: str = "completed") -> Iterator[str]:
        """Ends the item that is open, if one is."""
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        (part,) = item["content"]
        yield self._of_part(f"response.{part['type']}.done", text=part["text"], **_more(item["type"]))
        yield self._of_part("response.content_part.done", part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _call(self, call: ToolCall) -> Iterator[str]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name}
        yield from self._begin_item(item | {"arguments": "", "status": "in_progress"})
        at = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield self._event("response.function_call_arguments.delta", **at, delta=arguments)
        yield self._event("response.function_call_arguments.done", **at, name=call.name, arguments=arguments)
        self._output[-1] |= {"arguments": arguments, "status": "completed"}
        yield self._event(
            "response.output_item.done", output_index=at["output_index"], item=self._output[-1]
        )

    def _begin_item(self, item: Object) -> Iterator[str]:
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _end(self, choice: Choice) -> Iterator[str]:
        yield from self._close("incomplete" if choice.generation.finish_reason == "length" else "completed")

    def _response(self, choice: Choice | None) -> Object:
        """The response as it stands: ended with a choice, just begun without."""
        status, incomplete = "in_progress", None
        figures: Object = {"usage": None}
        if choice is not None:
            cut = choice.generation.finish_reason == "length"
            status, incomplete = ("incomplete", {"reason": "max_output_tokens"}) if cut else ("completed", None)
            figures = {"usage": _usage(choice), "timings": timings([choice.generation.stats])}
        ending = {"status": status, "error": None, "incomplete_details": incomplete, "output": self._output}
        return self._fixed | ending | figures

    def _of_part(self, type: str, **content: Any) -> str:
        """An event about the text of the last item."""
        at = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._event(type, **at, **content)

    def _event(self, type: str, **content: Any) -> str:
        self._events += 1
        return named_event(type, sequence_number=self._events - 1, **content)


def _more(kind: str) -> Object:
    """What the text of a message has, and that of reasoning has not."""
    return {"logprobs": []} if kind == "message" else {}


def _usage(choice: Choice) -> Object:
    stats = choice.generation.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens},
        "output_tokens": stats.tokens,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
        "total_tokens": stats.prompt_tokens + stats.tokens,
    }


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
