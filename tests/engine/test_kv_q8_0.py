"""An 8-bit cache of keys and values: nearly the same distributions, and all that holds of drafting with any cache."""

import numpy as np
import pytest

from gemma_mtp import Model, SamplingParams, SettingsError, _native
from gemma_mtp.prompts import NINE_KINDS

TOKENS = 700  # the sliding window of the demo is 512
ALL = SamplingParams(logprobs=1)  # of which all logits are computed


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load("demo", threads=2, kv="q8_0")


@pytest.fixture(scope="module")
def tokens(demo: Model) -> list[int]:
    return demo.tokenize("\n\n".join(NINE_KINDS.values()) * 3)[:TOKENS]


def last_logits(model: Model, tokens: list[int], chunk: int, wrong: int = 0) -> np.ndarray:
    """Of the last token, the tokens going in `chunk` at a time, with `wrong` others in between that are taken back."""
    engine = model.engine
    sequence = engine.create()
    for start in range(0, len(tokens), chunk):
        if wrong and start:
            engine.step(sequence, tokens[:wrong], 0, ALL)
            engine.truncate(sequence, start)
        engine.step(sequence, tokens[start : start + chunk], 1, ALL)
    logits = engine.last_logits()
    engine.release(sequence)
    return logits


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def test_distributions_are_nearly_those_of_the_fp16_cache(demo: Model, model: Model, tokens: list[int]) -> None:
    exact, found = (probabilities(each.logits(tokens)[-64:]) for each in (demo, model))
    divergence = (exact * np.log(exact / found)).sum(1)
    assert 0 < divergence.mean() < 0.01
    assert np.mean(exact.argmax(1) == found.argmax(1)) > 0.9


@pytest.mark.parametrize("kind", ["python", "facts", "story"])
def test_drafting_never_changes_the_tokens(model: Model, kind: str) -> None:
    for settings in ({}, {"temperature": 1.0, "seed": 7}):
        params = SamplingParams(max_tokens=32, **settings)  # type: ignore[arg-type]
        plain = model.generate(NINE_KINDS[kind], params, draft="off")
        for draft in (4, "auto"):
            drafted = model.generate(NINE_KINDS[kind], params, draft=draft)
            assert drafted.tokens == plain.tokens


def test_chunks_and_rejected_drafts_past_the_window_leave_no_trace(model: Model, tokens: list[int]) -> None:
    expected = last_logits(model, tokens, 512)
    for chunk, wrong in ((7, 0), (100, 32), (33, 5)):
        assert np.array_equal(last_logits(model, tokens, chunk, wrong), expected), f"chunks of {chunk}"


@pytest.mark.parametrize("isa", _native.isas()[1:])
def test_instruction_sets_give_the_same_bits(model: Model, tokens: list[int], isa: str) -> None:
    other = Model.load("demo", threads=2, kv="q8_0", isa=isa)
    assert np.array_equal(last_logits(other, tokens[:24], 24), last_logits(model, tokens[:24], 24))


def test_it_takes_little_more_than_half_of_the_memory(demo: Model, model: Model, tokens: list[int]) -> None:
    sizes = []
    for each in (demo, model):
        sequence = each.engine.create()
        for start in range(0, TOKENS, 350):
            each.engine.step(sequence, tokens[start : start + 350], 1, ALL)
        sizes.append(each.engine.cache.bytes_in_use)
        each.engine.release(sequence)
    assert sizes[1] / sizes[0] == pytest.approx(8.5 / 16)


def test_what_is_read_back_is_within_half_a_step(demo: Model, model: Model, tokens: list[int]) -> None:
    """Of the first layer, whose keys and values are the same with either cache."""
    read = []
    for each in (demo, model):
        sequence = each.engine.create()
        each.engine.step(sequence, tokens[:80], 1, ALL)
        read.append(each.engine.keys_and_values(sequence, 0, 0, 80))
        each.engine.release(sequence)
    for exact, found in zip(*read, strict=True):
        blocks, errors = exact.reshape(-1, 32), np.abs(found - exact).reshape(-1, 32)
        steps = np.abs(blocks).max(1) / 127
        assert (errors.max(1) <= 0.56 * steps + 1e-6).all()  # half a step, and what fp16 rounds of the scale and values


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no KV cache of type 'q4_0': use f16, q8_0, f32"):
        Model.load("demo", kv="q4_0")
    with pytest.raises(SettingsError, match=r"The torch backend keeps keys and values in its dtype"):
        Model.load("demo", kv="q8_0", backend="torch")
