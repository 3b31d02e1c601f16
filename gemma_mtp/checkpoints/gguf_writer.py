"""Writes GGUF files (version 3), tensor after tensor as their data comes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gemma_mtp._native import StringArray, file_row_bytes
from gemma_mtp.checkpoints.files import written_whole

_ALIGNMENT = 32  # bytes, of every tensor
_TENSOR_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_ARRAY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: `shape` with the outputs first, and `chunks()`, its bytes of the GGUF type in order."""

    name: str
    shape: tuple[int, ...]
    type: str
    chunks: Callable[[], Iterable[NDArray[np.uint8]]]

    @property
    def nbytes(self) -> int:
        return file_row_bytes(self.type, self.shape[-1]) * int(np.prod(self.shape[:-1], dtype=np.int64))


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[OutTensor]) -> None:
    """Writes a file that is there whole or not at all. Raises CheckpointError."""
    with written_whole(path) as out:
        write_gguf_to(out, metadata, tensors)


def write_gguf_to(out: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[OutTensor]) -> None:
    """Writes what a file holds.

    Whole numbers become uint32 (int32 below zero, 64 bits where they need it) and other numbers float32, as llama.cpp
    wants them; numpy arrays keep their type, and sequences are taken to be of str.
    """
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        lengths = tensor.shape[::-1]
        header += [_string(tensor.name), struct.pack(f"<I{len(lengths)}Q", len(lengths), *lengths)]
        header.append(struct.pack("<IQ", _TENSOR_TYPES[tensor.type], offset))
        offset += tensor.nbytes + _padding(tensor.nbytes)
    start = b"".join(header)
    out.write(start + bytes(_padding(len(start))))
    for tensor in tensors:
        written = 0
        for chunk in tensor.chunks():
            written += out.write(chunk.data)
        assert written == tensor.nbytes, tensor.name
        out.write(bytes(_padding(written)))


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return _whole_number(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        kind = _ARRAY_TYPES[f"{value.dtype.kind}{value.dtype.itemsize}"]
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + little.tobytes()
    strings = value.tolist() if isinstance(value, StringArray) else value
    return struct.pack("<IIQ", _ARRAY, _STRING, len(strings)) + b"".join(map(_string, strings))


def _whole_number(value: int) -> bytes:
    if value < 0:
        return struct.pack("<Ii", _INT32, value) if value >= -(2**31) else struct.pack("<Iq", _INT64, value)
    return struct.pack("<II", _UINT32, value) if value < 2**32 else struct.pack("<IQ", _UINT64, value)
