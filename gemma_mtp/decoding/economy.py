"""What a round of drafting costs, in the tokens that its seconds would have given otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gemma_mtp.decoding.acceptance import DEPTHS, Experience
from gemma_mtp.decoding.costs import CostCurve, DraftCost, PassCost


class Experts(NamedTuple):
    """The experts in a pass. read: how many passes of 1, 2, ... rows read when their cost was measured, in all layers
    together; each: what one more costs, over a pass of one row."""

    read: Sequence[float]
    each: float


class CostShape(NamedTuple):
    """rows: C(T)/C(1) for T = 1, 2, ... rows. experts: None for a model without. prompt: what a token of a prompt, of
    which nothing is sampled, costs beside other rows, over C(1); None: as much as other rows do."""

    rows: Sequence[float]
    experts: Experts | None = None
    prompt: float | None = None

    @property
    def row(self) -> float:
        """What a further row costs over a pass of one, on the average."""
        return max(0.01, (self.rows[-1] - 1) / (len(self.rows) - 1))

    @property
    def prompt_row(self) -> float:
        return self.row if self.prompt is None else max(0.01, self.prompt)


GUESSED_SHAPE = CostShape([1 + 0.08 * row for row in range(1 + DEPTHS)])  # where memory is the limit


class Economy(Protocol):
    """Prices time for the depth control of a sequence.

    experience: what the drafts of other texts have taught. draft: seconds of a drafted token, by source.
    """

    experience: Experience
    draft: DraftCost

    @property
    def rate(self) -> float | None:
        """Tokens a second that time is worth; None before anything was timed."""

    @property
    def plain(self) -> float:
        """Seconds of a round without drafts; its share of a pass that sequences share. Asked once `rate` is known."""

    @property
    def plain_is_old(self) -> bool:
        """Whether it is long ago that a pass without drafts was measured."""

    def more(self, depth: int) -> float:
        """Seconds that a draft of so many tokens makes a pass longer."""

    def told(self, tokens: int, drafted: int, drafting: float, seconds_pass: float, experts: int) -> None:
        """Tells of a round of the sequence: the tokens it gave, how many were drafted in `drafting` seconds, as
        estimated, the seconds of the pass and the experts it read."""


class Alone:
    """A sequence that has its passes to itself: each width's seconds are known apart, and time is worth the sequence's
    own running rate, at least that of plain decoding.

    shape: from which the curve starts once a plain pass is timed; the longest draft is one shorter than it.

    Where there are experts the curve is of passes that read as many as those measured did. What a text's own further
    rows wake beside that is counted, and has its price.
    """

    PLAIN_AGE = 64  # rounds
    RATE_DECAY = 0.98
    NEWEST = 0.1  # weight of a pass in how many experts rows wake

    def __init__(self, shape: CostShape, experience: Experience | None = None, seconds: float | None = None):
        """seconds: of a plain pass, if that is known."""
        self.experience = experience or Experience()
        self.draft = DraftCost()
        self._shape = shape
        self._woken = 1.0  # experts that further rows read, over those that they read when their cost was measured
        self.curve = CostCurve([seconds * ratio for ratio in shape.rows]) if seconds else None
        self._tokens = self._seconds = 0.0  # decaying sums

    @property
    def rate(self) -> float | None:
        if self.curve is None:
            return None
        plain = 1 / self.plain
        return max(plain, self._tokens / self._seconds) if self._seconds else plain

    @property
    def plain(self) -> float:
        assert self.curve is not None
        return self.curve.seconds[0]

    @property
    def plain_is_old(self) -> bool:
        return self.curve is not None and self.curve.age[0] >= self.PLAIN_AGE

    def more(self, depth: int) -> float:
        assert self.curve is not None
        seconds = self.curve.seconds
        if depth >= len(seconds):
            return float("inf")
        more = seconds[depth] - seconds[0]
        if self._shape.experts:
            more += (self._woken - 1) * self._of_experts(self._shape.experts.read[depth] - self._shape.experts.read[0])
        return max(0.0, more)

    def _of_experts(self, count: float) -> float:
        """Seconds of reading so many experts."""
        return count * self._shape.experts.each * self.plain if self._shape.experts else 0.0

    def told(self, tokens: int, drafted: int, drafting: float, seconds_pass: float, experts: int) -> None:
        if self.curve is None:
            if drafted == 0:
                self.curve = CostCurve([seconds_pass * ratio for ratio in self._shape.rows])
            return
        drafted, beside = min(drafted, len(self.curve.seconds) - 1), 0.0
        if self._shape.experts:
            read = self._shape.experts.read
            beside = self._of_experts(experts - read[drafted])
            if read[drafted] > read[0]:
                self._woken += self.NEWEST * ((experts - read[0]) / (read[drafted] - read[0]) - self._woken)
        self.curve.measure(drafted, max(seconds_pass - beside, 0.1 * seconds_pass))
        seconds = self.curve.seconds[drafted] + beside + drafting
        self._tokens = self.RATE_DECAY * self._tokens + tokens
        self._seconds = self.RATE_DECAY * self._seconds + seconds


class Shared:
    """Sequences that share their passes.

    A drafted row makes the pass longer for everyone: it costs the tokens that all sequences together would give in that
    time. With few sequences a row is cheap, for a pass waits for the weights anyway; the fuller the machine, the nearer
    the price comes to one token, and drafting ends by itself.

    shape: tells what a further row costs until passes have. sequences: those that run. Some may still have prompts to
    run: a longer pass keeps these from their tokens as well.
    """

    DECAY = 0.98
    plain_is_old = False  # passes of all sizes are one line

    def __init__(self, shape: CostShape = GUESSED_SHAPE):
        self.experience = Experience()
        self.draft = DraftCost()
        self.cost = PassCost(shape.row)
        self.sequences = 1
        self._rounds = self._rows = self._tokens = self._drafting = 0.0  # decaying sums over sequences' rounds

    @property
    def rate(self) -> float | None:
        """Of the sequences there are now, each with the usual round. Prompts beside them do not lower it: their rows
        must be run at some time, and until then a row of a draft delays others as it would without them."""
        if self._rounds == 0:
            return None
        rounds = self.sequences / self._rounds
        return rounds * self._tokens / (self.cost.seconds(rounds * self._rows) + rounds * self._drafting)

    @property
    def plain(self) -> float:
        return self.cost.seconds(self.sequences) / self.sequences

    def more(self, depth: int) -> float:
        return self.cost.per_row * depth if depth <= DEPTHS else float("inf")

    def told(self, tokens: int, drafted: int, drafting: float, seconds_pass: float, experts: int) -> None:
        """Nothing: `measure` is told of whole passes."""

    def measure(self, sequences: int, rows: int, tokens: int, seconds_pass: float, seconds: float) -> None:
        """Tells a pass over decoding sequences alone: how many, its rows, the tokens it gave, its seconds without and
        with those of drafting."""
        self.cost.measure(rows, seconds_pass)
        sums = (self._rounds, self._rows, self._tokens, self._drafting)
        added = (sequences, rows, tokens, seconds - seconds_pass)
        self._rounds, self._rows, self._tokens, self._drafting = (
            self.DECAY * old + new for old, new in zip(sums, added, strict=True)
        )
