"""One generation as a state machine: what it wants run next, and what it makes of what that gave.

Whoever drives it runs the passes: a loop over one sequence (verification.py), or a scheduler over many.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from gemma_mtp.decoding.depth import DepthControl, Round
from gemma_mtp.decoding.drafting import NOTHING, Draft, DraftSource, Offer
from gemma_mtp.decoding.grammar import Constraint, Masks
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.stopping import StopStrings
from gemma_mtp.errors import PromptError

FinishReason = Literal["stop", "length", "cancelled"]
Origin = Literal["target", "draft"]

PROMPT_CHUNK = 512  # tokens a pass of the prompt; between passes a generation can be cancelled
SCORED_CHUNK = 64  # the same where each of them gives log probabilities
FORCED = 15  # tokens that a round takes from a constraint: the fewest drafts that an engine takes in one


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position: of the chosen token, and of the likeliest as (token, logprob), best first."""

    chosen: float
    top: list[tuple[int, float]]


class Rows(NamedTuple):
    """What the sampled rows of a pass gave. experts: how many the whole pass read, in all layers together, if the model
    has any and its engine counts them."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None  # None unless the settings ask for them
    experts: int = 0


class Wanted(NamedTuple):
    """What a sequence wants of the next pass: to append `tokens`, and sample what follows each of the last `rows`.

    scored: what does follow the first of these rows, where the prompt says so and its log probabilities are asked for.
    allowed: what may be sampled, for the last of these rows (all but those scored); None: any token.
    """

    tokens: Sequence[int]
    rows: int
    scored: Sequence[int] = ()
    allowed: Masks | None = None


class TextStream(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty inside a character."""

    def flush(self) -> str:
        """What is left, when no more tokens come."""

    @property
    def ended(self) -> bool:
        """Whether it wants no more tokens."""


class Piece(NamedTuple):
    """A part of the output: neighbouring tokens of one origin and the text they released."""

    text: str
    tokens: list[int]
    origin: Origin
    logprobs: list[TokenLogprobs] | None = None


def accept(drafted: Sequence[int], sampled: Sequence[int]) -> int:
    """How many drafts to keep: those before the first that differs from the target's sample at its place.

    sampled[i] is what the target sampled where drafted[i] was proposed.
    """
    kept = 0
    for draft, sample in zip(drafted, sampled, strict=False):
        if draft != sample:
            break
        kept += 1
    return kept


def check_prompt(prompt: Sequence[int], context: int) -> None:
    """Raises PromptError for a prompt without tokens, or with more than the context holds."""
    if not prompt:
        raise PromptError("The prompt holds no tokens: give at least one.")
    check_length(len(prompt), context)


def check_length(tokens: int, context: int, about: str = "") -> None:
    """Raises PromptError for more tokens than the context holds. about: put before their number."""
    if tokens > context:
        length = f"The prompt has {about}{tokens} tokens, more than the context of {context}"
        raise PromptError(f"{length}: shorten it, or raise the context.")


class Progress:
    """How far a generation has come. Until `finish_reason` is set, a driver repeats: `want`, a pass, `take`, and
    cutting the sequence to `length`; then `end`. `pieces` hands out those that are ready, at any time.

    cached: how many tokens of the prompt the sequence holds already (fewer than all of it).
    sources, depth: what drafts, and the choice of source and length each round; without them decoding is plain.
    constraint: what is allowed; tokens that it forces are drafted before anything else is, unless decoding is plain.
    context: the most tokens the sequence may hold. eos_ids: the model's own end tokens.

    A stop or end token is the last of `tokens` and adds no text. The token that completes a stop string is kept, the
    text ends before the string.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        text: TextStream,
        context: int,
        sources: Sequence[DraftSource] = (),
        depth: DepthControl | None = None,
        constraint: Constraint | None = None,
        eos_ids: Collection[int] = (),
        cached: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_prompt(prompt, context)
        self.tokens: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens but the first, where the settings ask for them."""
        self.stats = Stats(prompt_tokens=len(prompt))
        self.finish_reason: FinishReason | None = None
        self.prompt, self.params = prompt, params
        self._text, self._context = text, context
        self._sources = sources if depth is not None else ()
        self._depth, self._constraint = depth, constraint
        self._stop_ids = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
        self._stop_strings = StopStrings(params.stop)
        self._to_run = prompt  # before the next round
        self._ran = False  # whether it has been
        self._cached = cached  # how much of it the sequence holds
        self._clock = clock
        self._pieces: list[Piece] = []  # made but not yet handed out
        self._wanted: Wanted | None = None
        self._source: str | None = None  # of the draft in the coming pass
        self._asked = 0  # the depth chosen for it
        self._draft = NOTHING  # what it is
        self._beside: list[tuple[str, Draft]] = []  # drafts that are not in it
        self._forced = False  # whether its drafts are what the constraint forces
        self._started: float | None = None  # when the prompt, and then the round, began
        self._drafted = 0.0  # when the round's drafts were there

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop_strings.found

    @property
    def length(self) -> int:
        """Tokens of the sequence that are decided and in its cache."""
        return len(self.prompt) + len(self.tokens) - 1 if self._ran and self.tokens else self._cached

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt, or of what is resumed, that no pass has run over yet."""
        return 0 if self._ran else len(self._to_run) - self._cached

    @property
    def to_run(self) -> Sequence[int]:
        """What passes run before the next round: the prompt, or what is resumed."""
        return self._to_run

    def rewind(self) -> None:
        """The sequence was given up: a new one has to run everything again. What was generated stays."""
        if self.tokens:
            self._to_run = [*self.prompt, *self.tokens[:-1]]
        else:
            self.prompt_logprobs.clear()
        self._ran, self._cached = False, 0

    def draft_from(self, sources: Sequence[DraftSource]) -> None:
        """Sources for a new sequence, which know nothing yet. Without a depth control they are not asked."""
        self._sources = sources if self._depth is not None else ()
        if self._started is not None:  # otherwise they are told with the first chunk
            for source in self._sources:
                source.advance(self._to_run)

    def skip(self, cached: int) -> None:
        """The sequence holds the first `cached` of `to_run` already (fewer than all), and nothing else."""
        self._cached = cached
        if not self.stats.preemptions:
            self.stats.cached_tokens = cached

    def want(self, most: int = PROMPT_CHUNK) -> Wanted:
        """What to run next, of at most `most` tokens: a chunk of the prompt, or the last token and drafts after it."""
        self._wanted = self._want_round(most) if self._ran else self._want_prompt(most)
        return self._wanted

    def take(self, rows: Rows) -> None:
        """Takes in what the pass over the last `want` gave."""
        assert self._wanted is not None, "a pass gives what was wanted before"
        wanted, self._wanted = self._wanted, None
        if self._ran:
            self._take_round(wanted.tokens[1:], rows)
        else:
            self._take_prompt(wanted, rows)

    def end(self) -> None:
        """Ends the generation, as 'cancelled' if it had not ended by itself, and releases the text still held back."""
        self.finish_reason = self.finish_reason or "cancelled"
        if self._stop_strings.found:
            return
        rest = self._stop_strings.push(self._text.flush())
        if not self._stop_strings.found:
            rest += self._stop_strings.flush()
        if rest:
            self._pieces.append(Piece(rest, [], "target", [] if self.params.logprobs else None))

    def pieces(self) -> Iterator[Piece]:
        """Hands out the pieces that are ready."""
        while self._pieces:
            yield self._pieces.pop(0)

    def _want_prompt(self, most: int) -> Wanted:
        if self._started is None:
            self._started = self._clock()
            for source in self._sources:
                source.advance(self.prompt)
        scoring = self.params.prompt_logprobs and not self.tokens
        if scoring:
            most = min(most, SCORED_CHUNK)
        end = min(self._cached + most, len(self._to_run))
        chunk = self._to_run[self._cached : end]
        last = end == len(self._to_run)
        # What is resumed ends in a sample that is known.
        allowed = self._constraint.allow([])[1] if self._constraint and last and not self.tokens else None
        if scoring:
            return Wanted(chunk, len(chunk), self._to_run[self._cached + 1 : end + 1], allowed)
        return Wanted(chunk, 1 if last else 0, allowed=allowed)

    def _take_prompt(self, wanted: Wanted, rows: Rows) -> None:
        scored = len(wanted.scored)
        if rows.logprobs is not None:
            self.prompt_logprobs += rows.logprobs[:scored]
            rows = Rows(rows.tokens[scored:], rows.logprobs[scored:])
        if self.prompt_left > len(wanted.tokens):
            self._cached += len(wanted.tokens)
            return
        self._ran = True
        if self.tokens:  # resumed: this sample is known, but a drafter needs what the pass left
            for source in self._sources:
                source.advance(self.tokens[-1:])
            return
        self.stats.seconds_prompt = self._clock() - self._started  # type: ignore[operator]
        if self.params.max_tokens:
            self._keep(rows, accepted=0)
        else:
            self._cached += len(wanted.tokens)
            self.finish_reason = "length"

    def _want_round(self, most: int) -> Wanted:
        self._started = self._clock()
        drafts: list[int] = []
        allowed = None
        self._source, self._asked, self._draft, self._beside, self._forced = None, 0, NOTHING, [], False
        # The last token wanted needs no draft after it, and the pass must fit the context.
        room = min(self.params.max_tokens - len(self.tokens), self._context - self.length, most) - 1
        if self._constraint and self._depth is not None and room > 0:
            drafts = self._constraint.forced(min(room, FORCED))
            self._forced = bool(drafts)
        if room > 0 and self._depth is not None and not self._forced:
            self._draft_round(self._depth, room)
            drafts = self._draft.tokens
        if self._constraint:
            drafts, allowed = self._constraint.allow(drafts)
        self._drafted = self._clock()
        return Wanted([self.tokens[-1], *drafts], 1 + len(drafts), allowed=allowed)

    def _draft_round(self, control: DepthControl, room: int) -> None:
        """Draws the round's draft, of at most `room` tokens, and keeps those at hand that are not taken."""
        offers: list[tuple[DraftSource, Offer]] = []
        for source in self._sources:
            draft = source.propose(min(room, control.longest)) if source.free else None
            if draft is None or draft.tokens:
                offers.append((source, Offer(source.name, draft)))
        if not offers:
            return
        choice = control.choose([offer for _, offer in offers], room)
        source, offer = offers[choice.taken]
        self._source = source.name
        if choice.depth:
            self._asked = choice.depth
            self._draft = offer.draft.cut(choice.depth) if offer.draft else source.propose(choice.depth, choice.ends)
        others = (one for one in offers if not (one[0] is source and choice.depth))
        self._beside = [(other.source, other.draft) for _, other in others if other.draft]

    def _take_round(self, drafts: Sequence[int], rows: Rows) -> None:
        assert self._started is not None
        verified = self._clock()
        accepted = accept(drafts, rows.tokens)
        kept = self._keep(rows, accepted)
        if self._depth is not None and not self._forced:  # what is certain says nothing of the sources
            done = Round(
                self._source,
                self._asked,
                len(drafts),
                accept(self._draft.made, rows.tokens),
                self._drafted - self._started,
                verified - self._drafted,
                self._draft.sureness,
                rows.experts,
            )
            self._depth.update(done)
            for name, draft in self._beside:
                told = draft.sureness[:kept]
                self._depth.observe(name, told, accept(draft.tokens[: len(told)], rows.tokens))
        self.stats.count_round(len(drafts), min(accepted, kept), self._clock() - self._started)

    def _keep(self, rows: Rows, accepted: int) -> int:
        """Takes the accepted drafts and the sample after them, up to where the text ends; returns how many it took."""
        samples, logprobs = rows.tokens[: accepted + 1], rows.logprobs
        taken, texts = 0, []
        for token in samples:
            taken += 1
            texts.append(self._append(token))
            if self.finish_reason:
                break
        for source in self._sources:
            source.advance(samples[:taken])
        parts: list[tuple[int, int, Origin]] = [(0, min(taken, accepted), "draft"), (accepted, taken, "target")]
        for begin, end, origin in parts:
            if begin < end:
                of_piece = logprobs[begin:end] if logprobs is not None else None
                self._pieces.append(Piece("".join(texts[begin:end]), samples[begin:end], origin, of_piece))
        self.stats.tokens = len(self.tokens)
        return taken

    def _append(self, token: int) -> str:
        """Appends one token, decides whether it is the last, and returns the text it releases."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return ""
        if self._constraint:
            self._constraint.advance(token)
        text = self._stop_strings.push(self._text.push(token))
        if self._stop_strings.found or self._text.ended or (self._constraint and self._constraint.ended):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens or self.length >= self._context:
            self.finish_reason = "length"
        return text
