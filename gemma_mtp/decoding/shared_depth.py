"""Draft-length control for many sequences that share their passes.

A drafted row makes the pass longer for everyone, so it has a price: the tokens that all sequences together would give
in the seconds it takes. Each sequence drafts as long as a further token is expected to bring more than that. With few
sequences a row is cheap, for a pass waits for the weights anyway; the fuller the machine, the nearer the price comes to
one token, and drafting ends by itself. Like all timing, this steers depth and nothing else.
"""

from collections.abc import Sequence

from gemma_mtp.decoding.depth import Acceptance, Choice, DraftCost
from gemma_mtp.decoding.drafting import Confidence

DEPTHS = 8  # the most tokens a round drafts


class PassCost:
    """Seconds of a pass of T rows, taken as a line through the recent ones."""

    DECAY = 0.98  # of earlier passes with each new one
    FIRST_ROW = 0.15  # seconds of a further row over those of a pass of one, until passes of several sizes are known
    FIRST_WEIGHT = 50.0  # what that counts for, in rows squared
    MOST = 2.0  # times what was expected: more is a disturbance

    def __init__(self) -> None:
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
        first = self.FIRST_ROW * seconds / (1 + self.FIRST_ROW * (rows - 1))
        spread = max(0.0, self._rows2 - self._n * rows * rows)
        slope = (self._both - self._n * rows * seconds + self.FIRST_WEIGHT * first) / (spread + self.FIRST_WEIGHT)
        return max(slope, 0.1 * first)

    def seconds(self, rows: float) -> float:
        """Of a pass of so many rows; to be asked once a pass was measured."""
        return max(self._line(rows), self.per_row * rows)

    def _line(self, rows: float) -> float:
        return self._seconds / self._n + self.per_row * (rows - self._rows / self._n)


class SharedDepth:
    """What the depth controls of all sequences have in common: make theirs with `sequence`."""

    DECAY = 0.98

    def __init__(self) -> None:
        self.cost = PassCost()
        self.draft = DraftCost()
        self._overall: dict[str, Acceptance] = {}  # by source
        self._classes: dict[Confidence, Acceptance] = {}
        self.sequences = 1
        """Those that decode in the coming pass."""
        self._rounds = self._rows = self._tokens = self._drafting = 0.0  # decaying sums over sequences' rounds

    def sequence(self) -> "SequenceDepth":
        """The control of one sequence; implements DepthControl."""
        return SequenceDepth(self)

    def acceptance(self, confidence: Confidence) -> Acceptance:
        """A class's acceptance in all sequences, with its source's as the prior."""
        if confidence not in self._classes:
            overall = self._overall.setdefault(confidence.source, Acceptance(DEPTHS))
            self._classes[confidence] = Acceptance(DEPTHS, overall)
        return self._classes[confidence]

    def measure(self, sequences: int, rows: int, tokens: int, seconds_pass: float, seconds: float) -> None:
        """Tells a pass over decoding sequences alone: how many, its rows, the tokens it gave, its seconds without and
        with those of drafting."""
        self.cost.measure(rows, seconds_pass)
        sums = (self._rounds, self._rows, self._tokens, self._drafting)
        added = (sequences, rows, tokens, seconds - seconds_pass)
        self._rounds, self._rows, self._tokens, self._drafting = (
            self.DECAY * old + new for old, new in zip(sums, added, strict=True)
        )

    def price(self, source: str) -> float:
        """Tokens that drafting one more costs all sequences; 1, which nothing is worth, before any pass was timed.

        It is that of the sequences there are now, each with the usual round. Prompts beside them do not lower it: their
        rows must be run at some time, and until then a row of a draft delays others as it would without them.
        """
        if self._rounds == 0:
            return 1.0
        rounds = self.sequences / self._rounds
        rate = rounds * self._tokens / (self.cost.seconds(rounds * self._rows) + rounds * self._drafting)
        return rate * (self.cost.per_row + self.draft.seconds(source))


class SequenceDepth:
    """Chooses the depth of one sequence's rounds."""

    MARGIN = 0.02  # tokens a round: less is not worth a draft
    # A round that need not draft drafts a token now and then, to see whether it would be kept by now.
    PROBE_SHARE = 0.01  # of all tokens that this may cost
    PROBE_EVERY = 8  # rounds at the soonest

    def __init__(self, shared: SharedDepth):
        self._shared = shared
        self._acceptance: dict[Confidence, Acceptance] = {}
        self._plain_rounds = self._asked = 0

    def choose(self, offers: Sequence[Confidence], limit: int) -> Choice:
        best = [self._best(offer, min(limit, DEPTHS)) for offer in offers]
        taken = max(range(len(offers)), key=lambda i: best[i])
        gain, depth = best[taken]
        if gain < self.MARGIN:
            self._plain_rounds += 1
            dear = self._shared.price(offers[taken].source) / self.PROBE_SHARE
            depth = 1 if limit > 0 and self._plain_rounds >= max(dear, self.PROBE_EVERY) else 0
        if depth:
            self._plain_rounds = 0
        self._asked = depth
        return Choice(taken, depth, self._shared.price(offers[taken].source) if gain >= self.MARGIN else 0.0)

    def update(
        self, confidence: Confidence | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        asked, self._asked = max(self._asked, min(drafted, DEPTHS)), 0
        if confidence is None or not asked:
            return
        self._shared.draft.measure(confidence.source, seconds_draft / min(drafted + 1, asked))
        self._of(confidence).observe(asked, min(accepted, DEPTHS))

    def observe(self, confidence: Confidence, asked: int, accepted: int) -> None:
        self._of(confidence).observe(min(asked, DEPTHS), min(accepted, DEPTHS))

    def _best(self, offer: Confidence, limit: int) -> tuple[float, int]:
        """The most that drafting can gain over not drafting, in tokens, and the depth that does."""
        price, acceptance = self._shared.price(offer.source), self._of(offer)
        gain, run, each = 0.0, 1.0, None
        for depth in range(limit):
            each = acceptance.estimate(depth, each)
            run *= each
            if run <= price:  # and so is every token after it
                return gain, depth
            gain += run - price
        return gain, limit

    def _of(self, confidence: Confidence) -> Acceptance:
        if confidence not in self._acceptance:
            self._acceptance[confidence] = Acceptance(DEPTHS, self._shared.acceptance(confidence))
        return self._acceptance[confidence]
