"""The draft-verify loop: the tokens of plain decoding, several a pass where drafts are right.

Each round a draft source proposes tokens, one pass of the target runs over the last token and the drafts, and every row
of it samples the token that follows. The drafts are kept up to the first that differs from what the target sampled at
its place; the sample there is kept instead. A row's sample depends on the tokens before it and on its position alone,
so what is kept is what plain decoding would have given, whatever the source proposed ("drafter-invariant", Daliri,
Musco, Suresh 2024, arXiv 2408.07978). What to run and what to keep is decided in progress.py.
"""

from collections.abc import Generator, Sequence
from typing import Protocol, TypeVar

from gemma_mtp.decoding.grammar import Masks
from gemma_mtp.decoding.progress import Piece, Progress, Rows
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


def draft_and_verify(target: Target[S], sequence: S, progress: Progress) -> Generator[Piece, None, None]:
    """Runs a generation on its sequence to the end and yields its pieces; `progress` tells what has come of it.

    Afterwards, however it ended, the sequence holds the prompt and all tokens but the last (and less of the prompt if
    it was interrupted there). An interrupt (Ctrl-C) while a piece is being made is raised once the pieces that have
    come are handed out.
    """
    try:
        try:
            while not progress.finish_reason:
                _run_pass(target, sequence, progress)
                yield from progress.pieces()
        except KeyboardInterrupt:
            progress.end()
            yield from progress.pieces()
            raise
        progress.end()
        yield from progress.pieces()
    finally:
        progress.finish_reason = progress.finish_reason or "cancelled"
        target.truncate(sequence, progress.length)


def _run_pass(target: Target[S], sequence: S, progress: Progress) -> None:
    before = progress.length
    wanted = progress.want()
    rows = target.step(sequence, *wanted[:2], progress.params, len(progress.prompt), *wanted[2:])
    progress.take(rows)
    if progress.length < before + len(wanted.tokens):  # not all drafts were kept
        target.truncate(sequence, progress.length)
