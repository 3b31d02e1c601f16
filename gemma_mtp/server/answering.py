"""Runs what a request asks for, and sends it: at once, or as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from gemma_mtp.async_engine import AsyncEngine, AsyncStream
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.errors import BusyError, GemmaMtpError
from gemma_mtp.generation import Piece
from gemma_mtp.model import Asked, Draft, Model, Prompt, ToolChoice, Tools
from gemma_mtp.server.choices import Choice, Writer
from gemma_mtp.server.errors import ApiError, api_error
from gemma_mtp.server.gate import CLIENT
from gemma_mtp.server.metrics import Metrics

_log = logging.getLogger("gemma_mtp")


@dataclass(frozen=True)
class Asking:
    """The generations of a request: prompts with their settings, and what they share."""

    generations: Sequence[tuple[Prompt, SamplingParams]]
    draft: Draft
    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool = False
    prediction: str | None = None

    def prepare(self, model: Model) -> list[Asked]:
        """Renders and encodes the prompts. Raises PromptError, SettingsError."""
        return [
            model.ask(
                prompt,
                params,
                self.draft,
                tools=self.tools,
                tool_choice=self.tool_choice,
                parallel_tool_calls=self.parallel_tool_calls,
                thinking=self.thinking,
                prediction=self.prediction,
            )
            for prompt, params in self.generations
        ]


class Answering:
    """max_prompt: the most tokens of a prompt; None: as many as the context holds."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, max_prompt: int | None = None):
        self._engine, self._metrics, self._max_prompt = engine, metrics, max_prompt
        self._preparing = 0  # texts

    def check_count(self, count: int) -> None:
        """Raises ApiError for more texts than the engine takes."""
        if count > self._engine.limit:
            raise ApiError(400, f"The request asks for {count} texts at once: ask for at most {self._engine.limit}.")

    async def prepare(self, asking: Asking) -> list[Asked]:
        """What is asked for, ready to run: in a thread of its own, since long prompts take a while."""
        count = len(asking.generations)
        self.check_count(count)
        if self._preparing + count > self._engine.limit:
            raise BusyError("The server has as many requests as it takes: try again later.")
        self._preparing += count
        try:
            asked = await asyncio.to_thread(asking.prepare, self._engine.model)
        finally:
            self._preparing -= count
        longest = max(len(one.ids) for one in asked)
        if self._max_prompt is not None and longest > self._max_prompt:
            message = f"The prompt has {longest} tokens, more than the {self._max_prompt} that this server takes."
            raise ApiError(400, message, code="context_length_exceeded")
        return asked

    async def answer(self, writer: Writer, asked: Sequence[Asked], request: Request) -> Response:
        """Starts the generations, all or none, and answers with them."""
        client = request.scope[CLIENT]
        # Those started before one is refused are let go of.
        streams = [self._engine.start(one, client) for one in asked]
        headers = {"X-Request-Id": writer.id}
        if writer.stream:
            headers["Cache-Control"] = "no-cache"
            return StreamingResponse(self._events(writer, streams), headers=headers, media_type="text/event-stream")
        return JSONResponse(await _unless_gone(request, self._whole(writer, streams)), headers=headers)

    async def _whole(self, writer: Writer, streams: Sequence[AsyncStream]) -> dict[str, Any]:
        choices = [Choice(index, stream.generation) for index, stream in enumerate(streams)]
        async with aclosing(_merged([self._metrics.watch(stream) for stream in streams])) as passes:
            async for index, pieces in passes:
                for piece in pieces or ():
                    choices[index].count(piece)
                    choices[index].pieces.append(piece)
        if any(choice.generation.finish_reason == "cancelled" for choice in choices):
            raise _closing()
        return writer.whole(choices)

    async def _events(self, writer: Writer, streams: Sequence[AsyncStream]) -> AsyncIterator[str]:
        choices = [Choice(index, stream.generation) for index, stream in enumerate(streams)]
        running = len(choices)
        try:
            async with aclosing(_merged([self._metrics.watch(stream) for stream in streams])) as passes:
                for event in writer.opening(choices):
                    yield event
                async for index, pieces in passes:
                    choice = choices[index]
                    events: list[str] = []
                    for piece in pieces or ():
                        choice.count(piece)
                        events += writer.piece(choice, piece)
                    if events:
                        yield "".join(events)  # sending costs more than writing: a pass is sent at once
                    if pieces is None:
                        if choice.generation.finish_reason == "cancelled":
                            raise _closing()
                        running -= 1
                        for event in writer.ended(choice, choices, last=not running):
                            yield event
            for event in writer.closing(choices):
                yield event
        except Exception as error:  # the status is sent already: the client is told in the stream
            if not isinstance(error, (ApiError, GemmaMtpError)):
                _log.exception("An answer broke off.")
            yield writer.failure(api_error(error))


def _closing() -> ApiError:
    return ApiError(503, "The server is shutting down and had to end this request.", code="shutting_down")


async def _merged(
    sources: Sequence[AsyncGenerator[list[Piece], None]],
) -> AsyncGenerator[tuple[int, list[Piece] | None], None]:
    """(which source, its next item) as they come; None after a source's last. When this is closed, so are they."""
    if len(sources) == 1:  # as most requests have: spare them a task for each pass
        async with aclosing(sources[0]) as only:
            async for pieces in only:
                yield 0, pieces
        yield 0, None
        return

    async def following(source: AsyncIterator[list[Piece]]) -> list[Piece] | None:
        return await anext(source, None)

    tasks = {asyncio.ensure_future(following(source)): index for index, source in enumerate(sources)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                index, item = tasks.pop(task), task.result()
                if item is not None:
                    tasks[asyncio.ensure_future(following(sources[index]))] = index
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _unless_gone(request: Request, work: Any) -> dict[str, Any]:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client went away.")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
