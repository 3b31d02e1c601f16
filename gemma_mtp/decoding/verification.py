"""The draft-verify loop: the tokens of plain decoding, several a pass where drafts are right.

Each round a draft source proposes tokens, one pass of the target runs over the last token and the drafts, and every row
of it samples the token that follows. The drafts are kept up to the first that differs from what the target sampled at
its place; the sample there is kept instead. A row's sample depends on the tokens before it and on its position alone,
so what is kept is what plain decoding would have given, whatever the source proposed ("drafter-invariant", Daliri,
Musco, Suresh 2024, arXiv 2408.07978).
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from gemma_mtp.decoding.depth import DepthControl
from gemma_mtp.decoding.drafting import DraftSource
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.stopping import StopStrings
from gemma_mtp.errors import PromptError

FinishReason = Literal["stop", "length", "cancelled"]
Origin = Literal["target", "draft"]
S = TypeVar("S", contravariant=True)

PROMPT_CHUNK = 512  # tokens a pass of the prompt; between passes a generation can be cancelled


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position: of the chosen token, and of the likeliest as (token, logprob), best first."""

    chosen: float
    top: list[tuple[int, float]]


class Rows(NamedTuple):
    """What the sampled rows of a pass gave."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None  # None unless the settings ask for them


class Target(Protocol[S]):
    """The model that decides, as the loop sees it. S is its handle of one sequence and that sequence's KV cache."""

    def step(self, sequence: S, tokens: Sequence[int], rows: int, params: SamplingParams) -> Rows:
        """Appends `tokens` to the sequence in one pass, and samples what follows each of the last `rows` of them.

        The row of the token at index i of the sequence samples index i + 1: that is the position its noise is drawn
        for, and the tokens 0..i are what the repetition penalty has seen.
        """

    def truncate(self, sequence: S, length: int) -> None:
        """Forgets the tokens of the sequence from index `length` on."""


class TextStream(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty inside a character."""

    def flush(self) -> str:
        """What is left, when no more tokens come."""


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


class Decoding(Generic[S]):
    """One generation: iterate it for its pieces; tokens, stats and finish_reason tell what has come of it so far.

    Afterwards, however it ended, the sequence holds the prompt and all tokens but the last (and less of the prompt if
    it was interrupted there).

    sequence: holds the first `cached` tokens of the prompt already (fewer than all of it).
    sources, depth: what drafts, and the choice of source and length each round; without them decoding is plain.
    context: the most tokens the sequence may hold. eos_ids: the model's own end tokens.

    A stop or end token is the last of `tokens` and adds no text. The token that completes a stop string is kept, the
    text ends before the string. An interrupt (Ctrl-C) while a piece is being made ends the generation as 'cancelled'.
    """

    def __init__(
        self,
        target: Target[S],
        sequence: S,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        text: TextStream,
        context: int,
        sources: Sequence[DraftSource] = (),
        depth: DepthControl | None = None,
        eos_ids: Collection[int] = (),
        cached: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not prompt:
            raise PromptError("The prompt holds no tokens: give at least one.")
        if len(prompt) > context:
            raise PromptError(f"The prompt has {len(prompt)} tokens, more than the context of {context}: shorten it.")
        self.tokens: list[int] = []
        self.stats = Stats(prompt_tokens=len(prompt))
        self.finish_reason: FinishReason | None = None
        self._target, self._sequence, self._prompt, self._params = target, sequence, prompt, params
        self._text, self._context = text, context
        self._sources = sources if depth is not None else ()
        self._depth = depth
        self._stop_ids = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
        self._stop_strings = StopStrings(params.stop)
        self._cached = cached
        self._clock = clock
        self._pieces: list[Piece] = []  # made but not yet handed out

    @property
    def length(self) -> int:
        """Tokens of the sequence that are decided and in its cache."""
        return len(self._prompt) + len(self.tokens) - 1 if self.tokens else self._cached

    def __iter__(self) -> Iterator[Piece]:
        try:
            try:
                self._run_prompt()
                while True:
                    yield from self._hand_out()
                    if self.finish_reason:
                        break
                    self._run_round()
            except KeyboardInterrupt:
                self.finish_reason = "cancelled"
            self._add_rest_of_text()
            yield from self._hand_out()
        finally:
            self.finish_reason = self.finish_reason or "cancelled"
            self._target.truncate(self._sequence, self.length)

    def _hand_out(self) -> Iterator[Piece]:
        while self._pieces:
            yield self._pieces.pop(0)

    def _run_prompt(self) -> None:
        """Runs the prompt in chunks; the last chunk's last row samples the first token."""
        start = self._clock()
        for source in self._sources:
            source.advance(self._prompt)
        while self._cached + PROMPT_CHUNK < len(self._prompt):
            chunk = self._prompt[self._cached : self._cached + PROMPT_CHUNK]
            self._target.step(self._sequence, chunk, 0, self._params)
            self._cached += len(chunk)
        rows = self._target.step(self._sequence, self._prompt[self._cached :], 1, self._params)
        self._keep(rows, accepted=0)
        self.stats.seconds_prompt = self._clock() - start

    def _run_round(self) -> None:
        start = self._clock()
        drafts: list[int] = []
        confidence = None
        # The last token wanted needs no draft after it, and the pass must fit the context.
        room = min(self._params.max_tokens - len(self.tokens), self._context - self.length) - 1
        offers = [(source, offer) for source in self._sources if (offer := source.confidence) is not None]
        if offers and room > 0 and self._depth is not None:
            taken, depth = self._depth.choose([offer for _, offer in offers], room)
            source, confidence = offers[taken]
            drafts = source.propose(depth) if depth else []
        drafted = self._clock()
        rows = self._target.step(self._sequence, [self.tokens[-1], *drafts], 1 + len(drafts), self._params)
        verified = self._clock()
        accepted = accept(drafts, rows.tokens)
        kept = self._keep(rows, accepted)
        if accepted < len(drafts):
            self._target.truncate(self._sequence, self.length)
        if self._depth is not None:
            self._depth.update(confidence, len(drafts), accepted, drafted - start, verified - drafted)
        self.stats.count_round(len(drafts), min(accepted, kept), self._clock() - start)

    def _keep(self, rows: Rows, accepted: int) -> int:
        """Takes the accepted drafts and the sample after them, up to where the text ends; returns how many it took."""
        samples, logprobs = rows.tokens[: accepted + 1], rows.logprobs
        taken, texts = 0, []
        for token in samples:
            taken += 1
            texts.append(self._take(token))
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

    def _take(self, token: int) -> str:
        """Appends one token, decides whether it is the last, and returns the text it releases."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return ""
        text = self._stop_strings.push(self._text.push(token))
        if self._stop_strings.found:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._params.max_tokens or self.length >= self._context:
            self.finish_reason = "length"
        return text

    def _add_rest_of_text(self) -> None:
        """Releases what the text stream and the stop strings hold back, unless a stop string ended the text."""
        if self._stop_strings.found:
            return
        rest = self._stop_strings.push(self._text.flush())
        if not self._stop_strings.found:
            rest += self._stop_strings.flush()
        if rest:
            self._pieces.append(Piece(rest, [], "target", [] if self._params.logprobs else None))
