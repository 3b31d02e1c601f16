"""Packed checkpoints: the very bits of the checkpoint they were made of, and a sentence for every damaged file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_mtp import CheckpointError, Model, SamplingParams, SettingsError
from gemma_mtp.checkpoints.compact import open_drafter
from gemma_mtp.checkpoints.convert import PACKED, convert
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import PROJECTION, Checkpoint, open_checkpoint
from gemma_mtp.cli.inspect import describe
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.interface import Part

from .tiny import TARGETS, drafter_for, write_folder, write_gguf

TOKENS = np.random.default_rng(3).integers(3, 256, 40).tolist()
DRAFTED = 6
GEMMA4 = [kind for kind, config in TARGETS.items() if "gemma4" in config["model_type"]]


def packed(source: Path) -> Path:
    out = source.with_name(f"{source.name}.packed.safetensors")
    assert convert(source, out, PACKED) == [out]
    return out


def engine_of(target: Checkpoint, drafter: Checkpoint | None = None) -> Engine:
    engine = Engine(target.config, target.weights, threads=1, context=128)
    if drafter:
        engine.attach(drafter.config, drafter.weights)
    return engine


def drafts(engine: Engine) -> list[int]:
    params, sequence = SamplingParams(), engine.create()
    (chosen,) = engine.run([Part(sequence, TOKENS, 1, params)])
    return engine.draft(sequence, 0, chosen.tokens[0], DRAFTED, params).tokens


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("weights", ["F32", "Q8_0", "Q4_0"])
def test_logits_are_those_of_the_checkpoint_bit_for_bit(tmp_path: Path, kind: str, weights: str) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, config_from_hf(TARGETS[kind]), kind=weights)
    before, after = open_checkpoint(source), open_checkpoint(packed(source))
    assert after.config == before.config
    assert after.packed
    assert not before.packed
    np.testing.assert_array_equal(engine_of(after).logits(TOKENS), engine_of(before).logits(TOKENS))


@pytest.mark.parametrize("kind", GEMMA4)
@pytest.mark.parametrize("centroids", [False, True], ids=["full head", "centroid head"])
def test_a_drafter_drafts_the_same(tmp_path: Path, kind: str, centroids: bool) -> None:
    write_gguf(tmp_path / "model.gguf", config_from_hf(TARGETS[kind]), kind="Q8_0")
    config = config_from_hf(drafter_for(TARGETS[kind], centroids=centroids, hidden=64))
    write_gguf(tmp_path / "drafter.gguf", config, kind="Q8_0")
    target, drafter = tmp_path / "model.gguf", tmp_path / "drafter.gguf"
    expected = drafts(engine_of(open_checkpoint(target), open_checkpoint(drafter)))
    assert drafts(engine_of(open_checkpoint(packed(target)), open_checkpoint(packed(drafter)))) == expected


def test_the_demo_is_the_same_packed(demo: Model, tmp_path: Path) -> None:
    out = tmp_path / "demo.safetensors"
    convert(resolve("demo"), out, PACKED)
    model = Model.load(out, drafter="demo", threads=2)
    assert (model.name, model.drafter_name) == (demo.name, demo.drafter_name)
    text = "def double(numbers):\n    result = []\n    for number in numbers:\n        result."
    ids = demo.tokenize(text)
    assert model.tokenize(text) == ids
    np.testing.assert_array_equal(model.logits(ids), demo.logits(ids))
    for settings in ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}):
        params = SamplingParams(max_tokens=24, **settings)
        expected = demo.generate(text, params, draft="off").tokens
        assert model.generate(text, params, draft=4).tokens == expected
    assert describe("demo", out, None)["layout"] == "packed"
    with pytest.raises(CheckpointError, match="is packed already"):
        convert(out, tmp_path / "again.gguf")
    with pytest.raises(SettingsError, match="runs with the types it has"):
        Model.load(out, dtype="q4_0")


@pytest.mark.parametrize("projected", [True, False], ids=["projected", "as wide"])
def test_a_compact_drafter_opens_with_a_packed_target(tmp_path: Path, projected: bool) -> None:
    target = TARGETS["E2B"]
    width = target["hidden_size"]
    write_folder(tmp_path / "small", drafter_for(target, centroids=False, hidden=64 if projected else width))
    tensors = load_file(tmp_path / "small/model.safetensors")
    del tensors["model.embed_tokens.weight"]
    if projected:
        tensors[PROJECTION] = np.random.default_rng(0).standard_normal((64, width)).astype(np.float32)
    save_file(tensors, tmp_path / "small/model.safetensors")
    made = []
    write_gguf(tmp_path / "target.gguf", config_from_hf(target), kind="Q8_0")
    for number, source in enumerate((tmp_path / "target.gguf", packed(tmp_path / "target.gguf"))):
        opened = open_drafter(tmp_path / "small", open_checkpoint(source), tmp_path / f"cache{number}")
        made.append(opened.weights["embed"].data)
    np.testing.assert_array_equal(*made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed checkpoint."""
    source = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(source, config_from_hf(TARGETS["E4B"]), kind="Q8_0")
    return packed(source).read_bytes()


def test_other_programs_open_the_container(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(whole)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["blk.0.attn_q.weight"].dtype == np.uint8
    assert tensors["blk.0.attn_norm.weight"].dtype == np.float32


def edited(data: bytes, change: Callable[[dict, dict], None], shift: int = 0) -> bytes:
    """The file with its header changed, and `shift` bytes more before the tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    listed = json.loads(header["__metadata__"]["matrices"])
    change(header, listed)
    header["__metadata__"]["matrices"] = json.dumps(listed)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64 + shift)
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def set_entry(name: str, **changes: object) -> Callable[[dict, dict], None]:
    def change(header: dict, listed: dict) -> None:
        entry = dict(zip(("layout", "type", "shape"), listed[name], strict=True)) | changes
        listed[name] = [entry["layout"], entry["type"], entry["shape"]]

    return change


def set_metadata(**changes: object) -> Callable[[dict, dict], None]:
    return lambda header, listed: header["__metadata__"].update(changes)


Q = "blk.0.attn_q.weight"
EMBED = "token_embd.weight"
DAMAGED: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "of another format": (set_metadata(format="pt"), "no packed checkpoint"),
    "of another version": (set_metadata(version="1"), "version '1' of the format"),
    "without a version": (lambda header, _: header["__metadata__"].pop("version"), "version None of the format"),
    "without metadata": (lambda header, _: header.pop("gguf"), "not the model's metadata"),
    "metadata that is none": (lambda header, _: header.update(gguf=header[Q]), "letters GGUF"),
    "an entry that is none": (lambda _, listed: listed.update({Q: 7}), "makes no sense"),
    "a matrix that is not there": (lambda header, _: header.pop(Q), "makes no sense"),
    "a matrix that is not listed": (lambda _, listed: listed.pop(Q), "shape"),
    "an unknown layout": (set_entry(Q, layout="columns"), "makes no sense"),
    "an unknown type": (set_entry(Q, type="Q9"), "makes no sense"),
    "a type without a size": (set_entry(Q, type=["Q8_0"]), "makes no sense"),
    "columns that no block fits": (set_entry(Q, shape=[128, 65]), "makes no sense"),
    "too few rows": (set_entry(Q, shape=[64, 64]), "bytes of the packed matrix"),
    "far too many rows": (set_entry(Q, shape=[2**62, 64]), "bytes of the packed matrix"),
    "no rows": (set_entry(Q, shape=[0, 64]), "makes no sense|bytes of the packed matrix"),
    "a product that overflows": (set_entry(Q, shape=[2**62, 2**62, 64]), "bytes of the packed matrix"),
    "another shape of that size": (set_entry(Q, shape=[64, 128]), "shape"),
    "two parts where none are read": (set_entry(Q, layout="split"), "bytes of the packed matrix"),
    "two parts of another type": (set_entry(EMBED, type="Q4_0"), "makes no sense"),
    "a table that is packed": (set_entry("per_layer_token_embd.weight", layout="packed"), "layout|no multiple"),
    "centroids of a target": (set_entry(Q, layout="by centroid"), "makes no sense"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_a_sentence(whole: bytes, tmp_path: Path, name: str) -> None:
    change, words = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(edited(whole, change))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(caught.value).endswith(".")


def test_misplaced_matrices_are_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(edited(whole, lambda *_: None, shift=4))
    with pytest.raises(CheckpointError, match="no multiple of 64"):
        open_checkpoint(path)


def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in [0, 3, 9, 100, *range(1000, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_errors_of_an_output_embedding_that_are_no_numbers_are_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    tensor = open_checkpoint(path).weights["embed"]
    assert tensor.layout == "split"
    damaged = bytearray(whole)
    rows, cols = tensor.shape
    end = tensor.offset + tensor.nbytes - rows * cols // 32  # the errors' shares come last
    damaged[end - 4 : end] = struct.pack("<f", float("nan"))
    path.write_bytes(damaged)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="an error that is no number"):
        Engine(checkpoint.config, checkpoint.weights, threads=1, context=64)


def test_any_byte_of_the_header_may_be_wrong(whole: bytes, tmp_path: Path) -> None:
    """Whatever is changed, the file opens and runs, or is refused: it crashes nothing."""
    rng = np.random.default_rng(7)
    length = struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "model.safetensors"
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(rng.integers(8 + length))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            Engine(checkpoint.config, checkpoint.weights, threads=1, context=64).logits(TOKENS[:3])
        except CheckpointError:
            continue
