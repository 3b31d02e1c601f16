"""Stop strings in a stream of text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string appears, and holds back an end that may still become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show once `text` has come. When a stop string is complete, `found` is it and the
        answer ends before it; nothing must be pushed after that."""
        if not self._stops:
            return text
        text = self._held + text
        starts = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self._held = ""
            at, self.found = min(starts)
            return text[:at]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
