import collections
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.errors import CheckpointError

from .damaged import DAMAGED
from .gguf_files import BOOL, STRING, U32, File, array, scalar, tensor


def open_bytes(folder: Path, data: bytes, name: str = "model.gguf") -> GGUF:
    path = folder / name
    path.write_bytes(data)
    return GGUF.open(path)


def assert_one_sentence(error: CheckpointError, path: Path) -> None:
    message = str(error)
    assert message.startswith(f"{path} "), message
    assert message.endswith(".")
    assert "\n" not in message
    assert message.isprintable()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_one_sentence_naming_file_and_fault(tmp_path: Path, name: str) -> None:
    data, fault = DAMAGED[name]
    with pytest.raises(CheckpointError, match=fault) as caught:
        open_bytes(tmp_path, data)
    assert_one_sentence(caught.value, tmp_path / "model.gguf")


VALID = bytes(
    File(
        pairs=[
            scalar("general.architecture", STRING, "gemma3"),
            array("tokens", STRING, ["", "a", "né", "▁word"]),
            array("flags", BOOL, [True, False]),
            scalar("general.alignment", U32, 32),
        ],
        tensors=[tensor("a", [32, 2], 2, 0), tensor("b", [8], 0, 64)],
        data=bytes(range(96)),
    )
)


@pytest.mark.parametrize("length", range(len(VALID)))
def test_every_truncation_is_an_error(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_bytes(tmp_path, VALID[:length])
    assert_one_sentence(caught.value, tmp_path / "model.gguf")


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)
)
def test_any_edit_opens_within_the_file_or_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(VALID)
    for at, patch in edits:
        data[at : at + len(patch)] = patch
    folder = tmp_path_factory.mktemp("edited")
    try:
        file = open_bytes(folder, bytes(data))
    except CheckpointError as error:
        assert_one_sentence(error, folder / "model.gguf")
    else:
        for info in file.tensors.values():
            assert info.data.nbytes == info.nbytes
            assert info.offset + info.nbytes <= len(data)
        for value in file.metadata.values():
            if not isinstance(value, str | int | float):
                list(value)


def test_metadata_and_tensors_are_those_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "gemma4")
    scalars = {
        "u8": 200,
        "i8": -3,
        "u16": 60_000,
        "i16": -300,
        "u32": 2**32 - 1,
        "i32": -5,
        "u64": 2**63,
        "i64": -(2**62),
    }
    kinds = dict(zip(scalars, ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"), strict=True))
    for key, value in scalars.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[key]])
    writer.add_key_value("f32", 0.5, gguf.GGUFValueType.FLOAT32)
    writer.add_key_value("f64", 0.1, gguf.GGUFValueType.FLOAT64)
    writer.add_key_value("yes", True, gguf.GGUFValueType.BOOL)
    writer.add_key_value("text", "naïve ▁", gguf.GGUFValueType.STRING)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.25, -1.5])
    writer.add_array("flags", [True, False, True])
    writer.add_array("texts", ["<pad>", "", "▁the", "日本"])
    writer.add_tensor("f32.weight", rng.standard_normal((3, 4, 5)).astype(np.float32))
    writer.add_tensor("f16.weight", rng.standard_normal((2, 7)).astype(np.float16))
    writer.add_tensor("order", rng.permutation(9).astype(np.int32))
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q6_K):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (6, 512 // block * size), dtype=np.uint8)
        writer.add_tensor(f"{kind.name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours, theirs = GGUF.open(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for reference in theirs.tensors:
        info = ours.tensors[reference.name]
        assert info.shape == tuple(int(n) for n in reversed(reference.shape))
        assert info.type == reference.tensor_type.name
        assert info.offset == reference.data_offset
        np.testing.assert_array_equal(info.data, reference.data.reshape(-1).view(np.uint8))
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        value = ours.metadata[key]
        value = value if isinstance(value, str | int | float) else list(value)
        assert value == theirs.fields[key].contents(), key


def test_block_sizes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        info = open_bytes(
            tmp_path, bytes(File(tensors=[tensor("a", [2 * block, 3], kind, 0)], data=bytes(6 * size)))
        ).tensors["a"]
        assert (info.type, info.shape, info.nbytes) == (kind.name, (3, 2 * block), 6 * size)


def test_strings_are_a_sequence_left_in_the_file(tmp_path: Path) -> None:
    texts = ["", "a", "né", "▁word", "\0", "日本"]
    strings = open_bytes(tmp_path, bytes(File(pairs=[array("texts", STRING, texts)]))).metadata["texts"]
    assert len(strings) == len(texts)
    assert list(strings) == strings.tolist() == texts
    assert [strings[i] for i in range(-6, 0)] == texts
    for index in (6, -7, 2**62):
        with pytest.raises(IndexError):
            strings[index]


def test_an_alignment_of_the_file_moves_its_data(tmp_path: Path) -> None:
    pairs = [scalar("general.alignment", U32, 128)]
    file = open_bytes(
        tmp_path, bytes(File(pairs=pairs, tensors=[tensor("a", [4], 0, 0)], data=bytes(16), alignment=128))
    )
    assert file.tensors["a"].offset % 128 == 0


def test_version_2_is_read(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, bytes(File(version=2, pairs=[scalar("k", U32, 7)]))).metadata == {"k": 7}


def test_data_is_a_read_only_view_that_outlives_the_checkpoint(tmp_path: Path) -> None:
    info = open_bytes(tmp_path, VALID).tensors["b"]
    assert info.data.tolist() == list(range(64, 96))
    info.release()
    assert info.data.tolist() == list(range(64, 96))
    with pytest.raises(ValueError, match="read-only"):
        info.data[0] = 1


@pytest.mark.parametrize(("make", "fault"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "is a folder"),
    (lambda path: path.touch(), "is empty"),
])  # fmt: skip
def test_what_is_no_file_is_said(tmp_path: Path, make, fault: str) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(CheckpointError, match=fault) as caught:
        GGUF.open(path)
    assert_one_sentence(caught.value, path)


def split_pairs(number: int, count: int = 3, total: int = 3) -> list[bytes]:
    return [scalar("split.no", 2, number), scalar("split.count", 2, count), scalar("split.tensors.count", 5, total)]


def write_part(folder: Path, number: int, pairs: list[bytes] | None = None, name: str | None = None) -> Path:
    """Part `number` of 3, counted from 0, with one tensor."""
    path = folder / f"m-{number + 1:05}-of-00003.gguf"
    tensors = [tensor(name or f"t{number}", [1], 0, 0)]
    path.write_bytes(bytes(File(pairs or split_pairs(number), tensors, struct.pack("<f", number))))
    return path


def test_parts_are_opened_as_one_from_any_of_them(tmp_path: Path) -> None:
    for path in [write_part(tmp_path, number) for number in range(3)]:
        file = GGUF.open(path)
        assert [float(info.data.view("<f4")[0]) for info in file.tensors.values()] == [0, 1, 2]
        assert file.path == tmp_path / "m-00001-of-00003.gguf"


@pytest.mark.parametrize(("number", "pairs", "fault"), [
    (0, split_pairs(0, total=4), "have 3 tensors instead of 4"),
    (1, split_pairs(2), r"m-00002-of-00003\.gguf is not part 2"),
    (2, split_pairs(2, count=4), r"m-00003-of-00003\.gguf belongs to a checkpoint with another number"),
    (0, [scalar("split.count", 2, 3)], r"no usable number for the key 'split\.no'"),
    (0, [scalar("split.count", STRING, "3")], r"no usable number for the key 'split\.count'"),
    (0, split_pairs(0, count=60_000), "is one of 60000 parts"),
    (0, split_pairs(0, count=4), "is one of 4 parts"),
])  # fmt: skip
def test_a_fault_of_one_part_is_said(tmp_path: Path, number: int, pairs: list[bytes], fault: str) -> None:
    paths = [write_part(tmp_path, i) for i in range(3)]
    write_part(tmp_path, number, pairs)
    with pytest.raises(CheckpointError, match=fault):
        GGUF.open(paths[0])


def test_parts_that_do_not_belong_together_are_said(tmp_path: Path) -> None:
    paths = [write_part(tmp_path, i) for i in range(3)]
    write_part(tmp_path, 2, name="t1")
    with pytest.raises(CheckpointError, match="has the tensor 't1' that an earlier part has too"):
        GGUF.open(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf does not exist"):
        GGUF.open(paths[0])
    with pytest.raises(CheckpointError, match="is one of 3 parts"):
        GGUF.open(paths[0].rename(tmp_path / "renamed.gguf"))


def test_the_demo_opens_in_milliseconds() -> None:
    path = demo_path()
    started = time.perf_counter()
    file = GGUF.open(path)
    seconds = time.perf_counter() - started
    assert collections.Counter(info.type for info in file.tensors.values()) == {
        "F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9
    }  # fmt: skip
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 262_144
    assert file.tensors["token_embd.weight"].shape == (262_144, 640)
    assert seconds < 0.5  # about 10 ms on an idle machine
