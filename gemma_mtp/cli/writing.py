"""How a generation is written: to standard output while it comes, or as one JSON object."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_mtp import Generation, Model, Stream
    from gemma_mtp.generation import Piece
    from gemma_mtp.text.chat_parser import ToolCall

DIM, GREEN = "2", "32"


class Writer:
    """Writes pieces to standard output.

    Reasoning is dimmed and set apart on a terminal, and left out elsewhere; a tool call is a line of JSON; drafted
    tokens are green if `show_drafts` is set.
    """

    def __init__(self, show_drafts: bool) -> None:
        self.show_drafts = show_drafts
        self.show_reasoning = sys.stdout.isatty()
        self.last: str | None = None  # the channel last written to

    def write(self, piece: "Piece") -> None:
        text = json.dumps(as_call(piece.tool_call), ensure_ascii=False) if piece.tool_call else piece.text
        if not text or (piece.channel == "reasoning" and not self.show_reasoning):
            return
        styles = [DIM] * (piece.channel == "reasoning") + [GREEN] * (self.show_drafts and piece.origin == "draft")
        sys.stdout.write(self.gap(piece) + (f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if styles else text))
        sys.stdout.flush()
        self.last = piece.channel

    def gap(self, piece: "Piece") -> str:
        """What keeps this piece apart from what was written before it."""
        if self.last is None or (piece.channel == self.last and not piece.tool_call):
            return ""
        return "\n\n" if self.last == "reasoning" else "\n"


def write_stream(stream: "Stream", show_drafts: bool) -> "Generation":
    """Writes a generation piece by piece, until its end or Ctrl-C."""
    writer = Writer(show_drafts)
    try:
        for piece in stream:
            writer.write(piece)
    except KeyboardInterrupt:
        pass
    finally:
        stream.close()
    return stream.generation


def end_line(generation: "Generation") -> str:
    """How it went: `[64 tokens, 101.3 tokens/s; 20 rounds, 2.20 accepted a round, 44 of 60 drafted]`."""
    stats = generation.stats
    line = f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"
    if stats.drafted:
        mean = stats.accepted / stats.rounds
        line += f"; {stats.rounds} rounds, {mean:.2f} accepted a round, {stats.accepted} of {stats.drafted} drafted"
    else:
        line += "; nothing drafted"
    if generation.finish_reason == "cancelled":
        line += "; cancelled"
    return f"[{line}]"


def as_object(generation: "Generation", model: "Model", chat: bool) -> dict[str, object]:
    """What --json prints; of a chat, the reasoning and the tool calls too."""
    answer: dict[str, object] = {"text": generation.text}
    if chat:
        answer["reasoning"] = generation.reasoning
        answer["tool_calls"] = [as_call(call) for call in generation.tool_calls]
    return answer | {
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "stats": dataclasses.asdict(generation.stats) | {"tokens_per_second": generation.stats.tokens_per_second},
        "model": model.name,
        "drafter": model.drafter_name,
    }


def as_call(call: "ToolCall") -> dict[str, object]:
    return {"name": call.name, "arguments": call.arguments}
