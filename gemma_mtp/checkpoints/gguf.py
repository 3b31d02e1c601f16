"""GGUF files: metadata and tensors of one file, or of all parts of a split one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp._native import InputError, read_gguf
from gemma_mtp.checkpoints.keys import shown
from gemma_mtp.checkpoints.tensors import MappedFile, TensorInfo
from gemma_mtp.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)


class GGUF:
    """An open GGUF checkpoint.

    `metadata` maps keys to str, int, float, bool, a numpy array, or a `StringArray` (a sequence of str that stays in
    the file; `tolist()` makes all of it at once). `tensors` maps names to `TensorInfo` in file order.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> GGUF:
        """Opens a file, or all parts of the split checkpoint that it is one of. Raises CheckpointError."""
        path = Path(path)
        metadata, tensors = _read(path)
        count = _split_value(path, metadata, "split.count", default=1)
        if count == 1:
            return cls(path, metadata, tensors)
        parts = [path.with_name(name) for name in part_names(path.name)]
        if len(parts) != count:
            raise CheckpointError(
                f"{path} is one of {count} parts of a checkpoint: name them like 'model-00001-of-{count:05}.gguf'."
            )
        return cls(parts[0], *_read_parts(parts))

    def release(self, tensor: TensorInfo) -> None:
        """Lets the system drop a tensor's pages from memory once they have been copied elsewhere."""
        tensor.release()


def part_names(name: str) -> list[str]:
    """The file names of all parts of the split checkpoint that `name` is a part of, or `name` alone."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    count = int(part["count"])
    return [f"{part['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    file = MappedFile(path)
    return parse_gguf(file, 0, len(file.bytes))


def parse_gguf(file: MappedFile, start: int, length: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata and the tensors of a GGUF file that lies in another, at [start, start + length).

    Raises CheckpointError.
    """
    data = file.bytes[start : start + length]
    try:
        raw_metadata, raw_tensors = read_gguf(data)
    except InputError as fault:
        raise CheckpointError(f"{file.path} {fault}.") from None
    metadata = {key: _view(data, *value) if isinstance(value, tuple) else value for key, value in raw_metadata.items()}
    tensors = {
        name: TensorInfo(name, shape, kind, data[offset : offset + size], start + offset, file)
        for name, (kind, shape, offset, size) in raw_tensors.items()
    }
    return metadata, tensors


def _view(data: np.ndarray, dtype: str, count: int, offset: int) -> np.ndarray:
    return data[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)


def _read_parts(parts: list[Path]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The first part's metadata and the tensors of all parts."""
    metadata, tensors = _read(parts[0])
    for number, path in enumerate(parts):
        part_metadata, part_tensors = (metadata, tensors) if number == 0 else _read(path)
        if _split_value(path, part_metadata, "split.no") != number:
            raise CheckpointError(f"{path} is not part {number + 1} of its checkpoint, as its name says.")
        if _split_value(path, part_metadata, "split.count") != len(parts):
            raise CheckpointError(f"{path} belongs to a checkpoint with another number of parts.")
        if number and (twice := tensors.keys() & part_tensors.keys()):
            raise CheckpointError(f"{path} has the tensor {shown(min(twice))} that an earlier part has too.")
        tensors |= part_tensors
    expected = _split_value(parts[0], metadata, "split.tensors.count")
    if len(tensors) != expected:
        raise CheckpointError(f"{parts[0]} and its other parts have {len(tensors)} tensors instead of {expected}.")
    return metadata, tensors


def _split_value(path: Path, metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{path} has no usable number for the key '{key}'.")
    return value
