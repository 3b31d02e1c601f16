"""examples/small_gemma4.py, run for half a minute: the pair works here, in transformers, and as GGUF."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.training.drafter import first_weights, output_embedding, with_embedding
from gemma_mtp.training.evaluate import acceptance
from gemma_mtp.training.export import write_folder
from gemma_mtp.training.optimise import initial_weights, on_device

from ..parity import oracle

TEXT = 'def main(args):\n    """Crème, 中."""\n\n    return None\n\n\nclass Reader:\n    def read(self, size'

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="module")
def pair(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "small-gemma4"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    example.make_pair(folder, minutes=0.5, seed=0)
    torch.set_num_threads(threads)
    return folder


def test_the_drafter_learns(pair: Path, tmp_path: Path) -> None:
    target, config = open_checkpoint(pair).config, open_checkpoint(pair / "assistant").config
    random = on_device(initial_weights(target))
    untrained = with_embedding(first_weights(config, target, random), output_embedding(random, target))
    described = json.loads((pair / "assistant" / "config.json").read_text())
    write_folder(tmp_path / "untrained", described, untrained)
    params = SamplingParams(max_tokens=64, temperature=1.0)
    rates = {}
    for drafter in (pair / "assistant", tmp_path / "untrained"):
        model = Model.load(pair, drafter=drafter, threads=1)
        prompts = [model.tokenize(TEXT[:end]) for end in (20, 40, 60, 80)]
        rates[drafter.name] = acceptance(model, prompts, params).rates[0]
    assert rates["assistant"] > rates["untrained"] + 0.1


def test_everything_is_found_and_fits_in_20_megabytes(pair: Path) -> None:
    assert Model.load(pair, threads=1).drafter_name == "assistant"
    assert Model.load(pair / "gguf" / "small-gemma4.gguf", threads=1).drafter_name.endswith("assistant")
    files = [file for folder in (pair, pair / "assistant") for file in folder.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    events = [json.loads(line)["event"] for line in (pair / "log.jsonl").read_text().splitlines()]
    assert {"data", "target trained", "target wrote", "files"} <= set(events)


def test_transformers_loads_both_with_equal_logits(pair: Path) -> None:
    model = Model.load(pair, dtype="f32", threads=1)
    tokens = model.tokenize(TEXT)
    assert AutoTokenizer.from_pretrained(pair)(TEXT)["input_ids"] == tokens
    target, drafter = oracle.load(pair), oracle.load(pair / "assistant")
    assert type(drafter).__name__ == "Gemma4AssistantForCausalLM"
    assert oracle.error(model.logits(tokens), oracle.run(target, tokens).logits) < 1e-4
    expected = oracle.draft(target, drafter, tokens, depth=3)
    sequence = model.engine.create()
    model.engine.step(sequence, tokens[:-1], 1, SamplingParams())
    assert model.engine.draft(sequence, 0, tokens[-1], 3, SamplingParams()).tokens == expected.tokens
    greedy = target.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)
    assisted = target.generate(torch.tensor([tokens]), assistant_model=drafter, max_new_tokens=12, do_sample=False)
    assert np.array_equal(greedy, assisted)
