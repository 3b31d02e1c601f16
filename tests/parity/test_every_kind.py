"""Engines in float32 against transformers, on a tiny random checkpoint of every kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.decoding import SamplingParams
from gemma_mtp.decoding.drafting import Draft, Ends
from gemma_mtp.engine.engine import Engine, SequenceState
from gemma_mtp.engine.torch_engine import TorchEngine
from gemma_mtp.models.decoder import decode
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights

from ..checkpoints.tiny import TARGETS, drafter_for, random_weights, write_folder, write_gguf
from . import oracle

LENGTH = 90  # tokens of the prompt: past the window of 32, and no multiple of anything
STEPS = 64
TOLERANCE = 1e-4  # of the largest value
GREEDY = SamplingParams()
HEADS = {"full head": False, "centroid head": True}
GEMMA4 = [kind for kind, config in TARGETS.items() if "gemma4" in config["model_type"]]  # Google drafts for these

pytestmark = pytest.mark.usefixtures("one_torch_thread")
EngineFor = Callable[..., Any]



class Files(NamedTuple):
    """One random model as transformers has it, and the same weights in both formats."""

    reference: PreTrainedModel
    folder: Path
    gguf: Path


@pytest.fixture(scope="module")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Any]], Files]:
    made: dict[str, Files] = {}

    def files(config: Mapping[str, Any]) -> Files:
        key = repr(config)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            weights = write_folder(folder, config)
            gguf = tmp_path_factory.mktemp("gguf") / "model.gguf"
            write_gguf(gguf, open_checkpoint(folder).config, weights)
            made[key] = Files(oracle.load(folder), folder, gguf)
        return made[key]

    return files


def torch_engine(target: Path, drafter: Path | None = None) -> TorchEngine:
    checkpoint = open_checkpoint(target)
    engine = TorchEngine(checkpoint.config, checkpoint.weights, context=256, dtype="f32", device="cpu")
    if drafter:
        checkpoint = open_checkpoint(drafter)
        engine.attach(checkpoint.config, checkpoint.weights)
    return engine


class NativeEngine(Engine):
    """Tells each step of its last draft by drafting once more for every one."""

    def draft(
        self,
        sequence: SequenceState,
        row: int,
        token: int,
        depth: int,
        params: SamplingParams,
        ends: Ends | None = None,
    ) -> Draft:
        self._last = (sequence, row, token)
        self._depth = depth
        return super().draft(sequence, row, token, depth, params, ends)

    def last_draft(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.drafter is not None
        logits = np.full((self._depth, self.config.vocab), -np.inf, np.float32)
        states = []
        for step in range(self._depth):
            super().draft(*self._last, step + 1, GREEDY)
            tokens, scores = zip(*self.drafter.logits(), strict=True)
            logits[step, tokens] = scores
            states.append(self.drafter.next_state()[0])
        return logits, np.stack(states)


def native_engine(target: Path, drafter: Path | None = None) -> NativeEngine:
    checkpoint = open_checkpoint(target)
    engine = NativeEngine(checkpoint.config, checkpoint.weights, threads=2, context=256, dtype="f32")
    if drafter:
        checkpoint = open_checkpoint(drafter)
        engine.attach(checkpoint.config, checkpoint.weights, "f32")
    return engine


@pytest.fixture(params=[native_engine, torch_engine])
def engine_for(request: pytest.FixtureRequest) -> EngineFor:
    """Makes an engine in float32 of a target's folder or GGUF file, and of a drafter's if there is one."""
    return request.param


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(1).integers(3, 256, LENGTH).tolist()


def formats(files: Files) -> dict[str, Path]:
    return {"folder": files.folder, "GGUF": files.gguf}


@pytest.mark.parametrize("kind", TARGETS)
def test_logits_and_hidden_states_are_those_of_transformers(
    engine_for: EngineFor, files_of: Callable, tokens: list[int], kind: str
) -> None:
    files = files_of(TARGETS[kind])
    expected = oracle.run(files.reference, tokens)
    for name, path in formats(files).items():
        engine = engine_for(path)
        logits = oracle.error(engine.logits(tokens), expected.logits)
        hidden = oracle.error(engine.hidden(tokens), expected.hidden)
        print(f"{kind}, {name}: relative error of logits {logits:.1e}, of hidden states {hidden:.1e}")
        assert logits < TOLERANCE
        assert hidden < TOLERANCE


@pytest.mark.parametrize("kind", ["gemma3", "E2B", "26B-A4B"])
def test_a_quantised_file_is_run_as_the_values_it_stands_for(
    engine_for: EngineFor, tmp_path: Path, tokens: list[int], kind: str
) -> None:
    config = config_from_hf(TARGETS[kind])
    weights = random_weights(config)
    rounded = {
        name: dequantize(quantize(value, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        if value.ndim > 1 and not name.endswith("router")
        else value
        for name, value in weights.items()
    }
    write_folder(tmp_path, TARGETS[kind], rounded)
    write_gguf(tmp_path / "model.gguf", config, weights, kind="Q8_0")
    expected = oracle.run(oracle.load(tmp_path), tokens)
    assert oracle.error(engine_for(tmp_path / "model.gguf").logits(tokens), expected.logits) < TOLERANCE


@pytest.mark.parametrize("kind", TARGETS)
def test_greedy_tokens_are_those_of_transformers(
    engine_for: EngineFor, files_of: Callable, tokens: list[int], kind: str
) -> None:
    files = files_of(TARGETS[kind])
    engine = engine_for(files.folder)
    sequence = engine.create()
    text = [*tokens, *engine.step(sequence, tokens, 1, GREEDY).tokens]
    for _ in range(STEPS - 1):
        text += engine.step(sequence, text[-1:], 1, GREEDY).tokens
    # A text is greedy when each of its tokens is the likeliest after those before it.
    likeliest = oracle.run(files.reference, text).logits.argmax(axis=1)
    assert text[LENGTH:] == likeliest[LENGTH - 1 : -1].tolist()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", GEMMA4)
def test_drafts_are_those_of_transformers(
    engine_for: EngineFor, files_of: Callable, tokens: list[int], kind: str, head: str
) -> None:
    target = files_of(TARGETS[kind])
    drafter = files_of(drafter_for(TARGETS[kind], centroids=HEADS[head]))
    for length in (2, 20, 33, 34, LENGTH):  # the window of 32 shut, just full, open
        expected = oracle.draft(target.reference, drafter.reference, tokens[:length], depth=5)
        for name, path in formats(drafter).items():
            engine = engine_for(formats(target)[name], path)
            sequence = engine.create()
            engine.step(sequence, tokens[: length - 1], 1, GREEDY)
            drafted = engine.draft(sequence, 0, tokens[length - 1], 5, GREEDY)
            logits, hidden = engine.last_draft()
            errors = oracle.error(logits, expected.logits), oracle.error(hidden, expected.hidden)
            print(f"{kind}, {head}, {name}, {length} tokens: relative errors of logits, states {errors}")
            assert drafted.tokens == expected.tokens
            assert max(errors) < TOLERANCE


def test_transformers_shows_a_drafter_two_keys_more_at_the_edge_of_the_window(files_of: Callable) -> None:
    """Where oracle.draft departs from transformers: if this changes, look there again."""
    drafter = files_of(drafter_for(TARGETS["E4B"], centroids=False)).reference
    keys = torch.zeros(1, 1, LENGTH - 1, 32)
    shared = {"full_attention": (keys, keys), "sliding_attention": (keys, keys)}
    mask = drafter.create_attention_masks(torch.zeros(1, 1, 48), None, shared)["sliding_attention"][0, 0, 0]
    newest, window = LENGTH - 1, 32
    assert mask.nonzero().flatten().tolist() == list(range(newest - 1 - window, newest))


@pytest.mark.parametrize("kind", ["gemma3", "E4B", "12B unified", "26B-A4B"])
def test_gradients_are_those_of_transformers(files_of: Callable, tokens: list[int], kind: str) -> None:
    files = files_of(TARGETS[kind])
    files.reference.zero_grad()
    checkpoint = open_checkpoint(files.folder)
    config = checkpoint.config
    weights = TorchWeights(checkpoint.weights, torch.device("cpu"), torch.float32)
    names = {"embed": "embed_tokens.weight", "0.q": "layers.0.self_attn.q_proj.weight"}
    names |= {"1.k": "layers.1.self_attn.k_proj.weight", "0.ffn_norm": "layers.0.pre_feedforward_layernorm.weight"}
    if kind == "26B-A4B":
        names |= {"2.experts_down": "layers.2.experts.down_proj", "2.router": "layers.2.router.proj.weight"}
    for name in names:
        weights[name].requires_grad_()
    rows = Pass(tokens, 0, PassCache(), outputs=LENGTH)
    for logits in (
        decode(TorchOps(weights, config.eps, rows), config).logits,
        files.reference(torch.tensor([tokens]), use_cache=False).logits[0],
    ):
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).backward()
    for name, of_reference in names.items():
        found, expected = weights[name].grad, files.reference.model.get_parameter(of_reference).grad
        assert found is not None
        assert oracle.error(found.numpy(), expected.numpy()) < TOLERANCE, name
