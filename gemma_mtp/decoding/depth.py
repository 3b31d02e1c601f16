"""Draft-length control: how many tokens a round should draft.

Timing steers depth and nothing else: which tokens come out does not depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gemma_mtp.decoding.acceptance import DEPTHS, Acceptance
from gemma_mtp.decoding.drafting import Draft, Ends, Offer
from gemma_mtp.decoding.economy import Economy
from gemma_mtp.errors import SettingsError


class Choice(NamedTuple):
    """For a round: which of the offers to take, its depth, and where its source should end it before."""

    taken: int
    depth: int
    ends: Ends | None = None


class Round(NamedTuple):
    """What became of a choice.

    source: of the offer taken, None when there was none. asked: the depth chosen. drafted: the tokens that the pass
    checked, right: how many of those made (one may have been left out) are what the target says. sureness: the
    source's, of each token made. Seconds of drafting and of the pass over 1 + drafted rows, and the experts that this
    read, in all layers together.
    """

    source: str | None
    asked: int
    drafted: int
    right: int
    seconds_draft: float
    seconds_pass: float
    sureness: Sequence[int] = ()
    experts: int = 0

    @property
    def accepted(self) -> int:
        return min(self.right, self.drafted)


class DepthControl(Protocol):
    """Chooses the depth of each round and learns from what became of it."""

    @property
    def longest(self) -> int:
        """Tokens of the longest draft that it chooses."""

    def choose(self, offers: Sequence[Offer], limit: int) -> Choice:
        """What the coming round does; its depth is 0..limit, and no more than a draft at hand has."""

    def update(self, done: Round) -> None:
        """Tells what became of it."""

    def observe(self, source: str, sureness: Sequence[int], right: int) -> None:
        """Tells of a draft not taken: how sure its source was of what is decided by now, and how many were right."""


class FixedDepth:
    """Always the same depth, of the first source that has something to propose."""

    def __init__(self, depth: int):
        if depth < 0:
            raise SettingsError(f"The draft depth is {depth}: it must be 0 or more.")
        self.longest = depth

    def choose(self, offers: Sequence[Offer], limit: int) -> Choice:
        return Choice(0, min(self.longest, limit))

    def update(self, done: Round) -> None:
        pass

    def observe(self, source: str, sureness: Sequence[int], right: int) -> None:
        pass


class _Plan(NamedTuple):
    """What a proposal is worth over not drafting, in tokens, and how it would be asked for."""

    gain: float
    depth: int
    ends: Ends | None = None


class AutoDepth:
    """Chooses what is expected to finish the text soonest; depth 0 is a legal answer.

    Of a draft of depth d, a_1 + a_1 a_2 + ... tokens are kept, where a_i is the acceptance at depth i. The seconds that
    it makes the round longer are worth the tokens that they would give otherwise (Economy). What is gained over what is
    lost must be positive ("utility" above 1 in Cascade, Saxena et al. 2025, arXiv 2506.20675), and the proposal and the
    depth that gain most are taken.

    A source says of each token how sure it is, and how often tokens of that sureness come true is learnt. Of a draft at
    hand (Offer) the best length follows at once. A source that has to be asked decides for itself, token by token, by
    what tokens were worth so far (Ends): it is asked for the longest draft.

    What is not chosen is not observed, but for drafts that cost nothing. So now and then a
    round does something else: drafts while that does not pay, or decodes plainly where the cost of that was last
    measured long ago. What that may lose is kept under PROBE_SHARE of all tokens, plus a fixed allowance.

    Thinking takes time too, which tells where passes are short: a gain must pay for it, and after a round that does not
    draft, none is thought about for as long as keeps it under OWN_SHARE of the passes.
    """

    longest = DEPTHS
    MARGIN = 0.05  # tokens a round: less is not worth a draft, for costs and acceptance are but estimates
    HOLD = 0.04  # tokens a round: less is not worth a change of depth
    PROBE_EVERY = 8  # rounds at the soonest
    PROBE_SHARE = 0.01
    PROBE_ALLOWANCE = 0.5  # tokens
    PROBE_CHARGE = 0.1  # tokens that a probe in vain counts for at least: costs are only estimates
    FURTHER_DECAY = 0.95
    OWN_SHARE = 0.02
    OWN_DECAY = 0.9  # with each round that is thought about
    IDLE_MOST = 32  # rounds

    def __init__(self, economy: Economy):
        self._economy = economy
        self._acceptance: dict[str, Acceptance] = {}
        self._further: dict[str, float] = {}  # what tokens after the first add, on the average
        self._chosen: dict[str, int] = {}  # of the sources with drafts at hand
        self._plan = _Plan(0.0, 0)  # of the coming round
        self._probing = False
        self._plain_rounds = self.PROBE_EVERY  # since the last draft
        self._tokens = 0
        self._lost = 0.0  # tokens, by probes
        self._own = 0.0  # seconds that thinking about a round takes
        self._thought = 0.0  # seconds that it took before the coming one
        self._idle = 0  # rounds to come that are not thought about

    def choose(self, offers: Sequence[Offer], limit: int) -> Choice:
        self._plan, self._probing, self._thought = _Plan(0.0, 0), False, 0.0
        if self._idle:
            self._idle -= 1
            self._plain_rounds += 1
            return Choice(0, 0)
        start = time.perf_counter()
        choice = self._choice(offers, min(limit, DEPTHS))
        self._thought = time.perf_counter() - start
        return choice

    def update(self, done: Round) -> None:
        self._tokens += 1 + done.accepted
        if not self._thought and self._economy.rate is not None:
            return
        start = time.perf_counter()
        self._take_in(done)
        seconds = self._thought + time.perf_counter() - start
        self._own += (1 - self.OWN_DECAY) * (seconds - self._own) if self._own else seconds
        if not done.asked and self._economy.rate is not None:
            self._idle = min(int(self._own / (self.OWN_SHARE * self._economy.plain)), self.IDLE_MOST)

    def _choice(self, offers: Sequence[Offer], limit: int) -> Choice:
        rate = self._economy.rate
        if rate is None or limit < 1:
            return Choice(0, 0)
        plans = [
            self._of_source(offer.source, limit, rate)
            if offer.draft is None
            else self._at_hand(offer.source, offer.draft, limit, rate)
            for offer in offers
        ]
        taken = max(range(len(offers)), key=lambda i: plans[i].gain)
        plan = plans[taken]
        budget = self.PROBE_SHARE * self._tokens + self.PROBE_ALLOWANCE - self._lost
        if plan.gain < self.MARGIN + rate * self._own:
            asking = self._economy.draft.seconds(offers[taken].source) if offers[taken].draft is None else 0.0
            price = rate * (self._economy.more(1) + asking)
            self._probing = self._plain_rounds >= self.PROBE_EVERY and max(price, self.PROBE_CHARGE) <= budget
            plan = plan._replace(depth=1 if self._probing else 0)
        elif self._economy.plain_is_old and max(plan.gain, self.PROBE_CHARGE) <= budget:
            self._lost += plan.gain
            plan = plan._replace(depth=0)
        self._plan, self._plain_rounds = plan, 0 if plan.depth else self._plain_rounds + 1
        return Choice(taken, plan.depth, plan.ends if plan.depth else None)

    def _take_in(self, done: Round) -> None:
        economy, drafting = self._economy, 0.0
        if done.source is not None and done.asked:
            if (ends := self._plan.ends) is not None and done.sureness:
                economy.draft.measure(done.source, done.seconds_draft / len(done.sureness))
                drafting = len(done.sureness) * economy.draft.seconds(done.source)
                self._learn_further(done.source, ends, done, drafting)
            self._of(done.source).observe(done.sureness, done.right)
        rate = economy.rate
        if self._probing and rate is not None and done.asked:
            loss = rate * (economy.more(done.drafted) + drafting) - done.accepted
            if not done.accepted and done.drafted:
                loss = max(loss, self.PROBE_CHARGE)
            self._lost = max(0.0, self._lost + loss)  # one that paid buys the next
        economy.told(1 + done.accepted, done.drafted, drafting, done.seconds_pass, done.experts)

    def observe(self, source: str, sureness: Sequence[int], right: int) -> None:
        if self._thought:
            self._of(source).observe(sureness, right)

    def _at_hand(self, source: str, draft: Draft, limit: int, rate: float) -> _Plan:
        """The length of a draft that gains most, or the one chosen last time if that is nearly as good."""
        acceptance, gains, tokens, together = self._of(source), [0.0], 0.0, 1.0
        for depth, level in enumerate(draft.sureness[: min(limit, len(draft.tokens))]):
            together *= acceptance.estimate(depth, level)
            tokens += together
            gains.append(tokens - rate * self._economy.more(depth + 1))
            if together < self.MARGIN:
                break  # what follows is hardly ever kept
        best = max(range(len(gains)), key=gains.__getitem__)
        held = min(self._chosen.get(source, 0), len(gains) - 1)
        if held and gains[held] > self.MARGIN and gains[best] < gains[held] + self.HOLD:
            best = held
        self._chosen[source] = best
        return _Plan(gains[best] if best else gains[1], best)

    def _of_source(self, source: str, limit: int, rate: float) -> _Plan:
        """What to ask a source for."""
        acceptance, step = self._of(source), rate * self._economy.draft.seconds(source)
        bars = self._bars(limit, rate)
        table, mean = acceptance.table()[:limit], max(acceptance.mean(), 0.05)
        worth = zip(acceptance.first, table[0].tolist(), strict=True)
        first = sum(share * (chance - bars[0]) for share, chance in worth if chance > bars[0])
        go_on = [0.0, *((bar + step) / mean for bar in bars[1:])]
        ends = Ends(table, np.array(bars, np.float32), np.array(go_on, np.float32))
        return _Plan(first - step + self._further.get(source, 0.0), limit, ends)

    def _bars(self, limit: int, rate: float) -> list[float]:
        """Tokens that a further row costs at each depth, or a row of as many as are cheapest together: where the third
        costs nothing, the second may be worth its price for it."""
        more = [self._economy.more(depth) for depth in range(limit + 1)]
        bars: list[float] = []
        runs: list[tuple[float, int]] = []  # of the depths so far: seconds a row, and rows
        for depth in range(limit, 0, -1):
            seconds, rows = more[depth] - more[depth - 1], 1
            while runs and runs[-1][0] < seconds:
                of_run, length = runs.pop()
                seconds, rows = (seconds * rows + of_run * length) / (rows + length), rows + length
            runs.append((seconds, rows))
            bars.append(rate * seconds)
        return bars[::-1]

    def _learn_further(self, source: str, ends: Ends, done: Round, drafting: float) -> None:
        """What later tokens of a draft that was asked for added: what was expected of them, rather than what came true,
        for that says the same with less noise."""
        rate = self._economy.rate
        assert rate is not None, "nothing is asked for before anything was timed"
        together, expected, bar = 1.0, 0.0, float(ends.keep[0])
        for depth, level in enumerate(done.sureness[: done.drafted]):
            together *= float(ends.acceptance[depth, level])
            expected += together
        first = max(0.0, float(ends.acceptance[0, done.sureness[0]]) - bar) - rate * drafting / len(done.sureness)
        gain = expected - rate * (self._economy.more(done.drafted) + drafting)
        before = self._further.get(source, 0.0)
        self._further[source] = before + (1 - self.FURTHER_DECAY) * (gain - first - before)

    def _of(self, source: str) -> Acceptance:
        if source not in self._acceptance:
            self._acceptance[source] = Acceptance(parent=self._economy.experience.of(source))
        return self._acceptance[source]
