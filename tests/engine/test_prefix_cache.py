"""What is cached of a prompt is not run again, and changes no bit; memory stays bounded, and nothing is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_mtp import AsyncEngine, Generation, Model, SamplingParams, SettingsError, _native
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.engine import scheduler as scheduling
from gemma_mtp.engine.engine import Engine, SequenceState
from gemma_mtp.engine.memory import parse_size
from gemma_mtp.engine.prefixes import PAGE, page_names
from gemma_mtp.engine.scheduler import Scheduler
from gemma_mtp.prompts import NINE_KINDS

from ..checkpoints.tiny import TARGETS, drafter_for, write_folder
from .test_scheduler import Asked
from .test_scheduler import run as run_all

LOGITS = SamplingParams(logprobs=1)  # of which all logits are computed
SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, top_k=64, seed=5)


@pytest.fixture(scope="module")
def tokens(demo: Model) -> list[int]:
    return demo.tokenize("\n\n".join(NINE_KINDS.values()) * 2)[:1100]  # the demo's window is 512


@pytest.fixture(scope="module")
def warm(demo: Model, tokens: list[int]) -> Iterator[Engine]:
    """The engine, with `tokens` cached."""
    engine = demo.engine
    assert isinstance(engine, Engine)
    engine.limit_memory(4 * engine.memory_for(engine.context))
    engine.release(fill(engine, tokens))
    yield engine
    engine.limit_memory(0)


def fill(engine: Engine, tokens: list[int], sequence: SequenceState | None = None) -> SequenceState:
    """Runs what the sequence, a new one if None, does not hold of `tokens`."""
    sequence = sequence or engine.create()
    for start in range(len(sequence.tokens), len(tokens), 512):
        engine.step(sequence, tokens[start : start + 512], 1, LOGITS)
        engine.share(sequence)
    return sequence


def following(engine: Engine, sequence: SequenceState) -> list[NDArray[np.float32]]:
    """The logits of the last pass and of two more."""
    logits = [engine.last_logits()[-1]]
    for token in (40_000, 40_001):
        engine.step(sequence, [token], 1, LOGITS)
        logits.append(engine.last_logits()[-1])
    engine.release(sequence)
    return logits


@pytest.mark.parametrize("shared", [100, 640, 1099])
def test_a_cached_beginning_gives_the_same_bits(warm: Engine, tokens: list[int], shared: int) -> None:
    text = [*tokens[:shared], *range(1000, 1030)]
    sequence = warm.create()
    adopted = warm.adopt(sequence, text[:-1])
    assert adopted == shared // PAGE * PAGE
    warm.step(sequence, text[adopted : adopted + 5], 1, LOGITS)
    warm.step(sequence, [7, 8, 9], 0, LOGITS)  # drafts that are not kept
    warm.truncate(sequence, adopted + 5)
    found = following(warm, fill(warm, text, sequence))
    assert np.array_equal(found, following(warm, fill(warm, text)))


def test_sequences_share_pages_while_they_run(warm: Engine, tokens: list[int]) -> None:
    first = warm.create()
    assert warm.adopt(first, tokens[:640]) == 640
    before = warm.memory
    second = warm.create()
    assert warm.adopt(second, tokens[:640]) == 640
    assert warm.memory == before
    warm.step(second, tokens[:1], 1, LOGITS)
    expected = warm.last_logits()
    warm.step(first, tokens[:1], 1, LOGITS)
    assert np.array_equal(warm.last_logits(), expected)
    warm.release(first)
    assert warm.memory.held >= before.held
    warm.release(second)
    assert warm.memory.held == 0


def test_a_shared_page_is_never_written(warm: Engine, tokens: list[int]) -> None:
    sequence = warm.create()
    warm.adopt(sequence, tokens[:128])
    with pytest.raises(_native.InputError, match="named page"):
        warm.cache.truncate(sequence.handle, 100)
    warm.truncate(sequence, 64)
    warm.release(sequence)


def test_memory_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    write_folder(tmp_path, TARGETS["gemma3"])
    checkpoint = open_checkpoint(tmp_path)
    engine = Engine(checkpoint.config, checkpoint.weights, threads=1, context=512)
    engine.limit_memory(2 * engine.memory_for(200))
    texts = [[5 + i, *range(5, 204)] for i in range(12)]

    def cached(text: list[int]) -> int:
        sequence = engine.create()
        length = engine.adopt(sequence, text)
        engine.release(sequence)
        return length

    for text in texts:
        engine.release(fill(engine, text))
        assert engine.memory.allocated <= engine.memory.limit
        assert cached(text) == 192
    assert cached(texts[0]) == 0
    assert engine.fits([(engine.create(), 200), (engine.create(), 200)])
    assert not engine.fits([(engine.create(), 200) for _ in range(3)])
    engine.limit_memory(0)
    assert cached(texts[-1]) == 0


def test_names_stand_for_all_tokens_before() -> None:
    names = page_names(range(200))
    assert len(names) == 3
    assert page_names(range(300), names[:2]) == page_names(range(300))[2:]
    assert page_names([9, *range(1, 200)])[1] != names[1]


async def answers(engine: AsyncEngine, prompts: list, params: SamplingParams, draft: int | str) -> list[Generation]:
    streams = [engine.submit(prompt, params, draft) for prompt in prompts]
    for stream in streams:
        async for _ in stream:
            pass
    return [stream.generation for stream in streams]


@pytest.mark.parametrize("draft", ["off", 3])
def test_follow_ups_and_shared_prompts_are_not_run_again(demo: Model, tokens: list[int], draft: int | str) -> None:
    prompts = [[*tokens[:700], *demo.tokenize(text)] for text in list(NINE_KINDS.values())[:3]]
    demo.engine.limit_memory(0)  # forgets what other tests left

    async def test() -> list[Generation]:
        async with AsyncEngine(demo) as engine:
            first = await answers(engine, prompts[:1], SAMPLED, draft)
            assert first[0].stats.cached_tokens == 0
            rest = await answers(engine, prompts[1:], SAMPLED, draft)
            assert all(one.stats.cached_tokens == 640 for one in rest)
            prompts.append([*prompts[0], *first[0].tokens, *demo.tokenize("And then?")])
            follow_up = await answers(engine, prompts[-1:], SAMPLED, draft)
            assert follow_up[0].stats.cached_tokens >= len(prompts[0]) // PAGE * PAGE
            return [*first, *rest, *follow_up]

    found = asyncio.run(test())
    for prompt, one in zip(prompts, found, strict=True):
        assert one.tokens == demo.generate(prompt, SAMPLED, "off").tokens
    assert demo.engine.memory == (0, demo.engine.memory.allocated, 0)


def test_preempted_requests_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "SOON", 0)  # nobody waits for the room that will be wanted
    model = Model.load("demo", threads=2, context=1024)
    prompts = [text * 3 for text in NINE_KINDS.values()][:6]
    params = SamplingParams(max_tokens=120, temperature=1.0, top_k=64, seed=9, ignore_eos=True)

    async def test() -> list[Generation]:
        async with AsyncEngine(model, parallel=6, kv_memory=model.engine.memory_for(1024)) as engine:
            return await answers(engine, prompts, params, "auto")

    found = asyncio.run(test())
    assert sum(one.stats.preemptions for one in found) > 0
    for prompt, one in zip(prompts, found, strict=True):
        assert one.tokens == model.generate(prompt, params, "off").tokens
        assert len(one.tokens) == 120


@pytest.mark.parametrize("kind", ["E2B", "E4B"])
@pytest.mark.parametrize("room", [1, 4])
def test_gemma_4_with_shared_layers_and_a_drafter(
    tmp_path: Path, kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """room: the memory, in whole contexts. With one, requests are preempted."""
    monkeypatch.setattr(scheduling, "SOON", 0)
    write_folder(tmp_path / "target", TARGETS[kind])
    write_folder(tmp_path / "drafter", drafter_for(TARGETS[kind], centroids=True))
    target, drafter = open_checkpoint(tmp_path / "target"), open_checkpoint(tmp_path / "drafter")
    engine = Engine(target.config, target.weights, threads=1, context=256)
    engine.attach(drafter.config, drafter.weights)
    prompts = [[*(i * i % 90 + 5 for i in range(140)), k, k + 1] for k in range(1, 6)]  # past the window of 32
    params = SamplingParams(max_tokens=90, temperature=1.0, seed=3, ignore_eos=True)

    def run(group: list[Asked]) -> None:
        scheduler = Scheduler(engine, 4)
        for one in group:
            scheduler.add(one.request)
        run_all(scheduler)

    plain = [Asked(prompt, params, "off") for prompt in prompts]
    for one in plain:
        run([one])
    engine.limit_memory(room * engine.memory_for(engine.context))
    drafted = [Asked(prompt, params, 3) for prompt in prompts]
    run(drafted[:1])
    run(drafted[1:])
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    stats = [one.updates[-1].stats for one in drafted]
    assert all(one.cached_tokens == 128 for one in stats[1:]) or room == 1
    assert bool(sum(one.preemptions for one in stats)) == (room == 1)
    assert all(one.drafted for one in stats)
    assert engine.memory.held == 0
    assert engine.memory.allocated <= engine.memory.limit


@pytest.mark.parametrize(("text", "size"), [("12", 12), ("512MB", 512_000_000), ("1.5 GiB", 3 << 29)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "2 Gb/s", "GiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is no size"):
        parse_size(text)


def test_memory_for_less_than_one_request_is_refused(demo: Model) -> None:
    with pytest.raises(SettingsError, match="one request with the context of 8192 tokens"):
        AsyncEngine(demo, kv_memory=1 << 20)
