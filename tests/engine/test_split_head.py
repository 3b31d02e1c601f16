"""The output embedding in two parts: what is left unread never changes a token."""

from dataclasses import replace

import numpy as np
import pytest

from gemma_mtp import CheckpointError, Model, SamplingParams, _native
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.checkpoints.packing import Packer
from gemma_mtp.engine.engine import Engine
from gemma_mtp.prompts import NINE_KINDS

SETTINGS = {
    "greedy": {},
    "top-k 1": {"temperature": 1.0, "top_k": 1},
    "top-k 5": {"temperature": 1.0, "top_k": 5},
    "top-k 64, top-p": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "no filters": {"temperature": 1.0},
    "no filters, cold": {"temperature": 0.3},
    "no filters, hot": {"temperature": 20.0},
    "top-p alone": {"temperature": 1.0, "top_p": 0.9},
    "top-k 128, hot, min-p": {"temperature": 3.0, "top_k": 128, "min_p": 0.01},
}


@pytest.fixture(scope="module")
def tokens(demo: Model) -> list[int]:
    return demo.tokenize("\n\n".join(NINE_KINDS.values()))[:160]


@pytest.fixture(scope="module")
def engine() -> Engine:
    checkpoint = open_checkpoint(resolve("demo"))
    return Engine(checkpoint.config, checkpoint.weights, threads=2, context=512, split_head=True)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_tokens_are_those_of_all_logits(engine: Engine, tokens: list[int], settings: dict, rows: int) -> None:
    """Asking for logprobs makes every logit exact, so it gives the tokens to compare with."""
    for seed in (1, 2):
        chosen = {}
        for logprobs in (0, 1):
            params = SamplingParams(**settings, seed=seed, logprobs=logprobs)
            sequence = engine.create()
            chosen[logprobs] = []
            for start in range(0, len(tokens), rows):
                part = tokens[start : start + rows]
                chosen[logprobs] += engine.step(sequence, part, len(part), params).tokens
            engine.release(sequence)
        assert chosen[0] == chosen[1]
        if settings.get("temperature") and settings.get("top_k") != 1 and settings["temperature"] > 0.5:
            assert len(set(chosen[0])) > 20, "samples that are all alike tell nothing"


def test_the_logits_of_a_pass_that_left_some_out_are_not_given(engine: Engine, tokens: list[int]) -> None:
    sequence = engine.create()
    engine.step(sequence, tokens[:4], 1, SamplingParams())
    with pytest.raises(_native.InputError, match="only the largest logits exactly"):
        engine.last_logits()
    engine.release(sequence)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    embedding = open_checkpoint(resolve("demo")).weights["embed"]
    damaged = replace(embedding, shape=(64, 640), data=embedding.data[: 64 * 680].copy())
    damaged.data[:2].view(np.float16)[:] = scale
    packer = Packer(_native.ThreadPool(1), "as-is", {"embed"})
    with pytest.raises(CheckpointError, match=r"damaged tensor 'token_embd\.weight': a weight is not finite\.$"):
        packer.matrix("embed", damaged)
