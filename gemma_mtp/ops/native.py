"""The native executor: records ops into a plan that C++ runs with no Python in it."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np

from gemma_mtp import _native
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import LayerConfig, RopeConfig

Dtype = Literal["as-is", "f32"]


class NativeWeights:
    """A checkpoint's weights as the kernels read them, packed when they are first asked for.

    dtype "as-is" keeps the file's quantisation, "f32" makes every weight float32.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], pool: _native.ThreadPool, dtype: Dtype):
        self._tensors, self._pool, self._dtype = tensors, pool, dtype
        self._matrices: dict[str, _native.Weight] = {}

    def matrix(self, name: str) -> _native.Weight:
        """A weight [outputs, inputs]."""
        if name not in self._matrices:
            tensor = self._tensors[name]
            rows, cols = tensor.shape
            if self._dtype == "f32":
                source = self._floats(tensor).view(np.uint8)
                self._matrices[name] = _native.Weight.pack("F32", source, rows, cols, self._pool, lambda *_: None)
            else:
                self._matrices[name] = _native.Weight.pack(
                    tensor.type, tensor.data, rows, cols, self._pool, partial(_release, tensor)
                )
        return self._matrices[name]

    def vector(self, name: str) -> list[float]:
        return self._floats(self._tensors[name]).tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    @staticmethod
    def _floats(tensor: TensorInfo) -> np.ndarray:
        return _native.dequantize(tensor.type, tensor.data, int(np.prod(tensor.shape))).reshape(-1)


def _release(tensor: TensorInfo, begin: int, end: int) -> None:
    tensor.file.release(tensor.offset + begin, end - begin)


class NativeOps:
    """Implements ops.interface.Ops; a handle is the number of a buffer of the plan."""

    def __init__(self, plan: _native.Plan, weights: NativeWeights, eps: float):
        self._plan, self._weights, self._eps = plan, weights, eps
        self._ropes: dict[tuple[int, RopeConfig], int] = {}

    def embed(self, weight: str, scale: float) -> int:
        return self._plan.embed(_native.Table.packed(self._weights.matrix(weight)), scale)

    def norm(self, x: int, weight: str) -> int:
        return self._plan.norm(x, self._weights.vector(weight), self._eps)

    def project(self, x: int, *weights: str) -> list[int]:
        return self._plan.project(x, [self._weights.matrix(weight) for weight in weights])

    def logits(self, x: int, weight: str) -> int:
        return self._plan.logits(x, self._weights.matrix(weight))

    def gated(self, x: int, gate: str, up: str) -> int:
        return self._plan.gated(x, self._weights.matrix(gate), self._weights.matrix(up))

    def add_norm(self, x: int, y: int, weight: str) -> int:
        self._plan.add_norm(x, y, self._weights.vector(weight), self._eps, 1.0)
        return x

    def heads(self, x: int, head_dim: int, weight: str, rope: RopeConfig) -> int:
        self._plan.heads(x, head_dim, self._weights.vector(weight), self._eps, self._rope(head_dim, rope))
        return x

    def remember(self, cache_layer: int, k: int, v: int) -> None:
        self._plan.remember(cache_layer, k, v)

    def attend(self, q: int, cache_layer: int, layer: LayerConfig, scale: float) -> int:
        return self._plan.attend(q, cache_layer, layer.kv_heads, layer.head_dim, layer.window or 0, scale)

    def outputs(self, x: int) -> int:
        return self._plan.outputs(x)

    def _rope(self, head_dim: int, rope: RopeConfig) -> int:
        """The buffer of the rows' angles, made once for all layers that turn alike."""
        key = (head_dim, rope)
        if key not in self._ropes:
            exponents = np.arange(0, 2 * rope.pairs, 2, dtype=np.float32) / np.float32(head_dim)
            frequencies = np.float32(1) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
            self._ropes[key] = self._plan.rope((frequencies / np.float32(rope.factor)).tolist())
        return self._ropes[key]
