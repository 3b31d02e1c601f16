"""Continuous batching: many generations share the passes of one engine, and join and leave at every pass.

A pass holds for each decoding sequence its last token and drafts after it, and beside them chunks of the prompts that
have still to be run. Kernels are batch-invariant and each row is sampled with its own sequence's settings, so what a
request gets does not depend on who else is there; only how long it takes does.

Where memory runs out, the request that came last gives its own up, and resumes when there is room.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.drafting import draft_sources
from gemma_mtp.decoding.economy import GUESSED_SHAPE, CostShape, Shared
from gemma_mtp.decoding.grammar import Constraint
from gemma_mtp.decoding.progress import FinishReason, Piece, Progress, Rows, TextStream, TokenLogprobs
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.engine.interface import BatchEngine, Part
from gemma_mtp.errors import LateError, SettingsError

# What prompts may make a pass longer in which others decode, in passes of one row, and for each of those that decode.
# They wait for it, so it is little beside one of them; but the more there are, the longer a prompt would wait for its
# turn, and the less it adds to what they wait for each other.
PROMPT_BESIDE = 1.4
PROMPT_BESIDE_EACH = 0.7
PROMPT_BESIDE_MOST = 128  # tokens
SOON = 64  # tokens that each sequence should have memory for when one starts, or it would soon be preempted


def prompt_beside(shape: CostShape, decoding: int) -> int:
    """Tokens of prompts in a pass in which so many sequences decode."""
    tokens = (PROMPT_BESIDE + PROMPT_BESIDE_EACH * decoding) / shape.prompt_row
    return max(1, min(round(tokens), PROMPT_BESIDE_MOST))


class Update(NamedTuple):
    """What a request is told: pieces as they come, and with the last of them its finish_reason or what went wrong."""

    pieces: list[Piece]
    stats: Stats
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # where they are asked for, as far as they have come
    stop_string: str | None = None


@dataclass(eq=False)
class Request:
    """A generation to be run. The prompt has been checked: it fits the context, and its tokens are in the vocabulary.

    draft: "auto", "off" or a number of tokens. receive: called by the thread that runs the scheduler. prediction:
    tokens that lookup may draft from. client: whose it is; places are shared among clients. deadline: when it must have
    ended, by time.monotonic. Whoever sets `cancelled`, from any thread, ends the request before the next pass.
    """

    prompt: list[int]
    params: SamplingParams
    text: TextStream
    eos_ids: Collection[int]
    draft: int | str
    receive: Callable[[Update], None]
    prediction: Sequence[int] = ()
    constraint: Constraint | None = None
    client: str = ""
    deadline: float = math.inf
    cancelled: bool = False


@dataclass(eq=False)
class _Running:
    request: Request
    progress: Progress
    sequence: Any = None


class Scheduler:
    """Runs at most `parallel` requests at a time. One thread calls `step`; any may `add`.

    A free place goes to the client with the fewest requests running, and of its requests to the one that came first.
    """

    def __init__(self, engine: BatchEngine, parallel: int, shape: CostShape = GUESSED_SHAPE):
        if not 1 <= parallel <= engine.max_outputs:
            raise SettingsError(
                f"The number of parallel requests is {parallel}: it must be between 1 and {engine.max_outputs}."
            )
        self._engine, self._parallel, self._shape = engine, parallel, shape
        self._arrived: deque[Request] = deque()  # all that another thread may touch: `step` takes them over
        self._waiting: deque[Request] = deque()
        self._ahead: deque[_Running] = deque()  # preempted, or next and waiting for memory: before all that wait
        self._running: list[_Running] = []
        self._economy = Shared(shape)

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self._waiting) + len(self._ahead)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        self._arrived.append(request)

    def step(self) -> None:
        """Lets requests in and cancelled ones out, and runs one pass if there is anything to run."""
        self._take_over()
        self._end_due()
        self._let_in()
        start = time.perf_counter()
        parts = self._parts()
        if not parts:
            return
        drafted = time.perf_counter()
        try:
            results = self._engine.run([part for _, part in parts])
        except Exception as error:  # whatever it was, those who wait for this pass must hear of it
            for running, _ in parts:
                self._leave(running, error)
            return
        verified = time.perf_counter()
        decoding = not any(running.progress.prompt_left for running, _ in parts)
        before = sum(len(running.progress.tokens) for running, _ in parts)
        for (running, part), rows in zip(parts, results, strict=True):
            self._take(running, part, rows)
        if decoding:
            tokens = sum(len(running.progress.tokens) for running, _ in parts) - before
            rows_of_pass = sum(len(part.tokens) for _, part in parts)
            self._economy.measure(len(parts), rows_of_pass, tokens, verified - drafted, verified - start)

    def end_all(self, error: Exception | None = None) -> None:
        """Ends every request, running or waiting, as cancelled or for an error."""
        for running in [*self._running, *self._ahead]:
            self._leave(running, error)
        self._take_over()
        while self._waiting:
            self._refuse(self._waiting.popleft(), error)

    def _take_over(self) -> None:
        while self._arrived:
            self._waiting.append(self._arrived.popleft())

    def _end_due(self) -> None:
        """Ends what was cancelled or took too long."""
        now = time.monotonic()

        def due(request: Request) -> bool:
            return request.cancelled or request.deadline < now

        def why(request: Request) -> Exception | None:
            return None if request.cancelled else LateError("The request took longer than this server lets one take.")

        for running in [running for running in (*self._running, *self._ahead) if due(running.request)]:
            self._leave(running, why(running.request))
        for request in [request for request in self._waiting if due(request)]:
            self._waiting.remove(request)
            self._refuse(request, why(request))

    def _let_in(self) -> None:
        while len(self._running) < self._parallel and (self._ahead or self._waiting):
            if not self._ahead:
                self._ahead.append(self._opened(self._next()))
            if not self._start(self._ahead[0]):
                break
            self._running.append(self._ahead.popleft())

    def _next(self) -> Request:
        running = Counter(running.request.client for running in self._running)
        request = min(self._waiting, key=lambda request: running[request.client])
        self._waiting.remove(request)
        return request

    def _opened(self, request: Request) -> _Running:
        progress = Progress(
            request.prompt,
            request.params,
            text=request.text,
            context=self._engine.context,
            depth=self._depth_of(request),
            constraint=request.constraint,
            eos_ids=request.eos_ids,
        )
        return _Running(request, progress)

    def _start(self, running: _Running) -> bool:
        """Starts or resumes a request, if there is memory for what it and those that run have still to run."""
        running.sequence = sequence = self._engine.create()
        self._adopt(running)
        wanted = [(one.sequence, one.progress.prompt_left + SOON) for one in (*self._running, running)]
        if self._running and not self._engine.fits(wanted):
            self._engine.release(sequence)
            return False
        request = running.request
        if request.draft not in ("off", 0):
            sources = draft_sources(self._engine, sequence, request.params, request.prediction)
            running.progress.draft_from(sources)
        return True

    def _adopt(self, running: _Running) -> None:
        """Gives an empty sequence what is cached of what it is to run. Its last token has to be run in any case."""
        progress = running.progress
        if progress.tokens or not running.request.params.prompt_logprobs:
            progress.skip(self._engine.adopt(running.sequence, progress.to_run[:-1]))

    def _preempt(self, running: _Running) -> None:
        self._running.remove(running)
        self._engine.release(running.sequence)
        running.progress.stats.preemptions += 1
        running.progress.rewind()
        self._ahead.appendleft(running)

    def _depth_of(self, request: Request) -> DepthControl | None:
        if isinstance(request.draft, int):
            return FixedDepth(request.draft) if request.draft else None
        return AutoDepth(self._economy) if request.draft == "auto" else None

    def _parts(self) -> list[tuple[_Running, Part]]:
        """The coming pass: a part for each decoding sequence, then prompts in the order they came, while rows last."""
        parts: list[tuple[_Running, Part]] = []
        rounds = self._rounds()
        self._economy.sequences = len(self._running)
        for running, rows in rounds:
            self._add_part(parts, running, rows)
        prompts = [running for running in self._running if running.progress.prompt_left]
        left = self._engine.max_rows - sum(len(part.tokens) for _, part in parts)
        if parts:
            left = min(left, prompt_beside(self._shape, len(parts)))
        scored = self._engine.max_outputs - sum(part.rows for _, part in parts) - len(prompts)  # rows beyond one each
        for running in prompts:
            if left <= 0 or running not in self._running:
                continue
            if not running.progress.length:
                self._adopt(running)  # what others with the same beginning have cached since it was let in
            chunk = min(left, running.progress.prompt_left)
            if running.request.params.prompt_logprobs:
                chunk = min(chunk, scored + 1)
            planned = [(one, len(part.tokens)) for one, part in parts]
            while not parts and not self._fit([(running, chunk)]) and self._running[-1] is not running:
                self._preempt(self._running[-1])
            if self._fit([*planned, (running, chunk)]):
                self._add_part(parts, running, chunk)
                left -= chunk
                scored -= chunk - 1 if running.request.params.prompt_logprobs else 0
        return parts

    def _rounds(self) -> list[tuple[_Running, int]]:
        """The most rows of each decoding sequence: where memory runs out no drafts, and then fewer sequences."""
        decoding = [running for running in self._running if not running.progress.prompt_left]
        if not decoding:
            return []
        spare = self._engine.max_outputs - len(self._running)  # every sequence may need one row sampled
        drafts = min(spare // len(decoding), self._engine.max_depth)
        planned = [(running, 1 + drafts) for running in decoding]
        if self._fit(planned):
            return planned
        while not self._fit(planned := [(running, 1) for running in decoding]) and len(self._running) > 1:
            last = self._running[-1]
            self._preempt(last)
            decoding = [running for running in decoding if running is not last]
        return planned

    def _fit(self, planned: Sequence[tuple[_Running, int]]) -> bool:
        return self._engine.fits([(running.sequence, rows) for running, rows in planned])

    def _add_part(self, parts: list[tuple[_Running, Part]], running: _Running, most: int) -> None:
        try:
            wanted = running.progress.want(most)
        except Exception as error:  # of one sequence's draft source: the others go on
            self._leave(running, error)
            return
        request = running.request
        part = Part(running.sequence, *wanted[:2], request.params, len(request.prompt), *wanted[2:])
        parts.append((running, part))

    def _take(self, running: _Running, part: Part, rows: Rows) -> None:
        progress, before = running.progress, running.progress.length
        try:
            progress.take(rows)
            if progress.finish_reason:
                self._leave(running)
                return
            if progress.length < before + len(part.tokens):  # not all drafts were kept
                self._engine.truncate(running.sequence, progress.length)
            self._engine.share(running.sequence)
            pieces = list(progress.pieces())
            if pieces:
                running.request.receive(_update(running, pieces))
        except Exception as error:  # of one sequence's text: the others go on
            self._leave(running, error)

    def _leave(self, running: _Running, error: Exception | None = None) -> None:
        """Ends a running request and frees its sequence."""
        if running in self._running:
            self._running.remove(running)
            self._engine.share(running.sequence)
            self._engine.release(running.sequence)
        elif running in self._ahead:
            self._ahead.remove(running)
        else:
            return
        progress = running.progress
        if error is None:
            try:
                progress.end()
            except Exception as fault:  # of its text
                error = fault
        update = _update(running, list(progress.pieces()))
        running.request.receive(update._replace(finish_reason=None if error else progress.finish_reason, error=error))

    def _refuse(self, request: Request, error: Exception | None = None) -> None:
        """Ends a request that has not started."""
        stats = Stats(prompt_tokens=len(request.prompt))
        request.receive(Update([], stats, None if error else "cancelled", error))


def _update(running: _Running, pieces: list[Piece]) -> Update:
    progress, asks = running.progress, running.request.params.prompt_logprobs
    prompt_logprobs = progress.prompt_logprobs if asks else None
    return Update(pieces, progress.stats, prompt_logprobs=prompt_logprobs, stop_string=progress.stop_string)
