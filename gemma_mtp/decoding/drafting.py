"""Draft sources: whatever proposes the tokens that a pass of the target then verifies."""

from collections.abc import Sequence
from typing import Protocol

from gemma_mtp import _native


class DraftSource(Protocol):
    """Proposes what may follow a text. It is told the text as it is decided, so rejected tokens never reach it."""

    @property
    def confidence(self) -> int | None:
        """Which of a few classes of likelihood the coming proposal is in; None when there is nothing to propose.

        Classes are only names: the depth control learns how often the proposals of each are kept.
        """

    def propose(self, depth: int) -> list[int]:
        """At most `depth` tokens to follow the text so far. Called at most once between calls of `advance`."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Appends decided tokens: the prompt first, then what each round kept (drafts, then the target's own token)."""


class PromptLookup:
    """Proposes what followed the longest suffix of the text where it occurred before, in prompt or output.

    Costs a microsecond or two a token whatever the length of the text; the memory is about 150 bytes a token.
    """

    def __init__(self, min_match: int = 2):
        """min_match: the shortest suffix, in tokens, that is worth a proposal."""
        self._lookup = _native.SuffixLookup()
        self._min_match = min_match

    @property
    def confidence(self) -> int | None:
        """The class of the match's length: 2..3, 4..7, 8..15, 16 and more."""
        length = self._lookup.match_length
        return min(length.bit_length(), 5) if length >= self._min_match else None

    def propose(self, depth: int) -> list[int]:
        return self._lookup.continuation(depth) if self._lookup.match_length >= self._min_match else []

    def advance(self, tokens: Sequence[int]) -> None:
        self._lookup.extend(tokens)
