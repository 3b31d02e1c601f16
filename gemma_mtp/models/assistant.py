"""Google's MTP drafter for Gemma 4 ("gemma4_assistant"), as a definition over ops.

It drafts one token a step from the newest token and a hidden state: the target's after its final norm, then its own. It
makes no keys and values: its queries read those of the target's last layer of the same kind, all from the position of
the newest decided token, whose own keys the target has not made yet. After the implementation in transformers 5.21.0.
"""

from typing import Generic, NamedTuple, TypeVar

from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.ops.interface import Ops

T = TypeVar("T")


class Drafted(NamedTuple, Generic[T]):
    """For each row: logits of the token after the newest, and the hidden state [backbone_hidden] for the next step."""

    logits: T
    hidden: T


def draft_step(ops: Ops[T], config: DrafterConfig, target: ModelConfig) -> Drafted[T]:
    """One step, from the rows' tokens and hidden states handed to the pass. "target_embed": the target's embedding."""
    newest = ops.embed("target_embed", target.embedding_scale)
    (x,) = ops.project(ops.concat(newest, ops.hidden(config.backbone_hidden)), "pre_projection")
    for i in range(len(config.layers)):
        x = attention(ops, config, target, i, x)
        x = mlp(ops, i, x)
    last = ops.norm(ops.outputs(x), "final_norm")
    (hidden,) = ops.project(last, "post_projection")
    if config.centroids:
        logits = ops.centroid_logits(last, "centroids", "token_ordering", "embed", config.centroids.active)
    else:
        logits = ops.logits(last, "embed")
    return Drafted(logits, hidden)


def attention(ops: Ops[T], config: DrafterConfig, target: ModelConfig, i: int, x: T) -> T:
    layer = config.layers[i]
    source = target.kv_source(layer.kind)
    assert source is not None, "DrafterConfig.check_target has seen to it"
    (q,) = ops.project(ops.norm(x, f"{i}.attn_norm"), f"{i}.q")
    q = ops.heads(q, layer.head_dim, f"{i}.q_norm", layer.rope)
    (y,) = ops.project(ops.attend(q, source, target.layers[source], config.attention_scale, behind=1), f"{i}.o")
    return ops.add_norm(x, y, f"{i}.post_attn_norm")


def mlp(ops: Ops[T], i: int, x: T) -> T:
    y = ops.gated(ops.norm(x, f"{i}.ffn_norm"), f"{i}.gate", f"{i}.up")
    (y,) = ops.project(y, f"{i}.down")
    return ops.add_norm(x, y, f"{i}.post_ffn_norm", f"{i}.layer_scale")
