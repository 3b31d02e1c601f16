"""The native executor: records ops into a plan that C++ runs with no Python in it."""

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.packing import Packer, centroid_rows
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import LayerConfig, RopeConfig

_ANGLES = 16  # turned in one step of a kernel


class NativeWeights:
    """A checkpoint's weights as the kernels read them, packed when they are first asked for.

    packer: what packs them. looked_up: matrices of which only single rows are read, which stay in their file. shared:
    matrices that another model has packed already, by the name they have here.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        packer: Packer,
        looked_up: Collection[str] = (),
        shared: Mapping[str, _native.Weight] | None = None,
    ):
        self._tensors, self._packer, self._looked_up = tensors, packer, looked_up
        self._matrices = dict(shared or {})

    def matrix(self, name: str) -> _native.Weight:
        """A weight [outputs, inputs], or [experts, outputs, inputs] with the experts below each other.

        Raises CheckpointError where it cannot be quantised.
        """
        if name not in self._matrices:
            self._matrices[name] = self._packer.matrix(name, self._tensors[name])
        return self._matrices[name]

    def by_centroid(self, name: str, ordering: str, count: int) -> tuple[_native.Weight, list[int]]:
        """The rows of a matrix [vocab, inputs] centroid by centroid, each filled up to a multiple of 16, and the token
        of every row, -1 for one that only fills up. `ordering` names the tokens [vocab] in that order."""
        tokens = centroid_rows(self._tensors[ordering], count)
        return self._packer.by_centroid(self._tensors[name], tokens), tokens.reshape(-1).tolist()

    def table(self, name: str) -> _native.Table:
        """A weight whose rows are looked up one at a time."""
        if name not in self._looked_up:
            return _native.Table.packed(self.matrix(name))
        tensor = self._tensors[name]
        return _native.Table.mapped(tensor.type, tensor.data, *tensor.shape)

    def vector(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        values = _native.dequantize(tensor.type, tensor.data, math.prod(tensor.shape)).reshape(-1)
        tensor.check_finite(values)
        return values


class NativeOps:
    """Implements ops.interface.Ops; a handle is the number of a buffer of the plan."""

    def __init__(self, plan: _native.Plan, weights: NativeWeights, eps: float):
        self._plan, self._weights, self._eps = plan, weights, eps
        self._ropes: dict[tuple[int, RopeConfig], int] = {}
        self.state = -1
        """The buffer of `hidden`."""

    def hidden(self, width: int) -> int:
        if self.state < 0:
            self.state = self._plan.input(width)
        return self.state

    def embed(self, weight: str, scale: float) -> int:
        return self._plan.embed(self._weights.table(weight), scale)

    def norm(self, x: int, weight: str | None, factor: float = 1.0) -> int:
        vector = self._weights.vector(weight) if weight else np.ones(0, np.float32)
        return self._plan.norm(x, (vector * np.float32(factor)).tolist(), self._eps)

    def project(self, x: int, *weights: str) -> list[int]:
        return self._plan.project(x, [self._weights.matrix(weight) for weight in weights])

    def logits(self, x: int, weight: str) -> int:
        return self._plan.logits(x, self._weights.matrix(weight))

    def gated(self, x: int, gate: str, up: str) -> int:
        return self._plan.gated(x, self._weights.matrix(gate), self._weights.matrix(up))

    def experts(self, x: int, scores: int, gate_up: str, down: str, expert_scale: str, active: int) -> int:
        matrices = self._weights.matrix(gate_up), self._weights.matrix(down)
        return self._plan.experts(x, scores, *matrices, self._weights.vector(expert_scale).tolist(), active)

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

    def copy(self, x: int) -> int:
        return self._plan.copy(x)

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

    def centroid_logits(self, x: int, centroids: str, ordering: str, weight: str, active: int) -> int:
        matrix = self._weights.matrix(centroids)
        (scores,) = self._plan.project(x, [matrix])
        rows, tokens = self._weights.by_centroid(weight, ordering, matrix.rows)
        return self._plan.centroid_logits(x, scores, rows, tokens, matrix.rows, active)

    def softcap(self, x: int, cap: float) -> int:
        self._plan.softcap(x, cap)
        return x

    def _rope(self, head_dim: int, rope: RopeConfig) -> int:
        """The buffer of the rows' angles, made once for all layers that turn alike."""
        key = (head_dim, rope)
        if key not in self._ropes:
            exponents = np.arange(0, 2 * rope.pairs, 2, dtype=np.float32) / np.float32(head_dim)
            frequencies = np.float32(1) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
            pairs = -(-rope.pairs // _ANGLES) * _ANGLES  # pairs turned by 0 stay as they are
            padded = np.pad(frequencies / np.float32(rope.factor), (0, pairs - rope.pairs))
            self._ropes[key] = self._plan.rope(padded.tolist())
        return self._ropes[key]
