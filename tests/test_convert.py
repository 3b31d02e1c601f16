"""Checkpoints to GGUF and back: the same configuration, the same weights, the same tokens."""

import dataclasses
import errno
import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma_mtp import CheckpointError, Model, SamplingParams, _native
from gemma_mtp.checkpoints import files
from gemma_mtp.checkpoints.convert import PACKED, convert
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.text.chat import ChatTemplate
from gemma_mtp.text.tokenizer import Tokenizer

from .checkpoints.tiny import DRAFTER, TARGETS, Weights, random_weights, write_folder, write_gguf
from .text.corpus import CORPUS
from .text.vocabulary import metadata, reference, trained

SIZE = len(trained()[0])
TEMPLATE = "{{ bos_token }}{% for message in messages %}<|turn>{{ message.content }}<turn|>{% endfor %}"


def config_of(kind: str, **more: object) -> dict:
    """A tiny target's config.json, with as many tokens as the test vocabulary."""
    config = TARGETS[kind] | {"vocab_size": SIZE} | more
    return config | ({"vocab_size_per_layer_input": SIZE} if config.get("hidden_size_per_layer_input") else {})


def folder_of(path: Path, config: dict, **generation: object) -> Weights:
    """A Hugging Face folder with a tokenizer and a chat template; returns its weights."""
    weights = write_folder(path, config, **generation)
    reference("llama" if config["model_type"].startswith("gemma3") else "gemma4").save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": {"content": "<unk>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return weights


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint.weights[name]
    if tensor.type in ("I64", "I32"):
        return tensor.data.view({"I64": "<i8", "I32": "<i4"}[tensor.type])
    return _native.dequantize(tensor.type, tensor.data, int(np.prod(tensor.shape))).reshape(tensor.shape)


def same_config(found: object, expected: ModelConfig | DrafterConfig) -> None:
    """Equal, but for numbers that GGUF has as float32."""
    assert isinstance(found, type(expected))
    assert found.eps == pytest.approx(expected.eps)
    rounded = {"eps": expected.eps}
    if isinstance(found, ModelConfig):
        assert found.attention_scale == pytest.approx(expected.attention_scale)
        rounded["attention_scale"] = expected.attention_scale
    assert dataclasses.replace(found, **rounded) == expected


@pytest.mark.parametrize("kind", TARGETS)
def test_a_folder_comes_back_from_gguf(tmp_path: Path, kind: str) -> None:
    config = config_of(kind)
    weights = folder_of(tmp_path / "hf", config, eos_token_id=[1, 5, 4])
    out = tmp_path / "model.gguf"
    assert convert(tmp_path / "hf", out) == [out]
    before, after = open_checkpoint(tmp_path / "hf"), open_checkpoint(out)
    assert isinstance(before.config, ModelConfig)
    assert before.config.eos == (1, 5, 4)
    same_config(after.config, before.config)
    assert after.weights.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_allclose(values(after, name), expected.reshape(values(after, name).shape), rtol=1e-6)
        np.testing.assert_array_equal(values(after, name), values(before, name), name)


@pytest.mark.parametrize("kind", TARGETS)
def test_keys_and_tensors_are_those_of_llama_cpps_converter(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path / "hf", config_of(kind))
    convert(tmp_path / "hf", tmp_path / "ours.gguf", "q8_0")
    write_gguf(tmp_path / "theirs.gguf", config_from_hf(config_of(kind)), tokenizer=metadata("llama"))
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), gguf.GGUFReader(tmp_path / "theirs.gguf")
    for name, field in theirs.fields.items():
        if name.startswith("gemma"):
            assert np.all(ours.fields[name].contents() == np.array(field.contents())), name
    shapes = {tensor.name: tuple(tensor.shape) for tensor in ours.tensors}
    assert shapes == {tensor.name: tuple(tensor.shape) for tensor in theirs.tensors}
    for tensor in ours.tensors:
        plain = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if plain else "Q8_0"), tensor.name
    assert ours.fields["general.file_type"].contents() == 7


@pytest.mark.parametrize("kind", ["gemma3", "E2B", "26B-A4B"])
def test_a_folder_packed_is_the_same_model(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path / "hf", config_of(kind), eos_token_id=[1, 5, 4])
    out = tmp_path / "model.safetensors"
    assert convert(tmp_path / "hf", out, PACKED) == [out]
    assert convert(tmp_path / "hf", out, PACKED, force=True) == [out]
    before, after = Model.load(tmp_path / "hf", threads=1), Model.load(out, threads=1)
    assert after.has_chat_template
    assert after.tokenizer.eos_ids == before.tokenizer.eos_ids
    for text in CORPUS:
        ids = before.tokenize(text)[:100]
        assert after.tokenize(text)[:100] == ids
    np.testing.assert_array_equal(after.logits(ids), before.logits(ids))
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=2, ignore_eos=True)
    prompt = [{"role": "user", "content": "one two one two one"}]
    expected = before.generate(prompt, params, draft="off").tokens
    assert after.generate(prompt, params, draft=3).tokens == expected


def test_gemma3_norms_are_stored_as_their_factor(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f16")
    stored = GGUF.open(tmp_path / "model.gguf").tensors["blk.2.attn_norm.weight"]
    assert stored.type == "F32"
    expected = random_weights(config_from_hf(config_of("gemma3")))["2.attn_norm"]
    np.testing.assert_allclose(stored.data.view("<f4"), expected, rtol=1e-6)


def test_a_drafter_keeps_its_centroid_head_beside_it(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "hf", DRAFTER)
    out = tmp_path / "assistant.q8_0.gguf"
    beside = tmp_path / "assistant.q8_0.centroids.safetensors"
    assert convert(tmp_path / "hf", out) == [out, beside]
    assert not [name for name in GGUF.open(out).tensors if "masked" in name]
    after = open_checkpoint(out)
    same_config(after.config, config_from_hf(DRAFTER))
    assert after.weights.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_array_equal(values(after, name), expected, name)
    # From GGUF once more, quantised: the head stays as it is.
    again = tmp_path / "again.gguf"
    convert(out, again, "q8_0")
    for name in ("centroids", "token_ordering"):
        np.testing.assert_array_equal(values(open_checkpoint(again), name), weights[name])
    assert open_checkpoint(again).weights["0.q"].type == "Q8_0"
    beside.unlink()
    without = open_checkpoint(out).config
    assert isinstance(without, DrafterConfig)
    assert without.centroids is None


def test_a_drafter_without_centroids_takes_none_from_an_earlier_file(tmp_path: Path) -> None:
    out = tmp_path / "drafter.gguf"
    write_folder(tmp_path / "hf", DRAFTER)
    convert(tmp_path / "hf", out)
    plain = {key: value for key, value in DRAFTER.items() if key != "use_ordered_embeddings"}
    write_folder(tmp_path / "plain", plain)
    out.unlink()
    with pytest.raises(CheckpointError, match=r"drafter\.centroids\.safetensors exists already: use --force"):
        convert(tmp_path / "plain", out)
    assert convert(tmp_path / "plain", out, force=True) == [out]
    same_config(open_checkpoint(out).config, config_from_hf(plain))


@pytest.mark.parametrize("kind", ["gemma3", "31B"])
def test_the_tokenizer_comes_along(tmp_path: Path, kind: str) -> None:
    folder_of(tmp_path / "hf", config_of(kind))
    convert(tmp_path / "hf", tmp_path / "model.gguf")
    said = GGUF.open(tmp_path / "model.gguf").metadata
    before, after = Tokenizer.from_folder(tmp_path / "hf"), Tokenizer.from_gguf(said)
    for text in [*CORPUS, "[x] <|turn>a\n\n\n  b<turn|>", "🦙 ś"]:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert (after.bos_id, after.pad_id, after.eos_ids) == (before.bos_id, before.pad_id, before.eos_ids)
    assert after.special_ids == before.special_ids
    assert ChatTemplate.from_gguf(said, after).source == TEMPLATE
    if kind == "gemma3":
        scores, kinds = np.array(said["tokenizer.ggml.scores"]), np.array(said["tokenizer.ggml.token_type"])
        merged = scores[(kinds == 1) & (scores != -1000)]
        assert np.all(np.diff(merged) < 0)


def test_more_rows_than_tokens_are_padded(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3", vocab_size=SIZE + 3))
    convert(tmp_path / "hf", tmp_path / "model.gguf")
    said = GGUF.open(tmp_path / "model.gguf").metadata
    assert said["tokenizer.ggml.tokens"].tolist()[-1] == f"[PAD{SIZE + 2}]"
    assert said["tokenizer.ggml.token_type"][-1] == 5


def test_gguf_to_gguf_keeps_its_keys(tmp_path: Path) -> None:
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    config = config_from_hf(config_of("E2B"))
    more = {"general.name": "A name", "tokenizer.chat_template": TEMPLATE}
    write_gguf(source, config, tokenizer=metadata("gemma4") | more)
    said = dict(GGUF.open(source).metadata)
    convert(source, out, "q5_0")
    kept = GGUF.open(out).metadata
    for key, value in said.items():
        if hasattr(value, "__len__") and not isinstance(value, str):
            assert list(kept[key]) == list(value), key
        else:
            assert kept[key] == value, key
    assert kept["general.file_type"] == 8
    assert open_checkpoint(out).weights["ple_embed"].type == "Q5_0"


def test_converting_first_or_while_loading_gives_the_same_bits(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    for dtype in ("q8_0", "q4_0", "bf16"):
        out = tmp_path / f"{dtype}.gguf"
        convert(tmp_path / "hf", out, dtype)
        first, loading = Model.load(out), Model.load(tmp_path / "hf", dtype=dtype)
        ids = loading.tokenize("The quick brown fox")
        assert ids == first.tokenize("The quick brown fox")
        np.testing.assert_array_equal(first.logits(ids), loading.logits(ids))


def test_a_width_that_does_not_fit_falls_to_the_next_better_type(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3", intermediate_size=256, hidden_size=80))
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "hf", tmp_path / "model.gguf", "q4_k")
    assert sorted(record.getMessage() for record in caplog.records) == [
        "Matrices of 128 columns become Q5_0, because the type Q4_K needs a multiple of 256.",
        "Matrices of 80 columns become F16, because the type Q4_K needs a multiple of 256.",
    ]
    weights = open_checkpoint(tmp_path / "model.gguf").weights
    assert [weights[name].type for name in ("0.down", "0.o", "0.q")] == ["Q4_K", "Q5_0", "F16"]


def test_files_that_are_there_stay_without_force(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    with pytest.raises(CheckpointError, match=r"model\.gguf exists already: use --force to replace it\.$"):
        convert(tmp_path / "hf", out)
    assert out.read_text() == "precious"
    convert(tmp_path / "hf", out, force=True)
    convert(out, out, "q8_0", force=True)  # onto itself: the open file lives on until it is read
    assert open_checkpoint(out).weights["0.q"].type == "Q8_0"
    with pytest.raises(CheckpointError, match="cannot be written: its folder does not exist"):
        convert(tmp_path / "hf", tmp_path / "no" / "model.gguf")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "hf", DRAFTER)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"drafter\.gguf cannot be written: the disk is full\.$"):
        convert(tmp_path / "hf", tmp_path / "drafter.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    config = config_of("gemma3")
    weights = random_weights(config_from_hf(config))
    weights["3.up"][5, 7] = np.nan
    write_folder(tmp_path / "hf", config, weights)
    reference("llama").save(str(tmp_path / "hf" / "tokenizer.json"))
    fault = r"'model\.layers\.3\.mlp\.up_proj\.weight' that cannot become Q8_0: a weight is not a finite number\.$"
    with pytest.raises(CheckpointError, match=fault):
        convert(tmp_path / "hf", tmp_path / "model.gguf", "q8_0")
    assert not list(tmp_path.glob("model.gguf*"))
    with pytest.raises(CheckpointError, match=fault):
        Model.load(tmp_path / "hf", dtype="q8_0")


def test_a_target_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", config_of("gemma3"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        convert(tmp_path / "hf", tmp_path / "model.gguf")
