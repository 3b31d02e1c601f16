"""The decoder of Gemma 3 and Gemma 4, as a definition over ops.

Architecture: "Gemma 3 Technical Report" (arXiv 2503.19786), and for Gemma 4 the released configurations with the
implementation in transformers 5.21.0. Sandwich norms around attention and MLP, RMSNorm of queries and keys per head,
sliding layers between full ones, a gated MLP. Gemma 4 adds per-layer embeddings, layers that read earlier layers' keys
and values, keys that serve as values, experts beside the MLP, and a scalar a layer. What a layer has, LayerConfig says.
"""

import math
from typing import Generic, NamedTuple, TypeVar

from gemma_mtp.config import LayerConfig, ModelConfig
from gemma_mtp.ops.interface import Ops

T = TypeVar("T")


class Decoded(NamedTuple, Generic[T]):
    """For each wanted row: logits [vocab] of the next token, and the last hidden state [hidden], normed."""

    logits: T
    hidden: T


def decode(ops: Ops[T], config: ModelConfig) -> Decoded[T]:
    """The whole model, from the rows' tokens. Layer i keeps its keys and values in cache layer i."""
    x = ops.embed("embed", config.embedding_scale)
    ple = per_layer_embeddings(ops, config, x) if config.ple_width else None
    for i, layer in enumerate(config.layers):
        x = attention(ops, config, layer, i, x)
        x = mlp(ops, config, layer, i, x)
        if ple is not None:
            x = add_per_layer_embedding(ops, config, i, x, ple)
    hidden = ops.norm(ops.outputs(x), "final_norm")
    logits = ops.logits(hidden, "embed" if config.tied_embedding else "lm_head")
    if config.logit_softcap:
        logits = ops.softcap(logits, config.logit_softcap)
    return Decoded(logits, hidden)


def attention(ops: Ops[T], config: ModelConfig, layer: LayerConfig, i: int, x: T) -> T:
    y = ops.norm(x, f"{i}.attn_norm")
    source = i if layer.shares_kv_with is None else layer.shares_kv_with
    if source != i:
        (q,) = ops.project(y, f"{i}.q")
    elif layer.value_is_key:
        q, k = ops.project(y, f"{i}.q", f"{i}.k")
        v = ops.copy(k)
    else:
        q, k, v = ops.project(y, f"{i}.q", f"{i}.k", f"{i}.v")
    q = ops.heads(q, layer.head_dim, f"{i}.q_norm", layer.rope)
    if source == i:
        k = ops.heads(k, layer.head_dim, f"{i}.k_norm", layer.rope)
        if config.norm_values:
            v = ops.heads(v, layer.head_dim, None, None)
        ops.remember(i, k, v)
    (y,) = ops.project(ops.attend(q, source, config.layers[source], config.attention_scale), f"{i}.o")
    return ops.add_norm(x, y, f"{i}.post_attn_norm")


def mlp(ops: Ops[T], config: ModelConfig, layer: LayerConfig, i: int, x: T) -> T:
    y = ops.gated(ops.norm(x, f"{i}.ffn_norm"), f"{i}.gate", f"{i}.up")
    (y,) = ops.project(y, f"{i}.down")
    if layer.experts:
        y = ops.norm(y, f"{i}.post_ffn_norm_1")
        (scores,) = ops.project(ops.norm(x, f"{i}.router_scale", config.hidden**-0.5), f"{i}.router")
        z = ops.norm(x, f"{i}.expert_norm")
        names = (f"{i}.experts_gate_up", f"{i}.experts_down", f"{i}.expert_scale")
        y = ops.add_norm(y, ops.experts(z, scores, *names, layer.experts.active), f"{i}.post_ffn_norm_2")
    last = config.family == "gemma4" and not config.ple_width
    return ops.add_norm(x, y, f"{i}.post_ffn_norm", f"{i}.layer_scale" if last else None)


def per_layer_embeddings(ops: Ops[T], config: ModelConfig, x: T) -> T:
    """[layers * ple_width] a row: what each layer is told of the token, from a table and from the token's embedding."""
    (y,) = ops.project(x, "ple_model_proj")
    y = ops.heads(ops.scale(y, config.hidden**-0.5), config.ple_width, "ple_model_norm", None)
    return ops.add(y, ops.embed("ple_embed", math.sqrt(config.ple_width)), 2**-0.5)


def add_per_layer_embedding(ops: Ops[T], config: ModelConfig, i: int, x: T, ple: T) -> T:
    (gate,) = ops.project(x, f"{i}.ple_gate")
    (y,) = ops.project(ops.gelu_times(gate, ple, i * config.ple_width), f"{i}.ple_proj")
    return ops.add_norm(x, y, f"{i}.ple_norm", f"{i}.layer_scale")
