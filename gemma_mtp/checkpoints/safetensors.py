"""Hugging Face folders: tensors of one safetensors file, or of the shards that an index lists, as views of the files.

The format (https://github.com/huggingface/safetensors#format) is read here, not through its library, because that
copies bfloat16 or needs PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from gemma_mtp.checkpoints.keys import parse_json, read_json, shown
from gemma_mtp.checkpoints.tensors import MappedFile, TensorInfo
from gemma_mtp.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes: the format's own limit
_TYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder by name. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return open_safetensors(folder / "model.safetensors")
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(
        isinstance(name, str) and _is_plain(name) for name in places.values()
    ):
        raise CheckpointError(f"{index} has no usable 'weight_map' of tensors to files beside it.")
    shards = {name: open_safetensors(folder / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{folder / name} lacks the tensor {shown(tensor)} that {index.name} says it has.")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def open_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name. Raises CheckpointError."""
    return read_safetensors(path)[0]


def read_safetensors(path: Path) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    """The tensors of one file by name, and its metadata. Raises CheckpointError."""
    file = MappedFile(path)
    if len(file.bytes) < 8:
        raise CheckpointError(f"{path} ends in the middle of its header.")
    length = int(file.bytes[:8].view("<u8")[0])
    start = 8 + length
    if length > _MAX_HEADER or start > len(file.bytes):
        raise CheckpointError(f"{path} claims a header of {length} bytes, which it does not have.")
    header = parse_json(file.bytes[8:start].tobytes(), path)
    metadata = header.pop("__metadata__", None)
    tensors = {name: _tensor(file, start, name, entry) for name, entry in header.items()}
    return tensors, metadata if isinstance(metadata, Mapping) else {}


def write_safetensors(out: BinaryIO, tensors: Mapping[str, TensorInfo]) -> None:
    """Writes tensors of types that the format has, under the names given."""
    out.write(encode_safetensors({name: (tensor.type, tensor.shape) for name, tensor in tensors.items()}))
    for tensor in tensors.values():
        out.write(tensor.data.data)


def encode_safetensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> bytes:
    """What comes before the tensors' bytes in a file of tensors (type, shape), filled up to a multiple of `alignment`.

    Their bytes follow in the same order, without gaps.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (kind, shape) in tensors.items():
        end = offset + math.prod(shape) * _TYPE_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % alignment)
    return len(encoded).to_bytes(8, "little") + encoded


def _tensor(file: MappedFile, start: int, name: str, entry: Any) -> TensorInfo:
    fault = CheckpointError(f"{file.path} describes its tensor {shown(name)} in a way that makes no sense.")
    if not isinstance(entry, Mapping):
        raise fault
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in _TYPE_BYTES:
        raise fault
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        raise fault
    begin, end = offsets
    if begin > end or end - begin != math.prod(shape) * _TYPE_BYTES[kind]:
        raise fault
    if end > len(file.bytes) - start:
        raise CheckpointError(f"{file.path} ends before its tensor {shown(name)}, as a partial download would.")
    return TensorInfo(name, tuple(shape), kind, file.bytes[start + begin : start + end], start + begin, file)


def are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether a list of JSON is one of a few lengths or offsets."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _is_plain(name: str) -> bool:
    """Whether a shard's name stays in its folder."""
    return name.endswith(".safetensors") and Path(name).name == name and name.isprintable()
