"""Matrices as the kernels read them: what becomes of a checkpoint's tensors on their way into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.quantization import Dtype, Fitting
from gemma_mtp.checkpoints.tensors import Layout, TensorInfo, token_ordering
from gemma_mtp.config import AnyConfig, DrafterConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

_GROUP = 16  # rows of a matrix that lie together


@dataclass(frozen=True)
class Uses:
    """How a model reads its matrices, by canonical name, where that is not by multiplying with all their rows.

    `heads`: output embeddings, in Q8_0 packed in two parts. `looked_up`: only single rows are read, so they stay in
    their file. `by_centroid`: a drafter's embedding that a centroid head reads.
    """

    heads: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()
    by_centroid: frozenset[str] = frozenset()


def uses_of(config: AnyConfig) -> Uses:
    if isinstance(config, ModelConfig):
        head = "embed" if config.tied_embedding else "lm_head"
        return Uses(heads=frozenset({head}), looked_up=frozenset({"ple_embed", "embed"} - {head}))
    if isinstance(config, DrafterConfig):
        embed = frozenset({"embed"})
        return Uses(by_centroid=embed) if config.centroids else Uses(heads=embed)
    return Uses()


class Packer:
    """Packs matrices, or takes those that lie packed in their file as they are.

    dtype: "as-is" keeps a tensor's type, "f32" makes every weight float32, and any other type is what matrices but
    routers are quantised to (where their width fits: see checkpoints/quantization.py). heads: see Uses.
    """

    def __init__(self, pool: _native.ThreadPool, dtype: Dtype = "as-is", heads: Collection[str] = ()) -> None:
        self._pool, self._dtype, self._heads = pool, dtype, heads
        self._fitting = None if dtype in ("as-is", "f32") else Fitting(dtype)

    def form(self, name: str, tensor: TensorInfo) -> tuple[Layout, str]:
        """How the matrix of that canonical name lies in memory, and of what type it is there."""
        if tensor.layout != "rows":
            return tensor.layout, tensor.type
        kind = self.type_of(tensor, exact=name.endswith(".router"))
        halves = name in self._heads and tensor.type == kind == "Q8_0" and _rows(tensor) % _GROUP == 0
        return "split" if halves else "packed", kind

    def matrix(self, name: str, tensor: TensorInfo) -> _native.Weight:
        """A weight [outputs, inputs], or [experts, outputs, inputs] with the experts below each other.

        Raises CheckpointError where it cannot be quantised, or its packed bytes make no sense.
        """
        if tensor.layout != "rows":
            return _mapped(tensor)
        layout, kind = self.form(name, tensor)
        if layout == "split":
            rows, cols = _rows(tensor), tensor.shape[-1]
            with _undamaged(tensor):
                return _native.Weight.pack_head(tensor.data, rows, cols, self._pool, partial(_release, tensor))
        return self._pack(tensor, tensor.data, _rows(tensor), kind, partial(_release, tensor))

    def by_centroid(self, tensor: TensorInfo, tokens: NDArray[np.int64]) -> _native.Weight:
        """The rows of a matrix [vocab, inputs] in the order of `centroid_rows`, the first row standing for none."""
        if tensor.layout == "by centroid":
            return _mapped(tensor, tokens.size)
        if tensor.layout != "rows":
            raise CheckpointError(
                f"{tensor.file.path} is packed, and a centroid head over its embedding needs the checkpoint it is of."
            )
        rows = tensor.data.reshape(tensor.shape[0], -1)[np.maximum(tokens, 0).reshape(-1)]
        return self._pack(tensor, rows.reshape(-1), tokens.size, self.type_of(tensor), lambda *_: None)

    def type_of(self, tensor: TensorInfo, exact: bool = False) -> str:
        """The type that a matrix gets as it is packed."""
        if self._dtype == "f32":
            return "F32"
        return self._fitting.type_of(tensor.shape[-1]) if self._fitting and not exact else tensor.type

    def _pack(
        self, tensor: TensorInfo, data: NDArray[np.uint8], rows: int, kind: str, done: Callable[[int, int], None]
    ) -> _native.Weight:
        try:
            return _native.Weight.convert(tensor.type, kind, data, rows, tensor.shape[-1], self._pool, done)
        except _native.InputError as fault:
            raise CheckpointError(
                f"{tensor.file.path} has the tensor '{tensor.name}' that cannot become {kind}: {fault}."
            ) from None


def centroid_rows(ordering: TensorInfo, count: int) -> NDArray[np.int64]:
    """int64 [count, rows of each]: the tokens whose rows are packed, centroid by centroid, each filled up to a multiple
    of 16 with -1. `ordering` names the tokens [vocab] in that order. Raises CheckpointError."""
    per = ordering.shape[0] // count
    tokens = np.full((count, -(-per // _GROUP) * _GROUP), -1)
    tokens[:, :per] = token_ordering(ordering).reshape(count, per)
    return tokens


def packed_size(layout: Layout, kind: str, rows: int, cols: int) -> int:
    """How many bytes a matrix takes in its file in that layout. Raises InputError."""
    if layout == "rows":
        return rows * _native.file_row_bytes(kind, cols)
    return _native.Weight.head_bytes(rows, cols) if layout == "split" else _native.Weight.packed_bytes(kind, rows, cols)


def read_rows(tensor: TensorInfo, first: int, count: int) -> NDArray[np.float32]:
    """float32 [count, columns]: some rows of a matrix, the exact values, packed or not. Raises CheckpointError."""
    cols = tensor.shape[-1]
    if tensor.layout != "rows":
        return _mapped(tensor).unpack_rows(first, count)
    row_bytes = _native.file_row_bytes(tensor.type, cols)
    data = tensor.data[first * row_bytes : (first + count) * row_bytes]
    values = _native.dequantize(tensor.type, data, count * cols).reshape(count, cols)
    tensor.file.release(tensor.offset + first * row_bytes, data.nbytes)
    return values


def _mapped(tensor: TensorInfo, rows: int | None = None) -> _native.Weight:
    """A matrix used where it lies in its file."""
    rows, cols = rows or _rows(tensor), tensor.shape[-1]
    with _undamaged(tensor):
        if tensor.layout == "split":
            return _native.Weight.map_head(tensor.data, rows, cols)
        return _native.Weight.mapped(tensor.type, tensor.data, rows, cols)


@contextmanager
def _undamaged(tensor: TensorInfo) -> Iterator[None]:
    """Makes what the kernels do not take the fault of the tensor that it is."""
    try:
        yield
    except _native.InputError as fault:
        raise CheckpointError(f"{tensor.file.path} has a damaged tensor '{tensor.name}': {fault}.") from None


def _rows(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape[:-1])


def _release(tensor: TensorInfo, begin: int, end: int) -> None:
    tensor.file.release(tensor.offset + begin, end - begin)
