"""Damaged GGUF files, and the words their error must have. The sanitizer build reads the same files."""

from __future__ import annotations

import struct

from .gguf_files import ARRAY, BOOL, F32, STRING, U32, File, array, pair, scalar, tensor, text

_TENSOR = tensor("a", [32, 2], 0, 0)
_DATA = bytes(256)
_BIG = 2**64 - 1


def _one(**changes: object) -> bytes:
    return bytes(File(**{"tensors": [_TENSOR], "data": _DATA, **changes}))


def _shape(dims: list[int], kind: int = 0, **more: object) -> bytes:
    return _one(tensors=[tensor("a", dims, kind, 0, **more)])


_ARRAYS = pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 1000)

DAMAGED: dict[str, tuple[bytes, str]] = {
    "no magic": (_one(magic=b"GGML"), "letters GGUF"),
    "three bytes": (b"GGU", "letters GGUF"),
    "magic only": (b"GGUF", "middle of its header"),
    "version 1": (_one(version=1), "version 1"),
    "version 4": (_one(version=4), "version 4"),
    "big-endian": (_one(version=0x03000000), "big-endian"),
    "header cut": (_one()[:20], "middle of its header"),
    "too many keys": (_one(pair_count=_BIG), "keys"),
    "too many tensors": (_one(tensor_count=_BIG), "tensors"),
    "one key too many": (bytes(File(pair_count=1)), "middle of its metadata"),
    "one tensor too many": (bytes(File(tensor_count=1)), "middle of its list of tensors"),
    "key twice": (_one(pairs=[scalar("k", U32, 1), scalar("k", F32, 1.0)]), "key 'k' twice"),
    "key without a name": (_one(pairs=[scalar("", U32, 1)]), "key without a name"),
    "key too long": (_one(pairs=[scalar("k" * 70_000, U32, 1)]), "name of 70000 bytes"),
    "key beyond the file": (_one(pairs=[text("k", 60_000)]), "middle of its metadata"),
    "key length overflows": (_one(pairs=[text("k", _BIG)]), "name of 18446744073709551615 bytes"),
    "key not text": (_one(pairs=[pair(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "value of unknown type": (_one(pairs=[pair("k", 13, bytes(8))]), "unknown type 13 for the key 'k'"),
    "value cut": (bytes(File(pairs=[pair("k", 10, bytes(7))])), "ends before the 1 values"),
    "string beyond the file": (bytes(File(pairs=[pair("k", STRING, text("x", 1000))])), "middle of its metadata"),
    "string length overflows": (_one(pairs=[pair("k", STRING, text("x", _BIG))]), "middle of its metadata"),
    "string not text": (_one(pairs=[scalar("k", STRING, b"\xc0\x80")]), "not UTF-8"),
    "surrogate": (_one(pairs=[scalar("k", STRING, b"\xed\xa0\x80")]), "not UTF-8"),
    "character cut at the end": (_one(pairs=[scalar("k", STRING, b"ab\xe2\x96")]), "not UTF-8"),
    "array of unknown type": (_one(pairs=[array("k", 13, [])]), "unknown type 13"),
    "array of arrays": (_one(pairs=[_ARRAYS]), "array of arrays"),
    "array count beyond the file": (_one(pairs=[array("k", U32, [1], count=1000)]), "ends before the 1000 values"),
    "array count overflows": (_one(pairs=[array("k", 12, [1.0], count=2**61 + 1)]), "ends before the"),
    "array count at its maximum": (_one(pairs=[array("k", 0, [1], count=_BIG)]), "ends before the"),
    "strings beyond the file": (_one(pairs=[array("k", STRING, ["x"], count=2**60)]), "ends before the"),
    "one string too many": (bytes(File(pairs=[array("k", STRING, ["x" * 8], count=2)])), "middle of its metadata"),
    "string in an array not text": (_one(pairs=[array("k", STRING, ["a", b"\xff"])]), "not UTF-8"),
    "bool of 2": (_one(pairs=[pair("k", BOOL, b"\2")]), "neither true nor false"),
    "bools of 255": (_one(pairs=[pair("k", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\xff")]), "neither true nor false"),
    "alignment 0": (_one(pairs=[scalar("general.alignment", U32, 0)]), "alignment 0"),
    "alignment 24": (_one(pairs=[scalar("general.alignment", U32, 24)]), "alignment 24"),
    "alignment huge": (_one(pairs=[scalar("general.alignment", U32, 2**31)]), "alignment 2147483648"),
    "alignment a text": (_one(pairs=[scalar("general.alignment", STRING, "32")]), "not a 32-bit number"),
    "alignment an array": (_one(pairs=[array("general.alignment", U32, [])]), "not a 32-bit number"),
    "tensor twice": (_one(tensors=[_TENSOR, _TENSOR]), "tensor 'a' twice"),
    "tensor without a name": (_one(tensors=[tensor("", [32], 0, 0)]), "tensor without a name"),
    "tensor name not text": (_one(tensors=[tensor(b"\x80", [32], 0, 0)]), "not UTF-8"),
    "tensor cut": (bytes(File(tensors=[_TENSOR[:-4]])), "middle of its list of tensors"),
    "no dimensions": (_shape([]), "0 dimensions"),
    "five dimensions": (_shape([1] * 5), "5 dimensions"),
    "absurd dimensions": (_shape([1], ndim=2**32 - 1), "4294967295 dimensions"),
    "dimension 0": (_shape([32, 0]), "dimension of 0"),
    "dimension negative": (_shape([2**63]), "overflows"),
    "product overflows": (_shape([2**32, 2**32]), "overflows"),
    "product wraps to a small number": (_shape([2**33, 2**31 + 1, 2**31]), "overflows"),
    "bytes overflow": (_shape([2**62]), "overflows"),
    "unknown tensor type": (_shape([32], 99), "unknown type 99"),
    "removed tensor type": (_shape([32], 4), "unknown type 4"),
    "row not whole blocks": (_shape([33], 8), "rows of 33 values"),
    "row not whole super-blocks": (_shape([128], 12), "multiple of the 256"),
    "offset misaligned": (_one(tensors=[tensor("a", [8], 0, 4)]), "no multiple of its alignment, 32"),
    "offset beyond the file": (_one(tensors=[tensor("a", [8], 0, 2**20)]), "ends before the 32 bytes"),
    "offset overflows": (_one(tensors=[tensor("a", [8], 0, 2**64 - 32)]), "ends before the 32 bytes"),
    "data cut": (_one()[:-1], "ends before the 256 bytes of the tensor 'a'"),
    "data missing": (_one(data=b""), "ends before the 256 bytes"),
    "padding missing": (_one(data=b"", alignment=1), "ends before its tensors' data"),
    "name with control characters": (_one(tensors=[tensor("a\n\x1b[31m", [33], 8, 0)]), r"'a\?\?\[31m'"),
}
