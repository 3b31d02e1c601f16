"""What passes and drafts cost, learnt from those that were run."""

from collections.abc import Sequence
from itertools import accumulate

from gemma_mtp.errors import SettingsError


class CostCurve:
    """Running estimate of C(T), from a measured start.

    Each measurement is first the median of the last three of its T, which drops a lone disturbance, then goes into an
    average over about the last MEMORY; an average that is not renewed counts for less and less. An estimate that has
    become high for its place on the start curve comes down while it is not measured: what looks too dear is never
    tried, so nothing else would tell that it has become cheaper (what looks too cheap is tried, and corrected).
    """

    MEMORY = 40.0
    OLD = 16  # rounds after which earlier measurements say nothing about the next, which then counts alone
    STEP = 1.25  # the most that a measurement alone may differ by
    START_WEIGHT = 4.0  # measurements that the start curve counts for
    FORGET = 0.97  # a round without a measurement
    RELAX = 0.005  # a round

    def __init__(self, seconds: Sequence[float]):
        if not seconds or min(seconds) <= 0:
            raise SettingsError("The cost curve must hold positive seconds for passes of 1, 2, ... rows.")
        self._start = list(seconds)
        self._average = list(seconds)
        self._weight = [self.START_WEIGHT] * len(seconds)
        self._last: list[list[float]] = [[s] * 3 for s in seconds]
        self.age = [0] * len(seconds)
        """Rounds since a pass of index + 1 rows was measured."""
        self.seconds = list(accumulate(seconds, max))
        """C(index + 1), made never to fall: a wider pass is not cheaper, whatever the noise says."""

    def measure(self, index: int, seconds: float) -> None:
        """Takes in the seconds of a pass of index + 1 rows."""
        if self.age[index] < self.OLD:
            self._last[index] = [*self._last[index][1:], seconds]
        else:
            old = self._average[index]
            self._last[index] = [min(max(seconds, old / self.STEP), old * self.STEP)] * 3
        median = sorted(self._last[index])[1]
        self._average[index] += (median - self._average[index]) / (1 + self._weight[index])
        scale = self._average[index] / self._start[index]
        for i, start in enumerate(self._start):
            if i == index:
                self._weight[i] = min(self._weight[i] + 1, self.MEMORY)
                self.age[i] = 0
            else:
                self._weight[i] *= self.FORGET
                self.age[i] += 1
                self._average[i] -= self.RELAX * max(0.0, self._average[i] - scale * start)
        self.seconds = list(accumulate(self._average, max))


class DraftCost:
    """Running estimate of the seconds of one drafted token, by source: that of a few tries, then an average.

    The first tries pay for memory that later ones find in place. Were the first believed, a drafter could look too dear
    to be tried again.
    """

    TRIES = 3  # of which the quickest counts
    NEWEST = 0.1  # weight of each try after those

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._average: dict[str, float] = {}

    def measure(self, source: str, seconds: float) -> None:
        """Takes in the seconds of a token."""
        if source in self._average:
            self._average[source] += self.NEWEST * (seconds - self._average[source])
            return
        tries = self._first.setdefault(source, [])
        tries.append(seconds)
        if len(tries) == self.TRIES:
            self._average[source] = min(tries)

    def seconds(self, source: str) -> float:
        """Of a token; 0 until there were enough tries."""
        return self._average.get(source, 0.0)


class PassCost:
    """Seconds of a pass of T rows, taken as a line through the recent ones.

    first: seconds of a further row over those of a pass of one, until passes of several sizes are known.
    """

    DECAY = 0.98  # of earlier passes with each new one
    FIRST_WEIGHT = 50.0  # what that counts for, in rows squared
    MOST = 2.0  # times what was expected: more is a disturbance

    def __init__(self, first: float):
        self._first = first
        self._n = self._rows = self._seconds = self._rows2 = self._both = 0.0  # decaying sums

    def measure(self, rows: int, seconds: float) -> None:
        if self._n >= 3:
            expected = self._line(rows)
            seconds = min(seconds, self.MOST * expected) if expected > 0 else seconds
        sums = (self._n, self._rows, self._seconds, self._rows2, self._both)
        added = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._n, self._rows, self._seconds, self._rows2, self._both = (
            self.DECAY * old + new for old, new in zip(sums, added, strict=True)
        )

    @property
    def per_row(self) -> float:
        """Seconds of one more row; 0 before any pass."""
        if self._n == 0:
            return 0.0
        rows, seconds = self._rows / self._n, self._seconds / self._n
        first = self._first * seconds / (1 + self._first * (rows - 1))
        spread = max(0.0, self._rows2 - self._n * rows * rows)
        slope = (self._both - self._n * rows * seconds + self.FIRST_WEIGHT * first) / (spread + self.FIRST_WEIGHT)
        return max(slope, 0.1 * first)

    def seconds(self, rows: float) -> float:
        """Of a pass of so many rows; to be asked once a pass was measured."""
        return max(self._line(rows), self.per_row * rows)

    def _line(self, rows: float) -> float:
        return self._seconds / self._n + self.per_row * (rows - self._rows / self._n)
