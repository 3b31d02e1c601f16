"""Writes GGUF files, valid ones and any kind of damaged ones: every length, count and type can be told to lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def scalar(key: str, kind: int, value: object) -> bytes:
    return pair(key, kind, text(value) if isinstance(value, str | bytes) else struct.pack("<" + SCALARS[kind], value))


def array(key: str, kind: int, values: list, count: int | None = None) -> bytes:
    payload = b"".join(text(v) if kind == STRING else struct.pack("<" + SCALARS[kind], v) for v in values)
    return pair(key, ARRAY, struct.pack("<IQ", kind, len(values) if count is None else count) + payload)


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int, ndim: int | None = None) -> bytes:
    shape = b"".join(struct.pack("<Q", d) for d in dims)
    return (
        text(name) + struct.pack("<I", len(dims) if ndim is None else ndim) + shape + struct.pack("<IQ", kind, offset)
    )


@dataclass
class File:
    """A GGUF file from its parts. `dims` of a tensor are in the file's order: inputs first."""

    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None

    def __bytes__(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, pairs) + b"".join(self.pairs + self.tensors)
        if self.tensors:
            head += b"\0" * (-len(head) % self.alignment)
        return head + self.data
