import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gemma_mtp.checkpoints.safetensors import open_folder, open_safetensors
from gemma_mtp.errors import CheckpointError


def write(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_tensors_are_those_the_library_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 4),
        "bf16": torch.randn(5, 2, 2).bfloat16(),
        "f16": torch.randn(7).half(),
        "i64": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_folder(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert info.type == name.upper().replace("EMPTY", "F32").replace("SCALAR", "F32")
        assert info.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(info.data, tensor.reshape(-1).view(torch.uint8).numpy())


FAULTS = {
    "not an object": ({"a": 3}, "makes no sense"),
    "no type": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "makes no sense"),
    "unknown type": (entry("F3"), "makes no sense"),
    "type a list": (entry(["F32"]), "makes no sense"),
    "shape negative": (entry(shape=(-2, -2)), "makes no sense"),
    "shape a fraction": (entry(shape=(2.0, 2)), "makes no sense"),
    "shape true": (entry(shape=(True, 4)), "makes no sense"),
    "shape overflows": (entry(shape=(2**62, 2**62, 4)), "makes no sense"),
    "too many dimensions": (entry(shape=[1] * 9), "makes no sense"),
    "offsets reversed": (entry(offsets=(16, 0)), "makes no sense"),
    "one offset": (entry(offsets=(16,)), "makes no sense"),
    "another size": (entry(offsets=(0, 12)), "makes no sense"),
    "beyond the file": (entry(offsets=(4, 20)), "ends before its tensor 'a'"),
    "twice": (b'{"a": 1, "a": 2}', "same key twice"),
    "not json": (b"{", "JSON that cannot be read"),
    "not text": (b"\xff\xff", "JSON that cannot be read"),
    "a list": ([], "not an object"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_header_gives_one_sentence(tmp_path: Path, name: str) -> None:
    header, fault = FAULTS[name]
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=fault) as caught:
        open_safetensors(path)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("length", [17 + 2**20, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_said(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"claims a header of {length} bytes"):
        open_safetensors(write(tmp_path / "model.safetensors", {}, length=length))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 200), patch=st.binary(min_size=1, max_size=4))
def test_any_edit_opens_or_is_an_error(tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes) -> None:
    path = write(tmp_path_factory.mktemp("edited") / "model.safetensors", entry())
    data = bytearray(path.read_bytes())
    data[at % len(data) : at % len(data) + len(patch)] = patch
    path.write_bytes(data)
    try:
        tensors = open_safetensors(path)
    except CheckpointError:
        return
    assert all(info.offset + info.nbytes <= len(data) for info in tensors.values())


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, place: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match="no usable 'weight_map'"):
        open_folder(tmp_path)


def test_shards_that_do_not_fit_their_index_are_said(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors does not exist"):
        open_folder(tmp_path)
    write(tmp_path / "x.safetensors", entry())
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors lacks the tensor 'b' that model\.safetensors\.index\.json"
    ):
        open_folder(tmp_path)
