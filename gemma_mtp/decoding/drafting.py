"""Draft sources: whatever proposes the tokens that a pass of the target then verifies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.decoding.sampling import SamplingParams

S = TypeVar("S", contravariant=True)


class Ends(NamedTuple):
    """Where a source should end a draft. How likely tokens are to be kept together is the product of their acceptance.

    acceptance: float32 [depths, SURENESS_LEVELS], by depth and sureness. keep: float32 [depths], what that product must
    be for a token to be checked; go_on: float32 [depths], what the one before must be for a token to be made at all.
    """

    acceptance: NDArray[np.float32]
    keep: NDArray[np.float32]
    go_on: NDArray[np.float32]


class Draft(NamedTuple):
    """A proposal. sureness: of each token, and then of the one left out, 0 to SURENESS_LEVELS - 1, higher being surer.
    These are only names: what they are worth is learnt of each source. left_out: the token that it ended before."""

    tokens: list[int]
    sureness: Sequence[int]
    left_out: int | None = None

    @property
    def made(self) -> list[int]:
        """All tokens that were made, the one left out included."""
        return self.tokens if self.left_out is None else [*self.tokens, self.left_out]

    def cut(self, depth: int) -> Draft:
        """Its first tokens, the next one left out."""
        if depth >= len(self.tokens):
            return self
        return Draft(self.tokens[:depth], self.sureness[: depth + 1], self.tokens[depth])


NOTHING = Draft([], [])


class Offer(NamedTuple):
    """What a source has for the coming round. draft: all that it would propose, where making that costs next to
    nothing; None: it has to be asked."""

    source: str
    draft: Draft | None = None


class GrowingDraft:
    """A draft while it is made: of at most `depth` tokens, and ended before where `ends` says."""

    def __init__(self, depth: int, ends: Ends | None = None):
        self._depth, self._ends = depth, ends
        self._together = 1.0  # the acceptance of all tokens so far
        self._sureness: list[int] = []
        self._left_out: int | None = None
        self.tokens: list[int] = []

    @property
    def goes_on(self) -> bool:
        """Whether another token is to be made."""
        at = len(self.tokens)
        if self._left_out is not None or at >= self._depth:
            return False
        return self._ends is None or at >= len(self._ends.go_on) or self._together >= self._ends.go_on[at]

    def add(self, token: int, sureness: int) -> None:
        at = len(self.tokens)
        self._sureness.append(sureness)
        if self._ends is not None and at < len(self._ends.keep):
            self._together *= float(self._ends.acceptance[at, sureness])
            if self._together < self._ends.keep[at]:
                self._left_out = token
                return
        self.tokens.append(token)

    @property
    def draft(self) -> Draft:
        return Draft(self.tokens, self._sureness, self._left_out)


class DraftSource(Protocol):
    """Proposes what may follow a text. It is told the text as it is decided, so rejected tokens never reach it.

    name: what is learnt of its drafts is learnt of all sources of that name. free: whether a proposal costs next to
    nothing, so that one is made each round, if only to see whether it would have been right.
    """

    name: str
    free: bool

    def propose(self, depth: int, ends: Ends | None = None) -> Draft:
        """At most `depth` tokens to follow the text so far. Called at most once between calls of `advance`.

        ends: where to end it before; one that is free is not told.
        """

    def advance(self, tokens: Sequence[int]) -> None:
        """Appends decided tokens: the prompt first, then what each round kept (drafts, then the target's own token)."""


class Drafting(Protocol[S]):
    """A target with a drafter, as that drafter's source sees it. S is the target's handle of a sequence."""

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter."""

    def draft(
        self, sequence: S, row: int, token: int, depth: int, params: SamplingParams, ends: Ends | None = None
    ) -> Draft:
        """At most `depth` tokens to follow `token`, the newest of the sequence, which no pass has run over yet.

        row: which of the rows that the sequence's last pass sampled gave `token`.
        """


class TrainedDrafter(Generic[S]):
    """Proposes what a drafter checkpoint says, from what the target's last pass left behind."""

    name, free = "drafter", False

    def __init__(self, engine: Drafting[S], sequence: S, params: SamplingParams):
        self._engine, self._sequence, self._params = engine, sequence, params
        self._token, self._row = -1, 0

    def propose(self, depth: int, ends: Ends | None = None) -> Draft:
        return self._engine.draft(self._sequence, self._row, self._token, depth, self._params, ends)

    def advance(self, tokens: Sequence[int]) -> None:
        self._token, self._row = tokens[-1], len(tokens) - 1


class PromptLookup:
    """Proposes what followed the longest suffix of the text where it occurred before, in prompt, output or prediction.

    Costs a microsecond or two a token whatever the length of the text; the memory is about 150 bytes a token.
    """

    name, free = "lookup", True
    LED_IN = 8  # tokens of the prompt's end that a prediction is put after, so that it is proposed from the start

    def __init__(self, prediction: Sequence[int] = ()):
        """prediction: what somebody expects the output to be, or to hold parts of."""
        self._lookup = _native.SuffixLookup()
        self._prediction = prediction

    def propose(self, depth: int, ends: Ends | None = None) -> Draft:
        return Draft(*self._lookup.continuation(depth))

    def advance(self, tokens: Sequence[int]) -> None:
        if self._prediction and not len(self._lookup):
            self._lookup.extend([*tokens[-self.LED_IN :], *self._prediction])
        self._lookup.extend(tokens)


def draft_sources(
    engine: Drafting[S], sequence: S, params: SamplingParams, prediction: Sequence[int] = ()
) -> list[DraftSource]:
    """What drafts for a sequence, the first being the one that drafts at a fixed depth: lookup where there is a
    prediction, a drafter otherwise."""
    lookup = PromptLookup(prediction=prediction)
    if not engine.drafts:
        return [lookup]
    drafter = TrainedDrafter(engine, sequence, params)
    return [lookup, drafter] if prediction else [drafter, lookup]
