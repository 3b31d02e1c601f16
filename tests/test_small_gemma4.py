"""examples/small-gemma4, a trained Gemma 4 and its drafter: the same here, in PyTorch, transformers and as GGUF."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.training.data import Windows, python_library, split, token_stream
from gemma_mtp.training.evaluate import acceptance

from .parity import oracle

PAIR = Path(__file__).parents[1] / "examples" / "small-gemma4"
TEXT = 'def main(args):\n    """Crème, 中."""\n\n    return None\n\n\nclass Reader:\n    def read(self, size'

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def pair() -> Model:
    return Model.load(PAIR, threads=1)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("gguf")
    convert(PAIR, folder / "small-gemma4.gguf")
    convert(PAIR / "assistant", folder / "small-gemma4-assistant.gguf")
    return Model.load(folder / "small-gemma4.gguf", threads=1)


def test_the_files_are_those_that_were_made() -> None:
    sums = dict(reversed(line.split()) for line in (PAIR / "SHA256SUMS").read_text().splitlines())
    found = {name: hashlib.sha256((PAIR / name).read_bytes()).hexdigest() for name in sums}
    assert found == sums
    files = [file for file in PAIR.rglob("*") if file.is_file()]
    assert {file.relative_to(PAIR).as_posix() for file in files} == {*sums, "SHA256SUMS", "README.md"}
    assert sum(file.stat().st_size for file in files) < 20e6


def test_the_drafter_is_right_two_times_in_three_on_unseen_code(pair: Model) -> None:
    _, unseen = split(python_library())
    stream = token_stream(unseen, lambda text: pair.tokenize(text)[1:], end=1)
    prompts = Windows(stream, 64, first=2, seed=1).batch(12).tolist()
    assert acceptance(pair, prompts, SamplingParams(max_tokens=64)).rates[0] > 0.65


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_folder_and_gguf_say_the_same_with_and_without_drafting(pair: Model, gguf: Model, temperature: float) -> None:
    assert pair.drafter_name == "assistant"
    assert gguf.drafter_name.endswith("assistant")
    source = Path(json.__file__).read_text()
    assert pair.tokenize(source) == gguf.tokenize(source)
    assert gguf.detokenize(gguf.tokenize(source)) == source
    params = SamplingParams(max_tokens=64, temperature=temperature, seed=3)
    plain = pair.generate(TEXT, params, draft="off")
    drafted = [model.generate(TEXT, params, draft=3) for model in (pair, gguf)]
    assert [generation.tokens for generation in drafted] == [plain.tokens] * 2
    assert drafted[0].stats.accepted == drafted[1].stats.accepted > 10


def test_transformers_and_both_backends_agree() -> None:
    native, by_torch = (Model.load(PAIR, dtype="f32", threads=1, backend=backend) for backend in ("native", "torch"))
    tokens = native.tokenize(TEXT)
    assert AutoTokenizer.from_pretrained(PAIR)(TEXT)["input_ids"] == tokens
    target, drafter = oracle.load(PAIR), oracle.load(PAIR / "assistant")
    expected = oracle.run(target, tokens).logits
    for model in (native, by_torch):
        assert oracle.error(model.logits(tokens), expected) < 1e-4
    greedy = target.generate(torch.tensor([tokens]), max_new_tokens=32, do_sample=False)
    assisted = target.generate(torch.tensor([tokens]), assistant_model=drafter, max_new_tokens=32, do_sample=False)
    assert np.array_equal(greedy, assisted)
    for model in (native, by_torch):
        for draft in ("off", 3):
            assert (
                model.generate(tokens, SamplingParams(max_tokens=32), draft=draft).tokens
                == greedy[0, len(tokens) :].tolist()
            )
