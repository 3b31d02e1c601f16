"""How often drafted tokens are kept: running estimates that start from what is known of their kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native

DEPTHS = 8  # the most tokens that a draft of automatic length has
LEVELS = _native.SURENESS_LEVELS


# Acceptance by sureness that is expected of a source of which nothing has been seen: what tokens had on prose and code,
# greedy and sampled (benchmarks/depth.py).
PRIORS = {
    "drafter": (0.17, 0.25, 0.32, 0.39, 0.47, 0.65, 0.85, 0.96),
    "lookup": (0.22, 0.30, 0.45, 0.66, 0.76, 0.86, 0.88, 0.97),
}
_UNKNOWN = (0.4,) * LEVELS


class Acceptance:
    """Acceptance of a source's tokens, by depth and by how sure it is of them.

    A drafter's own probability is no acceptance: filters and shared noise make a token that it gives a tenth come true
    two times in five. How sure it is tells much, though: which tokens are worth checking, without a pass to see it.
    What a sureness means hardly differs between texts, so what others have taught (`parent`) counts for much.
    """

    WEIGHT = 16.0  # observations that what others have taught counts for, or a level as the prior of one of its depths
    GUESS_WEIGHT = 4.0  # the same of a prior that says nothing
    DECAY = 0.98  # of what was seen at a place with each new observation there
    FIRST_DECAY = 0.95  # with each draft

    def __init__(self, prior: Sequence[float] | None = None, parent: Acceptance | None = None):
        self._parent = parent
        self._prior = parent.levels() if parent else list(prior or _UNKNOWN)
        self._weights = parent.weights() if parent else [self.WEIGHT if prior else self.GUESS_WEIGHT] * LEVELS
        self._levels = [_Average() for _ in range(LEVELS)]
        self._places = [[_Average() for _ in range(LEVELS)] for _ in range(DEPTHS)]
        self._table = np.array([self._prior] * DEPTHS, np.float32)
        self._changed: set[int] = set()  # levels whose column is old
        self.first: list[float] = list(parent.first) if parent else [1 / LEVELS] * LEVELS
        """The share of drafts whose first token is of each level."""

    def levels(self) -> list[float]:
        """Acceptance by level, whatever the depth."""
        known = zip(self._levels, self._prior, self._weights, strict=True)
        return [average.estimate(prior, weight) for average, prior, weight in known]

    def weights(self) -> list[float]:
        """What these count for as a prior, in observations."""
        known = zip(self._levels, self._weights, strict=True)
        return [min(weight + average.trials, self.WEIGHT) for average, weight in known]

    def estimate(self, depth: int, level: int) -> float:
        """Acceptance at one place, of a token those before which are kept. depth: from 0."""
        prior = self._levels[level].estimate(self._prior[level], self._weights[level])
        return self._places[depth][level].estimate(prior, self.WEIGHT)

    def table(self) -> NDArray[np.float32]:
        """float32 [DEPTHS, LEVELS]: `estimate` at every place."""
        for level in self._changed:
            self._table[:, level] = [self.estimate(depth, level) for depth in range(DEPTHS)]
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

    def of(self, source: str) -> Acceptance:
        if source not in self._sources:
            self._sources[source] = Acceptance(PRIORS.get(source))
        return self._sources[source]
