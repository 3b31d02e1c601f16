"""Draft-length control: how many tokens a round should draft.

Timing steers depth and nothing else: which tokens come out does not depend on it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

from gemma_mtp.decoding.drafting import Confidence
from gemma_mtp.errors import SettingsError


class Choice(NamedTuple):
    """For a round: which of the proposals on offer to take, its depth, and the probability below which the source
    should end it before (DraftSource.propose)."""

    taken: int
    depth: int
    floor: float = 0.0


class DepthControl(Protocol):
    """Chooses the depth of each round and learns from what became of it."""

    def choose(self, offers: Sequence[Confidence], limit: int) -> Choice:
        """What the coming round does; its depth is 0..limit."""

    def update(
        self, confidence: Confidence | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        """Tells a round: tokens drafted and accepted, seconds of drafting and of the pass over 1 + drafted rows.

        confidence is that of the proposal taken, None when there was none on offer. Fewer tokens may have been drafted
        than were chosen.
        """

    def observe(self, confidence: Confidence, asked: int, accepted: int) -> None:
        """Tells of a proposal that was not taken: of its first `asked` tokens, `accepted` would have been kept."""


class FixedDepth:
    """Always the same depth, of the first source that has something to propose."""

    def __init__(self, depth: int):
        if depth < 0:
            raise SettingsError(f"The draft depth is {depth}: it must be 0 or more.")
        self._depth = depth

    def choose(self, offers: Sequence[Confidence], limit: int) -> Choice:
        return Choice(0, min(self._depth, limit))

    def update(
        self, confidence: Confidence | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        pass

    def observe(self, confidence: Confidence, asked: int, accepted: int) -> None:
        pass


class Acceptance:
    """Running acceptance at each depth: exponential averages that start from a prior.

    The prior of depth 1 is the estimate over all proposals (`parent`), that of depth i the estimate of depth i - 1, so
    one observation says something about every depth. What was seen of a depth fades while it is not tried, so that a
    bad start there is not held against it for good.
    """

    FIRST_PRIOR = 0.4
    PRIOR_WEIGHT = 2.0  # observations that the prior counts for
    DECAY = 0.98  # of past observations with each new one: a memory of about 50

    def __init__(self, depths: int, parent: "Acceptance | None" = None, prior_weight: float = PRIOR_WEIGHT):
        self._parent, self._prior_weight = parent, prior_weight
        self._hits = [0.0] * depths
        self._trials = [0.0] * depths

    def estimate(self, index: int, prior: float | None = None) -> float:
        """Acceptance at depth index + 1, given that of the depth before (the prior of depth 1 is known here)."""
        if prior is None:
            prior = self._parent.estimate(0) if self._parent is not None else self.FIRST_PRIOR
        return (self._hits[index] + self._prior_weight * prior) / (self._trials[index] + self._prior_weight)

    def observe(self, asked: int, accepted: int) -> None:
        """A round that `asked` tokens were wanted of: what the source left out is as good as rejected."""
        tried = min(accepted + 1, asked)
        for i in range(len(self._trials)):
            self._hits[i] = self.DECAY * self._hits[i] + (i < accepted)
            self._trials[i] = self.DECAY * self._trials[i] + (i < tried)
        if self._parent is not None:
            self._parent.observe(asked, accepted)


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

    def __init__(self, unknown: float = 0.0):
        """unknown: seconds to assume until there were enough tries."""
        self._unknown = unknown
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
        return self._average.get(source, self._unknown)


class AutoDepth:
    """Chooses the depth that is expected to finish the text soonest; depth 0 is a legal answer.

    With running acceptance a_1, a_2, ... a round of depth d yields E(d) = 1 + a_1 + a_1 a_2 + ... tokens for the
    seconds S(d) = C(1 + d) + drafting, where a source that ends drafts early counts with the share of d that it usually
    gives. (It is told to where one more token costs more than what it is likely to bring.) At the long-run rate r
    (tokens a second, at least that of plain decoding) those seconds are worth r S(d) tokens, and the best depth has the
    largest E(d) - r S(d): for a single kind of proposal that is the largest E/S, and E/S below that of plain decoding
    means no draft (the "utility" of Cascade, Saxena et al. 2025, arXiv 2506.20675). Proposals of different confidence
    share the rate and have acceptances of their own.

    What is not chosen is not observed, but for the proposals that cost nothing (DraftSource.free). So now and then a
    round does something else: drafts one token while drafting does not pay, or decodes plainly while it does. What that
    may lose is kept under PROBE_SHARE of all time plus a fixed allowance of half a plain pass.

    costs: seconds of a pass of T = 1, 2, ... rows; drafts are at most len(costs) - 1 tokens long.
    draft_seconds: of one token drafted by a source of which nothing is known yet.
    """

    PRIOR_WEIGHT = 4.0  # of an acceptance: a text is short, and a bad start would end drafting for most of it
    MARGIN = 0.04  # tokens a round: less is not worth a change of depth
    PROBE_SHARE = 0.01
    PROBE_CHARGE = 0.1  # plain passes that a probe in vain counts for at least: the cost curve is only an estimate
    PLAIN_AGE = 64  # rounds after which C(1) is measured again
    RATE_DECAY = 0.98

    def __init__(self, costs: Sequence[float], draft_seconds: float = 0.0):
        self._curve = CostCurve(costs)
        self._draft = DraftCost(draft_seconds)
        self._depths = len(costs) - 1
        self._overall: dict[str, Acceptance] = {}
        self._acceptance: dict[Confidence, Acceptance] = {}
        self._chosen: dict[Confidence, int] = {}
        self._given: dict[Confidence, float] = {}  # tokens drafted over those asked for, on the average
        self._asked = 0
        self._tokens = self._seconds = 0.0  # decaying sums: their ratio is the running rate
        self._total_seconds = 0.0
        self._lost_seconds = 0.0  # by probes
        self._probe_value: float | None = None  # tokens the coming round's best depth was expected to be worth

    def choose(self, offers: Sequence[Confidence], limit: int) -> Choice:
        limit = min(limit, self._depths)
        values = [self._values(offer, limit) for offer in offers]
        depths = [self._settled(offer, worth) for offer, worth in zip(offers, values, strict=True)]
        taken = max(range(len(offers)), key=lambda i: values[i][depths[i]])
        best = depths[taken]
        if best == 0:  # nothing pays: a probe goes to what is nearest to it
            taken = max(range(len(offers)), key=lambda i: values[i][min(1, limit)])
        probe = self._probe(offers[taken], values[taken], best)
        self._probe_value = values[taken][best] if probe != best else None
        self._asked = probe
        return Choice(taken, probe, self._price(offers[taken], probe) if probe else 0.0)

    def _price(self, offer: Confidence, depth: int) -> float:
        """Tokens that a token of a draft must be expected to bring: what it takes would do as well elsewhere."""
        of_pass = (self._curve.seconds[depth] - self._curve.seconds[0]) / depth
        return self._rate() * (of_pass + self._draft.seconds(offer.source))

    def _settled(self, offer: Confidence, values: list[float]) -> int:
        """The depth worth most, or the one chosen last time if that is nearly as good."""
        best = max(range(len(values)), key=values.__getitem__)
        if values[best] < values[0] + self.MARGIN:
            best = 0
        held = min(self._chosen.get(offer, 0), len(values) - 1)
        if held and best and values[best] < values[held] + self.MARGIN:
            best = held
        self._chosen[offer] = best
        return best

    def update(
        self, confidence: Confidence | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        if drafted <= self._depths:
            self._curve.measure(drafted, seconds_pass)
        asked, self._asked = max(self._asked, min(drafted, self._depths)), 0
        if confidence is not None and asked:
            steps = min(drafted + 1, asked)  # the one that ended a draft early took its time too
            self._draft.measure(confidence.source, min(seconds_draft / steps, self._curve.seconds[0]))
            self._of(confidence).observe(asked, min(accepted, self._depths))
            given = self._given.get(confidence, 1.0)
            self._given[confidence] = given + 0.05 * (min(drafted, asked) / asked - given)
        seconds = self._cost(confidence, min(drafted, self._depths))
        if self._probe_value is not None:
            value = 1 + accepted - self._rate() * seconds
            loss = (self._probe_value - value) / self._rate()  # negative for a probe that paid: it buys the next
            if not accepted:
                loss = max(loss, self.PROBE_CHARGE * self._curve.seconds[0])
            self._lost_seconds = max(0.0, self._lost_seconds + loss)
            self._probe_value = None
        self._tokens = self.RATE_DECAY * self._tokens + 1 + accepted
        self._seconds = self.RATE_DECAY * self._seconds + seconds
        self._total_seconds += seconds

    def observe(self, confidence: Confidence, asked: int, accepted: int) -> None:
        self._of(confidence).observe(min(asked, self._depths), min(accepted, self._depths))

    def _of(self, confidence: Confidence) -> Acceptance:
        if confidence not in self._acceptance:
            weight = self.PRIOR_WEIGHT
            overall = self._overall.setdefault(confidence.source, Acceptance(self._depths, prior_weight=weight))
            self._acceptance[confidence] = Acceptance(self._depths, overall, weight)
        return self._acceptance[confidence]

    def _cost(self, confidence: Confidence | None, depth: float) -> float:
        """Seconds of a round with a draft of so many tokens, a fraction being as far between two widths of the pass."""
        drafting = self._draft.seconds(confidence.source) if confidence else 0.0
        whole, seconds = int(depth), self._curve.seconds
        part = (depth - whole) * (seconds[whole + 1] - seconds[whole]) if depth > whole else 0.0
        return seconds[whole] + part + depth * drafting

    def _rate(self) -> float:
        plain = 1 / self._curve.seconds[0]
        return max(plain, self._tokens / self._seconds) if self._seconds > 0 else plain

    def _values(self, confidence: Confidence, limit: int) -> list[float]:
        """E(d) - r S(d) for d = 0..limit."""
        rate, acceptance, given = self._rate(), self._of(confidence), self._given.get(confidence, 1.0)
        tokens, run, each = 1.0, 1.0, None
        values = [tokens - rate * self._cost(confidence, 0)]
        for depth in range(1, limit + 1):
            each = acceptance.estimate(depth - 1, each)
            run *= each
            tokens += run
            values.append(tokens - rate * self._cost(confidence, given * depth))
        return values

    def _probe(self, confidence: Confidence, values: list[float], best: int) -> int:
        """The depth to try instead of the best one, or the best where nothing is to be learnt or paid for."""
        if len(values) == 1 or (best and self._curve.age[0] < self.PLAIN_AGE):
            return best
        other, plain = 0 if best else 1, self._curve.seconds[0]
        # Drafting one token in vain loses the whole difference in time; a plain round loses the expected gain.
        loss = self._cost(confidence, 1) - plain if other else (values[best] - values[0]) / self._rate()
        loss = max(loss, self.PROBE_CHARGE * plain)
        budget = self.PROBE_SHARE * self._total_seconds + 0.5 * plain
        return other if self._lost_seconds + loss <= budget else best
