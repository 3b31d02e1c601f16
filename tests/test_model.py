"""Model.load on everything but the demo: folders, multimodal checkpoints, and what cannot be loaded."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp import CheckpointError, Model, SamplingParams, SettingsError, _native
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.engine.engine import Engine

from .checkpoints.tiny import DRAFTER, TARGETS, random_weights, write_folder, write_gguf
from .text.vocabulary import metadata, reference, trained

VOCABULARY = {"vocab_size": len(trained()[0]), "vocab_size_per_layer_input": len(trained()[0])}
PROMPT = "The quick brown fox"


def add_tokenizer(folder: Path, kind: str) -> None:
    reference(kind).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    write_folder(folder, TARGETS["gemma3"] | VOCABULARY, eos_token_id=[1, 5])
    add_tokenizer(folder, "llama")
    return folder


def test_a_folder_and_a_gguf_of_one_model_say_the_same(folder: Path, tmp_path: Path) -> None:
    config = TARGETS["gemma3"] | VOCABULARY
    write_gguf(tmp_path / "model.gguf", config_from_hf(config), tokenizer=metadata("llama"))
    from_folder, from_file = Model.load(folder), Model.load(tmp_path / "model.gguf")
    assert from_folder.name == "tiny-gemma"
    assert from_folder.config.eos == (1, 5)
    ids = from_folder.tokenize(PROMPT)
    assert ids == from_file.tokenize(PROMPT)
    assert ids[0] == 2
    np.testing.assert_allclose(from_folder.logits(ids), from_file.logits(ids), rtol=1e-5, atol=1e-5)
    params = SamplingParams(max_tokens=16)
    assert from_folder.generate(PROMPT, params).text == from_file.generate(PROMPT, params).text


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.002), ("bf16", 0.02), ("Q8_0", 0.03), ("q5_1", 0.25)])
def test_matrices_are_quantised_as_they_are_loaded(folder: Path, dtype: str, tolerance: float) -> None:
    exact, quantised = Model.load(folder, dtype="f32"), Model.load(folder, dtype=dtype)
    weights = quantised.engine.weights
    matrices = [name for name, tensor in open_checkpoint(folder).weights.items() if len(tensor.shape) == 2]
    assert {weights.matrix(name).type for name in matrices} == {dtype.upper()}
    ids = exact.tokenize(PROMPT)
    expected = exact.logits(ids)
    off = np.sqrt(np.mean((quantised.logits(ids) - expected) ** 2)) / expected.std()
    assert 0 < off < tolerance


def test_an_unknown_dtype_is_an_error(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"There is no dtype 'q9': use one of as-is, f32, f16, .*, q4_0\.$"):
        Model.load(folder, dtype="q9")


def test_the_end_tokens_of_generation_config_end_a_generation(folder: Path, tmp_path: Path) -> None:
    ids = Model.load(folder).generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True)).tokens
    write_folder(tmp_path, TARGETS["gemma3"] | VOCABULARY, eos_token_id=[1, ids[4]])
    add_tokenizer(tmp_path, "llama")
    generation = Model.load(tmp_path).generate(PROMPT, SamplingParams(max_tokens=8))
    assert generation.tokens == ids[: ids.index(ids[4]) + 1]
    assert generation.finish_reason == "stop"


def test_a_multimodal_checkpoint_runs_as_text_and_says_what_it_skips(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"model_type": "gemma3", "text_config": TARGETS["gemma3"] | VOCABULARY}
    tower = {f"model.vision_tower.layers.{i}.weight": np.ones((4, 4), np.float32) for i in range(3)}
    write_folder(tmp_path, config, extra=tower)
    add_tokenizer(tmp_path, "llama")
    with caplog.at_level(logging.WARNING):
        model = Model.load(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is run as text: 3 tensors for images and sound are left aside."
    ]
    ids = model.tokenize(PROMPT)
    np.testing.assert_array_equal(model.logits(ids), Model.load(folder).logits(ids))


def test_a_vocabulary_that_is_no_list_is_one_sentence(tmp_path: Path) -> None:
    words = {**metadata("llama"), "tokenizer.ggml.tokens": 3}
    write_gguf(tmp_path / "model.gguf", config_from_hf(TARGETS["gemma3"] | VOCABULARY), tokenizer=words)
    with pytest.raises(CheckpointError, match=r"'tokenizer\.ggml\.tokens' is not a list of texts\.$"):
        Model.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("kind", ["gemma3", "E2B"])  # without and with a soft-cap, which bends all that is finite
def test_values_that_are_not_finite_are_one_sentence(tmp_path: Path, kind: str, backend: str) -> None:
    config = TARGETS[kind] | VOCABULARY
    for name, sentence in (
        ("2.attn_norm", r"'model\.layers\.2\.input_layernorm\.weight' with values that are not finite\.$"),
        ("embed", "The model's logits are not finite"),
    ):
        weights = random_weights(config_from_hf(config))
        weights[name][..., 7] = np.nan
        write_folder(tmp_path / name, config, weights)
        add_tokenizer(tmp_path / name, "llama")
        with pytest.raises(CheckpointError, match=sentence):
            Model.load(tmp_path / name, backend=backend, dtype="f32").generate(PROMPT, SamplingParams(max_tokens=2))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["embed", "ple_embed", "0.q", "0.attn_norm"])
def test_types_that_hold_no_weights_are_refused(tmp_path: Path, name: str, backend: str) -> None:
    config = TARGETS["E2B"] | VOCABULARY
    for kind in (np.int32, np.float64):
        weights = random_weights(config_from_hf(config))
        weights[name] = weights[name].astype(kind)
        write_folder(tmp_path / kind.__name__, config, weights)
        add_tokenizer(tmp_path / kind.__name__, "llama")
        with pytest.raises(CheckpointError, match=r"cannot be run|cannot be packed|I32|F64"):
            Model.load(tmp_path / kind.__name__, backend=backend)


def test_layers_that_read_anothers_keys_take_no_memory(tmp_path: Path) -> None:
    config = TARGETS["E2B"] | VOCABULARY
    write_folder(tmp_path, config)
    add_tokenizer(tmp_path, "llama")
    model = Model.load(tmp_path, context=128)
    engine = model.engine
    assert isinstance(engine, Engine)
    own = [layer for layer in model.config.layers if layer.shares_kv_with is None]
    assert len(own) < len(model.config.layers)
    assert engine.memory_for(128) == sum(2 * 2 * layer.kv_heads * layer.head_dim * 128 for layer in own)  # in float16
    with pytest.raises(_native.InputError, match="keeps no keys"):
        engine.keys_and_values(engine.create(), len(model.config.layers) - 1, 0, 0)


def test_a_drafter_alone_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, DRAFTER)
    with pytest.raises(CheckpointError, match="is a drafter: give it with its target"):
        Model.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, TARGETS["gemma3"])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist: a Hugging Face folder needs"):
        Model.load(tmp_path)


def test_the_drafter_beside_a_target_drafts_unless_it_is_declined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    target = TARGETS["E4B"] | VOCABULARY
    drafter = DRAFTER | {
        "backbone_hidden_size": target["hidden_size"],
        "text_config": DRAFTER["text_config"] | {"vocab_size": target["vocab_size"]},
        "use_ordered_embeddings": False,
    }
    names = {"owner/gemma": target, "owner/gemma-assistant": drafter}
    for name, config in names.items():
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0123")
        (home / "snapshots").mkdir()
        write_folder(home / "snapshots" / "0123", config)
        add_tokenizer(home / "snapshots" / "0123", "gemma4")
    found, declined = Model.load("owner/gemma"), Model.load("owner/gemma", drafter="none")
    assert (found.name, found.drafter_name, declined.drafter_name) == ("gemma", "gemma-assistant", "prompt-lookup")
    params = SamplingParams(max_tokens=24)
    drafted = found.generate(PROMPT, params, draft=3)
    assert drafted.stats.drafted > 0
    assert drafted.tokens == declined.generate(PROMPT, params, draft="off").tokens
