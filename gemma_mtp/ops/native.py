"""The native executor: records ops into a plan that C++ runs with no Python in it."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.quantization import Dtype, Fitting
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import LayerConfig, RopeConfig
from gemma_mtp.errors import CheckpointError


class NativeWeights:
    """A checkpoint's weights as the kernels read them, packed when they are first asked for.

    dtype "as-is" keeps the file's quantisation, "f32" makes every weight float32, and any other type is what matrices
    are quantised to on their way into memory (where their width fits: see checkpoints/quantization.py).
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], pool: _native.ThreadPool, dtype: Dtype):
        self._tensors, self._pool, self._dtype = tensors, pool, dtype
        self._fitting = None if dtype in ("as-is", "f32") else Fitting(dtype)
        self._matrices: dict[str, _native.Weight] = {}

    def matrix(self, name: str) -> _native.Weight:
        """A weight [outputs, inputs]. Raises CheckpointError where it cannot be quantised."""
        if name not in self._matrices:
            tensor = self._tensors[name]
            rows, cols = tensor.shape
            if self._dtype == "f32":
                source = self._floats(tensor).view(np.uint8)
                self._matrices[name] = _native.Weight.pack("F32", source, rows, cols, self._pool, lambda *_: None)
            elif self._fitting:
                self._matrices[name] = self._converted(tensor, self._fitting.type_of(cols))
            else:
                self._matrices[name] = _native.Weight.pack(
                    tensor.type, tensor.data, rows, cols, self._pool, partial(_release, tensor)
                )
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._floats(self._tensors[name])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    def _converted(self, tensor: TensorInfo, kind: str) -> _native.Weight:
        rows, cols = tensor.shape
        try:
            return _native.Weight.convert(
                tensor.type, kind, tensor.data, rows, cols, self._pool, partial(_release, tensor)
            )
        except _native.InputError as fault:
            raise CheckpointError(
                f"{tensor.file.path} has the tensor '{tensor.name}' that cannot become {kind}: {fault}."
            ) from None

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

    def norm(self, x: int, weight: str | None, factor: float = 1.0) -> int:
        vector = self._weights.vector(weight) if weight else np.ones(0, np.float32)
        return self._plan.norm(x, (vector * np.float32(factor)).tolist(), self._eps)

    def project(self, x: int, *weights: str) -> list[int]:
        return self._plan.project(x, [self._weights.matrix(weight) for weight in weights])

    def logits(self, x: int, weight: str) -> int:
        return self._plan.logits(x, self._weights.matrix(weight))

    def gated(self, x: int, gate: str, up: str) -> int:
        return self._plan.gated(x, self._weights.matrix(gate), self._weights.matrix(up))

    def gelu_times(self, gate: int, x: int, column: int) -> int:
        return self._plan.gelu_times(gate, x, column)

    def add(self, x: int, y: int, factor: float = 1.0) -> int:
        self._plan.add(x, y, factor)
        return x

    def add_norm(self, x: int, y: int, weight: str, scale: str | None = None) -> int:
        factor = self._weights.vector(scale)[0] if scale else 1.0
        self._plan.add_norm(x, y, self._weights.vector(weight).tolist(), self._eps, float(factor))
        return x

    def scale(self, x: int, factor: float) -> int:
        self._plan.scale(x, factor)
        return x

    def concat(self, a: int, b: int) -> int:
        return self._plan.concat(a, b)

    def heads(self, x: int, head_dim: int, weight: str | None, rope: RopeConfig | None) -> int:
        vector = self._weights.vector(weight).tolist() if weight else []
        self._plan.heads(x, head_dim, vector, self._eps, self._rope(head_dim, rope) if rope else -1)
        return x

    def remember(self, cache_layer: int, k: int, v: int) -> None:
        self._plan.remember(cache_layer, k, v)

    def attend(self, q: int, cache_layer: int, shape: LayerConfig, scale: float, behind: int = 0) -> int:
        return self._plan.attend(q, cache_layer, shape.kv_heads, shape.head_dim, shape.window or 0, scale, behind)

    def outputs(self, x: int) -> int:
        return self._plan.outputs(x)

    def softcap(self, x: int, cap: float) -> int:
        self._plan.softcap(x, cap)
        return x

    def _rope(self, head_dim: int, rope: RopeConfig) -> int:
        """The buffer of the rows' angles, made once for all layers that turn alike."""
        key = (head_dim, rope)
        if key not in self._ropes:
            exponents = np.arange(0, 2 * rope.pairs, 2, dtype=np.float32) / np.float32(head_dim)
            frequencies = np.float32(1) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
            self._ropes[key] = self._plan.rope((frequencies / np.float32(rope.factor)).tolist())
        return self._ropes[key]
