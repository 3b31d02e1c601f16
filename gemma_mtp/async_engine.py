"""Many generations at once, from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Unpack

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.engine.interface import BatchEngine, Memory
from gemma_mtp.engine.memory import kv_memory_of
from gemma_mtp.engine.scheduler import Request, Scheduler, Update
from gemma_mtp.errors import BusyError, SettingsError
from gemma_mtp.generation import Channels, Generation, Piece
from gemma_mtp.model import AnswerOptions, Asked, Draft, Model, Prompt

_log = logging.getLogger("gemma_mtp")


class AsyncStream:
    """Iterate it (`async for`) for the pieces of a generation; `generation` holds what has come so far.

    `close`, or letting go of the stream, ends the generation within one pass. Failures of the engine are raised here.
    """

    def __init__(self, prompt_tokens: int, logprobs: bool):
        stats = Stats(prompt_tokens=prompt_tokens)
        self.generation = Generation(stats=stats, logprobs=[] if logprobs else None)
        self._arrived: asyncio.Queue[tuple[list[Piece], Update]] = asyncio.Queue()
        self._ready: list[Piece] = []
        self._request: Request | None = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        while not self._ready:
            pieces = await self.next_pass()
            if pieces is None:
                raise StopAsyncIteration
            self._ready = pieces
        return self._ready.pop(0)

    async def next_pass(self) -> list[Piece] | None:
        """All pieces of the next pass that gives any; None after the last."""
        if self.generation.finish_reason:
            return None
        pieces, update = await self._arrived.get()
        generation = self.generation
        generation.stats, generation.prompt_logprobs = update.stats, update.prompt_logprobs
        for piece in pieces:
            generation.add(piece)
            generation.tokens += piece.tokens
        if update.error:
            generation.finish_reason = "cancelled"
            raise update.error
        generation.finish_reason, generation.stop_string = update.finish_reason, update.stop_string
        return pieces

    def close(self) -> None:
        """Ends the generation here: its last pieces, if any, are those of the pass that runs now."""
        if self._request:
            self._request.cancelled = True

    def __del__(self) -> None:
        self.close()


class AsyncEngine:
    """Runs many generations of one model at once, on a thread of its own: requests join and leave at every pass.

    parallel: how many run at a time; each may hold as many tokens as the model's context. max_queue: how many more may
    wait for a place. kv_memory: bytes for keys and values, those of running requests and those kept because another
    request may begin the same way; if None, what twice `parallel` whole contexts take, but at most half of the memory
    that is free. Where it runs out, requests wait, or give theirs up and resume later. timeout: seconds that a request
    may take, waiting included; then its stream raises LateError.
    A generation's text depends on none of this, nor on the others. While the engine is open the model must not be
    used in another way. Use it as `async with`, or call `close`.

    >>> async with AsyncEngine(Model.load("demo")) as engine:
    ...     async for piece in engine.submit("The capital of France is", SamplingParams(max_tokens=8)):
    ...         print(piece.text)
    """

    def __init__(
        self,
        model: Model,
        *,
        parallel: int = 8,
        max_queue: int = 64,
        kv_memory: int | None = None,
        timeout: float | None = None,
    ):
        engine = model.engine
        if not isinstance(engine, BatchEngine):
            raise SettingsError("Only the native backend runs several generations at once: use backend='native'.")
        if max_queue < 0:
            raise SettingsError(f"The queue's length is {max_queue}: it must be 0 or more.")
        if timeout is not None and not timeout > 0:
            raise SettingsError(f"The timeout is {timeout} seconds: it must be more than 0.")
        self.model, self._engine, self._timeout = model, engine, timeout
        self._scheduler = Scheduler(engine, parallel, model.cost_shape)
        engine.limit_memory(kv_memory_of(engine, kv_memory, parallel))
        self.limit = parallel + max_queue
        """The most requests that may run or wait at a time."""
        self._outbox: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []  # what the pass gave, to be told
        self._open_requests = 0  # accepted and not yet ended
        self._changed = threading.Condition()
        self._closing = self._cancelling = False
        self._thread = threading.Thread(target=self._run, name="gemma-mtp passes", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests in the passes."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._scheduler.waiting

    @property
    def memory(self) -> Memory:
        """Of keys and values."""
        return self._engine.memory

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        **options: Unpack[AnswerOptions],
    ) -> AsyncStream:
        """Starts a generation, with the arguments of Model.generate; to be called where an event loop runs.

        Raises PromptError, SettingsError, and BusyError when the queue is full or the engine is closing.
        """
        return self.start(self.model.ask(prompt, params, draft, **options))

    def start(self, asked: Asked, client: str = "") -> AsyncStream:
        """The same for what `Model.ask` has made ready, in another thread perhaps. client: whose it is; a free place
        goes to the client with the fewest requests running."""
        stream = AsyncStream(len(asked.ids), asked.params.logprobs > 0)
        loop = asyncio.get_running_loop()

        def send(deliver: Callable[[], None]) -> None:
            self._outbox.append((loop, deliver))

        receive = _receiver(weakref.ref(stream), send, asked, self._ended)
        deadline = math.inf if self._timeout is None else time.monotonic() + self._timeout
        request = Request(
            asked.ids,
            asked.params,
            asked.text,
            asked.ends,
            asked.draft,
            receive,
            asked.prediction,
            asked.constraint,
            client,
            deadline,
        )
        with self._changed:
            if self._closing:
                raise BusyError("The engine is closing and takes no more requests.")
            if self._open_requests >= self.limit:
                raise BusyError(f"{self._open_requests} requests are running or waiting, which is all there may be.")
            self._open_requests += 1
            stream._request = request
            self._scheduler.add(request)
            self._changed.notify_all()
        return stream

    def stop_accepting(self) -> None:
        """Refuses further requests; those that were accepted go on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    async def close(self, drain: bool = True) -> None:
        """Ends the engine: after all accepted requests with `drain`, or else within one pass, cancelling them."""
        self.stop_accepting()
        if not drain:
            self._cancelling = True
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)

    def _ended(self) -> None:
        with self._changed:
            self._open_requests -= 1

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._open_requests and not self._closing:
                    self._changed.wait()
                if not self._open_requests:
                    self._engine.limit_memory(0)
                    return
            try:
                if self._cancelling:
                    self._scheduler.end_all()
                else:
                    self._scheduler.step()
            except Exception as error:  # a fault of ours: those who wait must hear of it, and later requests may run
                _log.exception("A pass could not be made up.")
                self._scheduler.end_all(error)
            self._tell()

    def _tell(self) -> None:
        """Hands what the pass gave to the event loops, each of which is woken once."""
        told, self._outbox = self._outbox, []
        for loop in {loop for loop, _ in told}:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_call_all, [deliver for its, deliver in told if its is loop])


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _receiver(
    stream: weakref.ref[AsyncStream],
    send: Callable[[Callable[[], None]], None],
    asked: Asked,
    ended: Callable[[], None],
) -> Callable[[Update], None]:
    """What takes a request's updates, in the engine's thread, and passes them on to its stream, if there still is one.
    It must hold no stream, so that one that was let go of is noticed. send: takes what the event loop is to call."""
    channels = Channels(asked.chat) if asked.chat else None

    def split(update: Update) -> list[Piece]:
        if channels is None:
            return [Piece(*piece) for piece in update.pieces]
        pieces = [part for piece in update.pieces for part in channels.split(piece)]
        return [*pieces, *channels.rest()] if update.finish_reason else pieces

    def deliver(pieces: list[Piece], update: Update) -> None:
        if (there := stream()) is not None:
            there._arrived.put_nowait((pieces, update))

    def receive(update: Update) -> None:
        pieces: list[Piece] = []
        try:
            pieces = split(update)
        except Exception as error:  # of the answer's text
            update = update._replace(error=update.error or error)
        if update.error:
            _log.error("A request failed: %s", update.error)
        if update.finish_reason or update.error:
            ended()
        send(lambda: deliver(pieces, update))

    return receive
