"""The decoder of Gemma 3, as a definition over ops.

Architecture: "Gemma 3 Technical Report" (arXiv 2503.19786). Sandwich norms around attention and MLP, RMSNorm of queries
and keys per head, five sliding layers to a full one, a gated MLP, and an output head tied to the embedding.
"""

from typing import Generic, NamedTuple, TypeVar

from gemma_mtp.config import LayerConfig, ModelConfig
from gemma_mtp.errors import CheckpointError
from gemma_mtp.ops.interface import Ops

T = TypeVar("T")


class Decoded(NamedTuple, Generic[T]):
    """For each wanted row: logits [vocab] of the next token, and the last hidden state [hidden], normed."""

    logits: T
    hidden: T


def decode(ops: Ops[T], config: ModelConfig) -> Decoded[T]:
    """The whole model, from the rows' tokens. Layer i keeps its keys and values in cache layer i."""
    if config.family != "gemma3":
        raise CheckpointError(f"A {config.family} target cannot be run yet: this version runs Gemma 3.")
    x = ops.embed("embed", config.embedding_scale)
    for i, layer in enumerate(config.layers):
        x = attention(ops, config, layer, i, x)
        x = mlp(ops, i, x)
    hidden = ops.norm(ops.outputs(x), "final_norm")
    return Decoded(ops.logits(hidden, "embed" if config.tied_embedding else "lm_head"), hidden)


def attention(ops: Ops[T], config: ModelConfig, layer: LayerConfig, i: int, x: T) -> T:
    q, k, v = ops.project(ops.norm(x, f"{i}.attn_norm"), f"{i}.q", f"{i}.k", f"{i}.v")
    q = ops.heads(q, layer.head_dim, f"{i}.q_norm", layer.rope)
    k = ops.heads(k, layer.head_dim, f"{i}.k_norm", layer.rope)
    ops.remember(i, k, v)
    (y,) = ops.project(ops.attend(q, i, layer, config.attention_scale), f"{i}.o")
    return ops.add_norm(x, y, f"{i}.post_attn_norm")


def mlp(ops: Ops[T], i: int, x: T) -> T:
    y = ops.gated(ops.norm(x, f"{i}.ffn_norm"), f"{i}.gate", f"{i}.up")
    (y,) = ops.project(y, f"{i}.down")
    return ops.add_norm(x, y, f"{i}.post_ffn_norm")
