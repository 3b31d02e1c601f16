"""The drafter that comes with the package: the files that were made, and a drafter that helps."""

import hashlib
import json

import pytest

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.demo import DRAFTER
from gemma_mtp.prompts import NINE_KINDS
from gemma_mtp.training.evaluate import acceptance

SAMPLED = SamplingParams(max_tokens=48, temperature=1.0, top_k=64, top_p=0.95)


def test_its_files_are_those_that_were_made() -> None:
    lines = (DRAFTER / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert {"config.json", "model.safetensors", "training.json", "log.jsonl"} <= set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((DRAFTER / name).read_bytes()).hexdigest() == digest, name
    assert sum_of_sizes() < 30e6
    assert json.loads((DRAFTER / "training.json").read_text())["target"] == "demo"


def sum_of_sizes() -> int:
    return sum(file.stat().st_size for file in DRAFTER.iterdir())


def test_it_drafts_for_the_demo(demo: Model) -> None:
    assert demo.drafter_name == DRAFTER.name
    prompts = [demo.tokenize(text) for text in NINE_KINDS.values()]
    rates = acceptance(demo, prompts, SAMPLED, depth=1).rates
    assert rates[0] > 0.3


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=64), SAMPLED], ids=["greedy", "sampled"])
def test_it_never_changes_the_text(demo: Model, params: SamplingParams) -> None:
    prompt = NINE_KINDS["explain"]
    plain = demo.generate(prompt, params, draft="off")
    for draft in (1, 4, "auto"):
        assert demo.generate(prompt, params, draft=draft).tokens == plain.tokens
