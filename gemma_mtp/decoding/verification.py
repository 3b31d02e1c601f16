"""The draft-verify loop: the tokens of plain decoding, several a pass where drafts are right.

Each round a draft source proposes tokens, one pass of the target runs over the last token and the drafts, and every row
of it samples the token that follows. The drafts are kept up to the first that differs from what the target sampled at
its place; the sample there is kept instead. A row's sample depends on the tokens before it and on its position alone,
so what is kept is what plain decoding would have given, whatever the source proposed ("drafter-invariant", Daliri,
Musco, Suresh 2024, arXiv 2408.07978). What to run and what to keep is decided in progress.py.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from gemma_mtp.decoding.depth import DepthControl
from gemma_mtp.decoding.drafting import DraftSource
from gemma_mtp.decoding.grammar import Constraint, Masks
from gemma_mtp.decoding.progress import FinishReason, Piece, Progress, Rows, TextStream
from gemma_mtp.decoding.sampling import SamplingParams

S = TypeVar("S", contravariant=True)


class Target(Protocol[S]):
    """The model that decides, as the loop sees it. S is its handle of one sequence and that sequence's KV cache."""

    def step(
        self,
        sequence: S,
        tokens: Sequence[int],
        rows: int,
        params: SamplingParams,
        prompt: int = 0,
        scored: Sequence[int] = (),
        allowed: Masks | None = None,
    ) -> Rows:
        """Appends `tokens` to the sequence in one pass, and samples what follows each of the last `rows` of them.

        The row of the token at index i of the sequence samples index i + 1: that is the position its noise is drawn
        for, and the tokens 0..i are what the repetition penalty has seen; what was generated, which the presence and
        frequency penalties count, begins at index `prompt`. The first rows give the log probabilities of the tokens
        `scored` instead of those of their samples; the settings must ask for log probabilities then. Of the last rows,
        as many as `allowed` has, each samples only what that allows.
        """

    def truncate(self, sequence: S, length: int) -> None:
        """Forgets the tokens of the sequence from index `length` on."""


class Decoding(Generic[S]):
    """One generation: iterate it for its pieces; tokens, stats and finish_reason tell what has come of it so far.

    Afterwards, however it ended, the sequence holds the prompt and all tokens but the last (and less of the prompt if
    it was interrupted there). The settings are those of Progress. An interrupt (Ctrl-C) while a piece is being made
    is raised once the pieces that have come are handed out.
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
        constraint: Constraint | None = None,
        eos_ids: Collection[int] = (),
        cached: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._target, self._sequence, self._params = target, sequence, params
        self._prompt = len(prompt)
        self._progress = Progress(
            prompt,
            params,
            text=text,
            context=context,
            sources=sources,
            depth=depth,
            constraint=constraint,
            eos_ids=eos_ids,
            cached=cached,
            clock=clock,
        )
        self.tokens, self.prompt_logprobs = self._progress.tokens, self._progress.prompt_logprobs
        self.stats = self._progress.stats

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._progress.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._progress.stop_string

    @property
    def length(self) -> int:
        """Tokens of the sequence that are decided and in its cache."""
        return self._progress.length

    def __iter__(self) -> Iterator[Piece]:
        progress = self._progress
        try:
            try:
                while not progress.finish_reason:
                    self._run_pass()
                    yield from self._hand_out()
            except KeyboardInterrupt:
                progress.end()
                yield from self._hand_out()
                raise
            progress.end()
            yield from self._hand_out()
        finally:
            progress.finish_reason = progress.finish_reason or "cancelled"
            self._target.truncate(self._sequence, self.length)

    def _hand_out(self) -> Iterator[Piece]:
        while (piece := self._progress.hand_out()) is not None:
            yield piece

    def _run_pass(self) -> None:
        before = self.length
        wanted = self._progress.want()
        rows = self._target.step(self._sequence, *wanted[:2], self._params, self._prompt, *wanted[2:])
        self._progress.take(rows)
        if self.length < before + len(wanted.tokens):  # not all drafts were kept
            self._target.truncate(self._sequence, self.length)
