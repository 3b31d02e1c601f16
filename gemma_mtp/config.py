"""What a model is: one configuration for Gemma 3 and Gemma 4, and one for their drafters.

Everything that differs between layers is a value of the layer's own record, so that the maths in `models/` asks no
question of a family or a name. `checkpoints/gguf_config.py` and `checkpoints/hf_config.py` build these from files. A
configuration that contradicts itself raises ValueError with the fault, which they turn into a CheckpointError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gemma_mtp.errors import PairError

Family = Literal["gemma3", "gemma4"]
LayerKind = Literal["full", "sliding"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: pair i, (x[i], x[i + head_dim / 2]), turns by position / factor * theta^(-2 i / head_dim)."""

    theta: float
    pairs: int  # only pairs 0 to pairs - 1 turn: head_dim / 2 of them, or fewer with "proportional" RoPE
    factor: float = 1.0  # linear scaling of positions


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts beside the dense MLP: `active` of `count` experts, each `width` wide, work on a token."""

    count: int
    active: int
    width: int


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer."""

    kind: LayerKind
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope: RopeConfig
    window: int | None = None  # a sliding row sees the last `window` positions, its own among them
    shares_kv_with: int | None = None  # the layer whose keys and values this one reads instead of making its own
    value_is_key: bool = False  # values are k_proj's output before norm and rotation; there is no v_proj
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        heads, kv_heads, head_dim, pairs = self.heads, self.kv_heads, self.head_dim, self.rope.pairs
        _require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key/value heads evenly")
        _require(head_dim % 2 == 0, f"the head dimension {head_dim} is odd")
        _require(pairs <= head_dim // 2, f"{pairs} rotated pairs do not fit a head of {head_dim}")
        _require((self.window is None) == (self.kind == "full"), "only sliding layers have a window")
        if self.experts:
            _require(
                self.experts.active <= self.experts.count,
                f"{self.experts.active} active experts are more than the {self.experts.count} there are",
            )


@dataclass(frozen=True)
class ModelConfig:
    """A target: a Gemma 3 or Gemma 4 text decoder."""

    family: Family
    hidden: int
    vocab: int
    layers: tuple[LayerConfig, ...]
    context: int  # positions it was trained for
    eps: float  # of every RMSNorm
    attention_scale: float  # query times key times this
    norm_values: bool  # values are RMS-normed (without a weight) per head
    ple_width: int = 0  # width of per-layer embeddings; 0: none
    ple_vocab: int = 0  # rows of their table
    logit_softcap: float | None = None  # c * tanh(logits / c)
    tied_embedding: bool = True  # the LM head is the embedding
    bos: int = 2
    eos: tuple[int, ...] = (1,)  # every one ends a generation
    pad: int = 0

    def __post_init__(self) -> None:
        _require(len(self.layers) > 0, "it has no layers")
        for i, layer in enumerate(self.layers):
            if layer.shares_kv_with is None:
                continue
            _require(0 <= layer.shares_kv_with < i, f"layer {i} takes its keys and values from no earlier layer")
            source = self.layers[layer.shares_kv_with]
            same = (source.kind, source.kv_heads, source.head_dim) == (layer.kind, layer.kv_heads, layer.head_dim)
            _require(same, f"layer {i} takes keys and values of another shape from layer {layer.shares_kv_with}")
            _require(source.shares_kv_with is None, f"layer {layer.shares_kv_with} has no keys and values to share")
        if self.ple_width:
            known = self.ple_vocab
            _require(known >= self.vocab, f"its per-layer embeddings have {known} of {self.vocab} tokens")
        for name, token in [("bos", self.bos), ("pad", self.pad), *(("eos", token) for token in self.eos)]:
            _require(0 <= token < self.vocab, f"its {name} token {token} is outside the vocabulary of {self.vocab}")

    @property
    def embedding_scale(self) -> float:
        """What a token's embedding is multiplied by: sqrt(hidden)."""
        return math.sqrt(self.hidden)

    def kv_source(self, kind: LayerKind) -> int | None:
        """The last layer of a kind that makes its own keys and values: a drafter's layers of that kind read them."""
        own = (i for i, layer in enumerate(self.layers) if layer.kind == kind and layer.shares_kv_with is None)
        return max(own, default=None)

    def kv_values(self, context: int) -> int:
        """How many numbers the keys and values of one sequence of `context` tokens take."""
        return sum(
            2 * layer.kv_heads * layer.head_dim * min(context, layer.window or context)
            for layer in self.layers
            if layer.shares_kv_with is None
        )


@dataclass(frozen=True)
class CentroidsConfig:
    """The centroid head: the `active` best of `count` centroids are chosen, and only their tokens are scored."""

    count: int
    active: int

    def check(self, vocab: int) -> None:
        _require(self.active <= self.count, f"{self.active} active centroids are more than the {self.count} there are")
        _require(vocab % self.count == 0, f"{self.count} centroids cannot share {vocab} tokens evenly")


@dataclass(frozen=True)
class DrafterConfig:
    """Google's MTP drafter ("gemma4_assistant"). Its layers make no keys and values: they read the target's.

    A layer of kind k attends to the cache of the target's layer `ModelConfig.kv_source(k)`.
    """

    backbone_hidden: int  # the target's hidden size
    hidden: int
    vocab: int
    layers: tuple[LayerConfig, ...]
    eps: float
    centroids: CentroidsConfig | None = None  # None: the LM head is its tied embedding, whole
    attention_scale: float = 1.0

    def __post_init__(self) -> None:
        _require(len(self.layers) > 0, "it has no layers")
        if self.centroids:
            self.centroids.check(self.vocab)

    def check_target(self, target: ModelConfig) -> None:
        """Raises PairError when this drafter cannot draft for `target`."""
        _check_sizes(self, target)
        for i, layer in enumerate(self.layers):
            source = target.kv_source(layer.kind)
            if source is None:
                raise PairError(f"The drafter's layer {i} reads {layer.kind} attention, of which the target has none.")
            needed, given = layer.head_dim, target.layers[source].head_dim
            if needed != given:
                raise PairError(f"The drafter's layer {i} reads keys of size {needed}, but the target's have {given}.")
            needed, given = layer.kv_heads, target.layers[source].kv_heads
            if needed != given:
                raise PairError(f"The drafter's layer {i} reads {needed} key/value heads; the target's have {given}.")


@dataclass(frozen=True)
class HeadsConfig:
    """Parallel heads on the target's last hidden state (models/heads.py); head i proposes the token i + 2 places on."""

    backbone_hidden: int  # the target's hidden size
    vocab: int
    count: int
    width: int  # of each head's gated MLP
    eps: float
    centroids: CentroidsConfig | None = None  # None: every token is scored

    def __post_init__(self) -> None:
        _require(self.count > 0, "it has no heads")
        if self.centroids:
            self.centroids.check(self.vocab)

    def check_target(self, target: ModelConfig) -> None:
        """Raises PairError when these heads cannot draft for `target`."""
        _check_sizes(self, target)


AnyDrafterConfig = DrafterConfig | HeadsConfig
AnyConfig = ModelConfig | DrafterConfig | HeadsConfig


def _check_sizes(drafter: AnyDrafterConfig, target: ModelConfig) -> None:
    if drafter.backbone_hidden != target.hidden:
        raise PairError(
            f"The drafter is for a target of hidden size {drafter.backbone_hidden}, but this one has {target.hidden}."
        )
    if drafter.vocab != target.vocab:
        raise PairError(f"The drafter has {drafter.vocab} tokens, but the target has {target.vocab}.")


def layers_sharing_kv(kinds: list[LayerKind], last: int) -> list[int | None]:
    """`LayerConfig.shares_kv_with` of every layer when the `last` ones reuse the keys and values of earlier layers."""
    first = len(kinds) - last
    _require(first > 0, f"{last} of {len(kinds)} layers cannot take their keys and values from earlier ones")
    sources: list[int | None] = [None] * first
    for kind in kinds[first:]:
        source = max((i for i in range(first) if kinds[i] == kind), default=None)
        _require(source is not None, f"no layer of {kind} attention has keys and values to share")
        sources.append(source)
    return sources


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)
