"""How often drafts are kept: running estimates that start from what is known of their kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.decoding.drafting import Confidence

DEPTHS = 8  # the most tokens that a draft of automatic length has
LEVELS = _native.SURENESS_LEVELS


class Acceptance:
    """Acceptance at each depth: exponential averages that start from a prior.

    The prior of depth 1 is the estimate of what this is a part of (`parent`), that of depth i the estimate of depth
    i - 1, so one observation says something about every depth. What was seen of a depth fades while it is not tried, so
    that a bad start there is not held against it for good.
    """

    FIRST_PRIOR = 0.4
    PRIOR_WEIGHT = 4.0  # observations that the prior counts for: a bad start should not end drafting for most of a text
    DECAY = 0.98  # of past observations with each new one: a memory of about 50

    def __init__(self, parent: Acceptance | None = None):
        self._parent = parent
        self._hits = [0.0] * DEPTHS
        self._trials = [0.0] * DEPTHS

    def estimate(self, index: int, prior: float | None = None) -> float:
        """Acceptance at depth index + 1, given that of the depth before (the prior of depth 1 is known here)."""
        if prior is None:
            prior = self._parent.estimate(0) if self._parent is not None else self.FIRST_PRIOR
        return (self._hits[index] + self.PRIOR_WEIGHT * prior) / (self._trials[index] + self.PRIOR_WEIGHT)

    def observe(self, asked: int, accepted: int) -> None:
        """A round that `asked` tokens were wanted of: what the source left out is as good as rejected."""
        tried = min(accepted + 1, asked)
        for i in range(DEPTHS):
            self._hits[i] = self.DECAY * self._hits[i] + (i < accepted)
            self._trials[i] = self.DECAY * self._trials[i] + (i < tried)
        if self._parent is not None:
            self._parent.observe(asked, accepted)


class Sureness:
    """Acceptance of the tokens of a source that says of each how sure it is, by depth and sureness; and how sure it is.

    A drafter's own probability is no acceptance: filters and shared noise make a token that it gives a tenth come true
    two times in five. How sure it is tells much, though: which tokens are worth checking, without a pass to see it.
    What a sureness means hardly differs between texts, so what others have taught (`parent`) counts for much.
    """

    # Of eight levels, what a trained drafter's tokens had on prose and code, greedy and sampled (benchmarks/depth.py).
    FIRST_PRIOR = (0.17, 0.25, 0.32, 0.39, 0.47, 0.65, 0.85, 0.96)
    FIRST_WEIGHT = 4.0  # observations that it counts for
    WEIGHT = 16.0  # the same of a parent's estimate, and of a level's as the prior of one depth
    DECAY = 0.98  # of what was seen at a place with each new observation there
    FIRST_DECAY = 0.95  # with each draft

    def __init__(self, parent: Sureness | None = None):
        self._parent = parent
        self._prior = parent.levels() if parent else list(self.FIRST_PRIOR)
        self._weight = self.WEIGHT if parent else self.FIRST_WEIGHT
        self._levels = [_Average() for _ in range(LEVELS)]
        self._places = [[_Average() for _ in range(LEVELS)] for _ in range(DEPTHS)]
        self._table = np.array([self._prior] * DEPTHS, np.float32)
        self._changed: set[int] = set()  # levels whose column is old
        self.first: list[float] = list(parent.first) if parent else [1 / LEVELS] * LEVELS
        """The share of drafts whose first token is of each level."""

    def levels(self) -> list[float]:
        """Acceptance by level, whatever the depth."""
        known = zip(self._levels, self._prior, strict=True)
        return [average.estimate(prior, self._weight) for average, prior in known]

    def table(self) -> NDArray[np.float32]:
        """float32 [DEPTHS, LEVELS]: acceptance by depth and level, of tokens those before which are kept."""
        for level in self._changed:
            prior = self._levels[level].estimate(self._prior[level], self._weight)
            self._table[:, level] = [places[level].estimate(prior, self.WEIGHT) for places in self._places]
        self._changed.clear()
        return self._table

    def mean(self) -> float:
        """Acceptance of a first token, for all that is known before it is made."""
        return sum(share * chance for share, chance in zip(self.first, self.levels(), strict=True))

    def observe(self, levels: Sequence[int], right: int) -> None:
        """Tells of a draft: how sure its source was of each token, and how many from the first on were right."""
        if self._parent:
            self._parent.observe(levels, right)
        for depth, level in enumerate(levels[: right + 1]):
            self._levels[level].add(depth < right, self.DECAY)
            self._places[depth][level].add(depth < right, self.DECAY)
            self._changed.add(level)
        if levels:
            self.first = [share * self.FIRST_DECAY for share in self.first]
            self.first[levels[0]] += 1 - self.FIRST_DECAY


class _Average:
    """Hits over trials, both fading."""

    __slots__ = ("hits", "trials")

    def __init__(self) -> None:
        self.hits = self.trials = 0.0

    def add(self, hit: bool, decay: float) -> None:
        self.hits = decay * self.hits + hit
        self.trials = decay * self.trials + 1

    def estimate(self, prior: float, weight: float) -> float:
        return (self.hits + weight * prior) / (self.trials + weight)


class Experience:
    """What the drafts of all texts have taught: the prior of a text that begins."""

    def __init__(self) -> None:
        self._sources: dict[str, Acceptance] = {}
        self._classes: dict[Confidence, Acceptance] = {}
        self._sure: dict[str, Sureness] = {}

    def acceptance(self, confidence: Confidence) -> Acceptance:
        """Of a class of proposals, with its source's as the prior."""
        if confidence not in self._classes:
            self._classes[confidence] = Acceptance(self._sources.setdefault(confidence.source, Acceptance()))
        return self._classes[confidence]

    def sureness(self, source: str) -> Sureness:
        return self._sure.setdefault(source, Sureness())
