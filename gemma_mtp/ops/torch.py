"""The PyTorch executor: runs ops eagerly on CPU, CUDA or MPS.

A handle is a float32 tensor [rows, width]; products with weights, keys and values are in the weights' dtype. No op
overwrites its arguments, even where the interface lets it, so that gradients can be taken through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp import _native
from gemma_mtp.checkpoints.tensors import TensorInfo, token_ordering
from gemma_mtp.config import LayerConfig, RopeConfig
from gemma_mtp.errors import CheckpointError

FIXED_ROWS = 16
"""How many rows every pass has whose results must not depend on the rows beside them."""

_PLAIN_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LEFT_IN_FILE = {"ple_embed"}  # a table larger than the rest of the model, of which a pass reads a few rows


Tokens = Sequence[int] | Tensor
"""Token ids, one for each row; as a tensor int64 [rows]."""


class TorchWeights:
    """A checkpoint's weights as tensors on a device: matrices in `dtype`, vectors in float32, token ids in int64.

    The table of per-layer embeddings stays in its file, quantised as it is there. shared: further weights, by name.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        device: torch.device,
        dtype: torch.dtype,
        shared: Mapping[str, Tensor] | None = None,
    ):
        self.device, self.dtype = device, dtype
        self._in_file = {name: info for name, info in tensors.items() if name in _LEFT_IN_FILE}
        self._tensors = dict(shared or {})
        for name, info in tensors.items():
            if name not in self._in_file:
                self._tensors[name] = self._load(name, info)
            elif info.type not in _native.WEIGHT_TYPES:
                raise _not_weights(info)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._in_file

    def rows(self, name: str, tokens: Tokens) -> Tensor:
        """float32 [len(tokens), width]: rows of a matrix [vocab, width]."""
        if name not in self._in_file:
            return F.embedding(torch.as_tensor(tokens, device=self.device), self[name]).float()
        info = self._in_file[name]
        count, width = info.shape
        data = info.data.reshape(count, -1)[torch.as_tensor(tokens).tolist()].reshape(-1)
        values = _native.dequantize(info.type, data, len(tokens) * width)
        return torch.from_numpy(values.reshape(len(tokens), width)).to(self.device)

    def _load(self, name: str, info: TensorInfo) -> Tensor:
        if info.layout != "rows":
            raise CheckpointError(f"{info.file.path} is packed for the native backend: give the checkpoint it is of.")
        if name == "token_ordering":
            return torch.from_numpy(token_ordering(info)).to(self.device)
        if info.type in _PLAIN_TYPES:
            # A copy, because PyTorch takes no read-only memory.
            values = torch.from_numpy(info.data.copy()).view(_PLAIN_TYPES[info.type])
        elif info.type in _native.WEIGHT_TYPES:
            values = torch.from_numpy(_native.dequantize(info.type, info.data, math.prod(info.shape)).reshape(-1))
        else:
            raise _not_weights(info)
        info.release()
        if len(info.shape) > 1:
            return values.reshape(info.shape).to(self.device, self.dtype)
        vector = values.float()
        info.check_finite(vector.numpy())
        return vector.to(self.device)


def _not_weights(info: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{info.file.path} has the tensor '{info.name}' as {info.type}, which cannot be run.")


class Cache(Protocol):
    """Keys and values of one sequence, in layers of vectors [kv_heads * head_dim] a position."""

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keeps keys and values [rows, kv_heads * head_dim] of the positions from `start` on."""

    def read(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [end - begin, kv_heads * head_dim] of the positions from `begin` to before `end`."""


class GrowingCache:
    """A cache for decoding. Every position is kept, of sliding layers too, so that any truncation is exact.

    It knows no length: what lies past the end of a sequence is overwritten before a row sees it.
    """

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}  # [2, capacity, kv_heads * head_dim]: keys, values

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        end = start + len(k)
        held = self._layers.get(layer)
        if held is None or end > held.shape[1]:
            grown = k.new_empty(2, max(64, 1 << (end - 1).bit_length()), k.shape[1])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._layers[layer] = held = grown
        held[0, start:end] = k
        held[1, start:end] = v

    def read(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        held = self._layers[layer]
        return held[0, begin:end], held[1, begin:end]


class PassCache:
    """A cache of a single pass over whole sequences of equal length, through which gradients flow.

    Keys and values are [sequences, positions, kv_heads * head_dim] here. A drafter's pass may read them afterwards.
    """

    def __init__(self, sequences: int = 1) -> None:
        self.sequences = sequences
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        if start or layer in self._layers:
            raise ValueError("a PassCache holds one pass, which starts at position 0")
        self._layers[layer] = (k.unflatten(0, (self.sequences, -1)), v.unflatten(0, (self.sequences, -1)))

    def read(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        k, v = self._layers[layer]
        return k[:, begin:end].flatten(0, 1), v[:, begin:end].flatten(0, 1)


@dataclass(frozen=True)
class Pass:
    """The rows of one pass: consecutive positions of one sequence, or the same positions of several.

    tokens: one for each row, the first at position `start`. outputs: of how many rows, the last, results are wanted.
    sequences: how many there are, their rows one sequence after another; the cache is then a PassCache of as many.
    invariant: no row's bits depend on the rows beside it. PyTorch's products promise that only for products of the
        same shape, so all such passes are padded to FIXED_ROWS rows, and attention goes row by row.
    hidden: float32 [rows, width], what the caller hands to the pass.
    """

    tokens: Tokens
    start: int
    cache: Cache
    outputs: int
    invariant: bool = False
    hidden: Tensor | None = None
    sequences: int = 1

    def __post_init__(self) -> None:
        if len(self.tokens) % self.sequences or (self.sequences > 1 and self.outputs not in (0, len(self.tokens))):
            raise ValueError("sequences of a pass are of equal length, and results are of all their rows or of none")
        if self.invariant and len(self.tokens) > FIXED_ROWS:
            raise ValueError(f"an invariant pass has at most {FIXED_ROWS} rows, not {len(self.tokens)}")

    @cached_property
    def padded(self) -> Tokens:
        """The tokens of the rows that ops work on."""
        return [*self.tokens, *[0] * (FIXED_ROWS - len(self.tokens))] if self.invariant else self.tokens

    def kept(self, x: Tensor) -> Tensor:
        """The rows of x that the head is computed for: of an invariant pass all of them."""
        return x if self.invariant else x[len(self.tokens) - self.outputs :]

    def wanted(self, x: Tensor) -> Tensor:
        """The results that are wanted, of those of the kept rows."""
        return x[len(self.tokens) - self.outputs : len(self.tokens)] if self.invariant else x


class TorchOps:
    """Implements ops.interface.Ops over one pass; a handle is a float32 tensor [rows, width]."""

    def __init__(self, weights: TorchWeights, eps: float, rows: Pass):
        self._weights, self._eps, self._pass = weights, eps, rows
        self._ropes: dict[tuple[int, RopeConfig], tuple[Tensor, Tensor]] = {}

    def hidden(self, width: int) -> Tensor:
        given = self._pass.hidden
        if given is None or given.shape != (len(self._pass.padded), width):
            shape = None if given is None else list(given.shape)
            raise ValueError(f"the pass needs hidden states [{len(self._pass.padded)}, {width}] and was given {shape}")
        return given

    def embed(self, weight: str, scale: float) -> Tensor:
        return self._weights.rows(weight, self._pass.padded) * scale

    def norm(self, x: Tensor, weight: str | None, factor: float = 1.0) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)
        return y * (self._weights[weight] * factor) if weight else y * factor

    def project(self, x: Tensor, *weights: str) -> list[Tensor]:
        return [self._times(x, self._weights[weight]) for weight in weights]

    def logits(self, x: Tensor, weight: str) -> Tensor:
        return self._times(x, self._weights[weight])

    def gated(self, x: Tensor, gate: str, up: str) -> Tensor:
        return _gelu(self._times(x, self._weights[gate])) * self._times(x, self._weights[up])

    def experts(self, x: Tensor, scores: Tensor, gate_up: str, down: str, expert_scale: str, active: int) -> Tensor:
        best = scores.softmax(-1).topk(active)
        shares = torch.zeros_like(scores).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        shares = shares * self._weights[expert_scale]
        result = x.new_zeros(len(x), self._weights[down].shape[1])
        for expert in best.indices[: len(self._pass.tokens)].unique().tolist():
            chosen = (best.indices == expert).any(-1)
            if self._pass.invariant:
                chosen = torch.ones_like(chosen)  # a product's shape must not depend on other rows' choices
            (rows,) = chosen.nonzero(as_tuple=True)
            gate, up = self._times(x[rows], self._weights[gate_up][expert]).chunk(2, -1)
            y = self._times(_gelu(gate) * up, self._weights[down][expert])
            result = result.index_add(0, rows, y * shares[rows, expert, None])
        return result

    def gelu_times(self, gate: Tensor, x: Tensor, column: int) -> Tensor:
        return _gelu(gate) * x[:, column : column + gate.shape[1]]

    def add(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        return (x + y) * factor

    def add_norm(self, x: Tensor, y: Tensor, weight: str, scale: str | None = None) -> Tensor:
        x = x + self.norm(y, weight)
        return x * self._weights[scale] if scale else x

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def copy(self, x: Tensor) -> Tensor:
        return x  # nothing is overwritten here

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1)

    def heads(self, x: Tensor, head_dim: int, weight: str | None, rope: RopeConfig | None) -> Tensor:
        y = self.norm(x.reshape(len(x), -1, head_dim), weight)
        if rope:
            cos, sin = self._rope(head_dim, rope)
            a, b = y.chunk(2, -1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return y.reshape(x.shape)

    def remember(self, cache_layer: int, k: Tensor, v: Tensor) -> None:
        rows, dtype = len(self._pass.tokens), self._weights.dtype
        self._pass.cache.write(cache_layer, self._pass.start, k[:rows].to(dtype), v[:rows].to(dtype))

    def attend(self, q: Tensor, cache_layer: int, shape: LayerConfig, scale: float, behind: int = 0) -> Tensor:
        rows = len(self._pass.tokens)
        step = 1 if self._pass.invariant else rows
        parts = [
            self._attend(q[row : row + step], self._pass.start + row, cache_layer, shape, scale, behind)
            for row in range(0, rows, step)
        ]
        return torch.cat([*parts, torch.zeros_like(q[rows:])])

    def outputs(self, x: Tensor) -> Tensor:
        return self._pass.kept(x)

    def centroid_logits(self, x: Tensor, centroids: str, ordering: str, weight: str, active: int) -> Tensor:
        best = self._times(x, self._weights[centroids]).topk(active).indices
        of_centroid = self._weights[ordering].view(len(self._weights[centroids]), -1)
        tokens = of_centroid[best].flatten(1)  # [rows, active * tokens of a centroid]
        matrix = self._weights[weight]
        scores = (matrix[tokens] @ x.to(matrix.dtype).unsqueeze(-1)).squeeze(-1).float()
        return x.new_full((len(x), len(matrix)), -torch.inf).scatter(1, tokens, scores)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    @staticmethod
    def _times(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight).float()

    def _attend(
        self, q: Tensor, start: int, cache_layer: int, shape: LayerConfig, scale: float, behind: int
    ) -> Tensor:
        """Attention of rows at consecutive positions from `start` on, over no more keys than they see together.

        q: [sequences * rows, heads * head_dim].
        """
        sequences, window = self._pass.sequences, shape.window
        rows = len(q) // sequences
        begin, end = max(0, start + 1 - window) if window else 0, start + rows - behind
        if begin >= end:
            return torch.zeros_like(q)
        k, v = self._pass.cache.read(cache_layer, begin, end)
        # The query heads that share a KV head lie one after another: together they are rows of one product.
        queries = q.to(k.dtype).reshape(sequences, rows, shape.kv_heads, -1, shape.head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [sequences, KV heads, heads of each * rows, head_dim]
        k, v = (x.reshape(sequences, end - begin, shape.kv_heads, shape.head_dim).transpose(1, 2) for x in (k, v))
        sees = None
        if rows > 1:
            position = torch.arange(start, start + rows, device=q.device)[:, None]
            key = torch.arange(begin, end, device=q.device)
            sees = key <= position - behind
            if window:
                sees = sees & (key > position - window)
            sees = sees.repeat(queries.shape[2] // rows, 1)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=sees, scale=scale)
        return y.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4).reshape(q.shape).float()

    def _rope(self, head_dim: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, 1, head_dim / 2] of the rows' angles, made once for all layers that turn alike."""
        key = (head_dim, rope)
        if key not in self._ropes:
            exponents = np.arange(0, 2 * rope.pairs, 2, dtype=np.float32) / np.float32(head_dim)
            frequencies = np.zeros(head_dim // 2, np.float32)  # pairs that do not turn
            frequencies[: rope.pairs] = np.float32(1) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
            start, sequences = self._pass.start, self._pass.sequences
            positions = np.arange(start, start + len(self._pass.padded) // sequences, dtype=np.float32)
            angles = torch.from_numpy(np.outer(positions, frequencies / np.float32(rope.factor)))
            angles = angles[:, None].to(self._weights.device).repeat(sequences, 1, 1)
            self._ropes[key] = angles.cos(), angles.sin()
        return self._ropes[key]


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
