"""A row's result never depends on the rows beside it, the thread count, the chunking or the instruction set."""

import numpy as np
import pytest

from gemma_mtp import Model, SamplingParams, _native
from gemma_mtp.prompts import NINE_KINDS

TOKENS = 700  # the sliding window of the demo is 512
GREEDY = SamplingParams(logprobs=1)  # of which all logits are computed


@pytest.fixture(scope="module")
def tokens(demo: Model) -> list[int]:
    return demo.tokenize("\n\n".join(NINE_KINDS.values()) * 3)[:TOKENS]


def last_logits(model: Model, tokens: list[int], chunk: int) -> np.ndarray:
    """Of the last token, the tokens going in `chunk` at a time."""
    engine = model.engine
    sequence = engine.create()
    for start in range(0, len(tokens), chunk):
        engine.step(sequence, tokens[start : start + chunk], 1, GREEDY)
    engine.release(sequence)
    return engine.last_logits()


def test_chunks_of_a_prompt_give_the_same_bits(demo: Model, tokens: list[int]) -> None:
    expected = last_logits(demo, tokens, 64)
    for chunk in (1, 7, 512):
        assert np.array_equal(last_logits(demo, tokens, chunk), expected), f"chunks of {chunk}"


def test_rows_alone_and_together_give_the_same_bits(demo: Model, tokens: list[int]) -> None:
    together = demo.logits(tokens[:48])
    engine = demo.engine
    sequence = engine.create()
    for i, token in enumerate(tokens[:48]):
        engine.step(sequence, [token], 1, GREEDY)
        assert np.array_equal(engine.last_logits()[0], together[i]), f"row {i}"
    engine.release(sequence)


@pytest.mark.parametrize("variant", [{"threads": 1}, *({"isa": isa} for isa in _native.isas()[1:])], ids=str)
def test_threads_and_instruction_sets_give_the_same_bits(demo: Model, tokens: list[int], variant: dict) -> None:
    count = 24 if variant.get("isa") == "portable" else TOKENS  # the portable build is slow
    other = Model.load("demo", **variant)
    assert np.array_equal(last_logits(other, tokens[:count], 512), last_logits(demo, tokens[:count], 512))


def test_a_truncated_sequence_goes_on_as_if_never_drafted(demo: Model, tokens: list[int]) -> None:
    engine = demo.engine
    sequence = engine.create()
    expected = last_logits(demo, tokens, 512)
    for start in range(0, TOKENS - 1, 100):  # past the window, with 32 wrong tokens after every 100
        engine.step(sequence, tokens[start : min(start + 100, TOKENS - 1)], 0, GREEDY)
        length = len(sequence.tokens)
        engine.step(sequence, tokens[:32], 0, GREEDY)
        engine.truncate(sequence, length)
    engine.step(sequence, tokens[-1:], 1, GREEDY)
    assert np.array_equal(engine.last_logits(), expected)
    engine.release(sequence)
