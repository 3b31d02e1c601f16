"""Many generations at once on the real model: the same tokens as alone, and nothing left behind."""

import asyncio
import gc

import pytest

from gemma_mtp import AsyncEngine, AsyncStream, BusyError, Generation, Model, PromptError, SamplingParams, SettingsError
from gemma_mtp.prompts import NINE_KINDS

SAMPLED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
PENALISED = {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {107: -2.0}}
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)


def requests() -> list[tuple[str, SamplingParams, int | str]]:
    """Eighteen, of all lengths and settings."""
    prompts = [*NINE_KINDS.values(), "x", "\n\n".join(NINE_KINDS.values())]
    return [
        (
            prompts[i % len(prompts)],
            SamplingParams(max_tokens=4 + 3 * (i % 6), seed=i, **[SAMPLED, {}, PENALISED][i % 3]),
            ["auto", "off", 3, "auto"][i % 4],
        )
        for i in range(18)
    ]


async def whole(stream: AsyncStream) -> Generation:
    async for _ in stream:
        pass
    return stream.generation


async def started(stream: AsyncStream) -> AsyncStream:
    await stream.next_pass()
    return stream


async def nothing_runs(engine: AsyncEngine) -> None:
    while engine.running or engine.waiting:
        await asyncio.sleep(0.01)
    assert engine.model.engine.cache.bytes_in_use == 0


def test_tokens_do_not_depend_on_the_load(demo: Model) -> None:
    asked = requests()

    async def together() -> list[Generation]:
        async with AsyncEngine(demo, parallel=16) as engine:
            streams = [engine.submit(*request) for request in asked]
            return await asyncio.gather(*map(whole, streams))

    drafted = accepted = 0
    for (prompt, params, draft), crowded in zip(asked, asyncio.run(together()), strict=True):
        alone = demo.generate(prompt, params, "off")
        assert (crowded.tokens, crowded.text) == (alone.tokens, alone.text), f"{prompt[:20]!r}, draft {draft}"
        assert crowded.finish_reason == alone.finish_reason
        assert crowded.stats.tokens == len(crowded.tokens)
        drafted += crowded.stats.drafted
        accepted += crowded.stats.accepted
    assert 0 < accepted < drafted, "drafts were not both kept and rejected, so little was tested"


def test_a_stream_that_is_closed_or_let_go_of_ends_within_a_pass(demo: Model) -> None:
    async def test() -> None:
        async with AsyncEngine(demo, parallel=2) as engine:
            closed = await started(engine.submit("Once", ENDLESS))
            dropped = await started(engine.submit("Upon", ENDLESS))
            waiting = engine.submit("a time", ENDLESS)
            closed.close()
            waiting.close()
            assert (await whole(closed)).finish_reason == "cancelled"
            assert (await whole(waiting)).tokens == []
            del dropped
            gc.collect()
            await asyncio.wait_for(nothing_runs(engine), 10)

    asyncio.run(test())


def test_a_full_queue_and_a_closing_engine_refuse(demo: Model) -> None:
    async def test() -> None:
        engine = AsyncEngine(demo, parallel=1, max_queue=1)
        streams = [engine.submit("Once", SamplingParams(max_tokens=6)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are running or waiting"):
            engine.submit("Once")
        engine.stop_accepting()
        with pytest.raises(BusyError, match="closing"):
            engine.submit("Once")
        await engine.close()  # drains
        answers = [await whole(stream) for stream in streams]
        assert [len(answer.tokens) for answer in answers] == [6, 6]

    asyncio.run(test())


def test_closing_without_draining_cancels(demo: Model) -> None:
    async def test() -> None:
        engine = AsyncEngine(demo, parallel=1)
        running, waiting = (engine.submit("Once", ENDLESS) for _ in range(2))
        await running.next_pass()
        await asyncio.wait_for(engine.close(drain=False), 10)
        assert [(await whole(stream)).finish_reason for stream in (running, waiting)] == ["cancelled", "cancelled"]
        await nothing_runs(engine)

    asyncio.run(test())


def test_what_cannot_run_is_refused_at_once(demo: Model) -> None:
    async def test() -> None:
        async with AsyncEngine(demo) as engine:
            with pytest.raises(PromptError, match="outside the vocabulary"):
                engine.submit([2, 262144])
            with pytest.raises(PromptError, match="more than the context"):
                engine.submit([2] * (demo.context + 1))
            with pytest.raises(SettingsError, match="draft length"):
                engine.submit("x", draft=99)
        with pytest.raises(SettingsError, match="between 1 and 64"):
            AsyncEngine(demo, parallel=65)

    asyncio.run(test())
