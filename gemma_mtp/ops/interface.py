"""The ops that models are written in.

An op takes and gives handles of tensors with one vector for every row of a pass; what a handle is, each executor
decides. A row is one (sequence, position). Weights are named by their canonical names (checkpoints/names.py).
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from gemma_mtp.config import LayerConfig, RopeConfig

T = TypeVar("T")


class Ops(Protocol[T]):
    def embed(self, weight: str, scale: float) -> T:
        """Each row's token looked up in [vocab, width], times `scale`."""

    def norm(self, x: T, weight: str) -> T:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

    def project(self, x: T, *weights: str) -> Sequence[T]:
        """weight @ x for each weight [outputs, inputs]."""

    def logits(self, x: T, weight: str) -> T:
        """weight @ x for a weight [vocab, inputs]: a score for every token."""

    def gated(self, x: T, gate: str, up: str) -> T:
        """gelu(gate @ x) * (up @ x), gelu in its tanh form."""

    def add_norm(self, x: T, y: T, weight: str) -> T:
        """x + RMSNorm(y); x itself is overwritten."""

    def heads(self, x: T, head_dim: int, weight: str, rope: RopeConfig) -> T:
        """RMSNorm of each head of x, then rotation by the row's position; x itself is overwritten."""

    def remember(self, cache_layer: int, k: T, v: T) -> None:
        """Writes keys and values into the cache at the rows' positions."""

    def attend(self, q: T, cache_layer: int, layer: LayerConfig, scale: float) -> T:
        """softmax(scale * q . keys) . values over what each row sees: itself and, within the window, all before it."""

    def outputs(self, x: T) -> T:
        """Of the rows of x, only those whose result is wanted."""
