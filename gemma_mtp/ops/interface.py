"""The ops that models are written in.

An op takes and gives handles of tensors with one vector for every row of a pass; what a handle is, each executor
decides. A row is one (sequence, position). Weights are named by their canonical names (checkpoints/names.py); widths
are in values. Ops that say so overwrite their first argument, and return it.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from gemma_mtp.config import LayerConfig, RopeConfig

T = TypeVar("T")


class Ops(Protocol[T]):
    def hidden(self, width: int) -> T:
        """Vectors [width] that the caller hands to the pass, one for each row."""

    def embed(self, weight: str, scale: float) -> T:
        """Each row's token looked up in [vocab, width], times `scale`."""

    def norm(self, x: T, weight: str | None, factor: float = 1.0) -> T:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight * factor); without a weight, ones."""

    def project(self, x: T, *weights: str) -> Sequence[T]:
        """weight @ x for each weight [outputs, inputs]."""

    def gated(self, x: T, gate: str, up: str) -> T:
        """gelu(gate @ x) * (up @ x), gelu in its tanh form."""

    def experts(self, x: T, scores: T, gate_up: str, down: str, expert_scale: str, active: int) -> T:
        """A mixture of experts: sum over the chosen e of p_e * expert_scale[e] * down[e] @ (gelu(g) * u).

        scores [experts]: the `active` largest of their softmax are chosen and divided by their sum, which gives p.
        g, u: the halves of gate_up[e] @ x, gate_up being [experts, 2 * width, inputs], down [experts, outputs, width].
        """

    def gelu_times(self, gate: T, x: T, column: int) -> T:
        """gelu(gate) * x[column : column + width of gate]."""

    def add(self, x: T, y: T, factor: float = 1.0) -> T:
        """(x + y) * factor; overwrites x."""

    def add_norm(self, x: T, y: T, weight: str, scale: str | None = None) -> T:
        """(x + RMSNorm(y)) * scale, scale being a weight [1]; overwrites x, and y is not to be used again."""

    def scale(self, x: T, factor: float) -> T:
        """x * factor; overwrites x."""

    def copy(self, x: T) -> T:
        """x, to be overwritten apart from it."""

    def concat(self, a: T, b: T) -> T:
        """a, then b."""

    def heads(self, x: T, head_dim: int, weight: str | None, rope: RopeConfig | None) -> T:
        """RMSNorm of each head of x (without a weight: ones), then rotation by the row's position; overwrites x."""

    def remember(self, cache_layer: int, k: T, v: T) -> None:
        """Writes keys and values into the cache at the rows' positions."""

    def attend(self, q: T, cache_layer: int, shape: LayerConfig, scale: float, behind: int = 0) -> T:
        """softmax(scale * q . keys) . values over what each row sees of a layer of the cache.

        shape: the layer that made the keys and values. A row at position p sees the positions from p + 1 - window (or
        0) to p - behind.
        """

    def outputs(self, x: T) -> T:
        """Of the rows of x, only those whose result is wanted."""

    def logits(self, x: T, weight: str) -> T:
        """weight @ x for a weight [vocab, inputs]: a score for every token."""

    def centroid_logits(self, x: T, centroids: str, ordering: str, weight: str, active: int) -> T:
        """Scores for the tokens of the `active` centroids that score highest, all others being out of the question.

        centroids [count, inputs]; ordering [vocab] lists the tokens centroid by centroid, each having as many.
        """

    def softcap(self, x: T, cap: float) -> T:
        """cap * tanh(x / cap); overwrites x."""
