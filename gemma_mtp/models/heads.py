"""Parallel heads as a drafter, as a definition over ops.

After "Better & Faster Large Language Models via Multi-token Prediction" (Gloeckle et al. 2024, arXiv 2404.19737): every
head reads the same hidden state of the target (after its final norm), and head i proposes the token i + 2 places after
that state's own; the next one is the target's own. Unlike there a head is a gated MLP beside the state instead of an
attention layer, so it keeps no keys and values, and its scores are of the target's own output embedding.

On disk: a folder with config.json (`model_type` "gemma_mtp_heads", `backbone_hidden_size`, `vocab_size`, `num_heads`,
`intermediate_size`, `rms_norm_eps`, and with a centroid head `num_centroids`, `centroid_intermediate_top_k`) and
model.safetensors. For each head I, under `model.layers.I.`: `pre_feedforward_layernorm.weight` [hidden],
`mlp.gate_proj.weight` and `mlp.up_proj.weight` [width, hidden], `mlp.down_proj.weight` [hidden, width], `norm.weight`
[hidden]. With a centroid head `masked_embedding.centroids.weight` [count, hidden] and
`masked_embedding.token_ordering` [vocab]. Norms are factors as they are (not 1 + w).
"""

from collections.abc import Iterator
from typing import TypeVar

from gemma_mtp.config import HeadsConfig
from gemma_mtp.ops.interface import Ops

T = TypeVar("T")


def draft_heads(ops: Ops[T], config: HeadsConfig) -> Iterator[T]:
    """Each head's logits as it is asked for, from the hidden states handed to the pass. "target_embed": the target's
    output embedding."""
    return (head(ops, config, i, ops.hidden(config.backbone_hidden)) for i in range(config.count))


def head(ops: Ops[T], config: HeadsConfig, i: int, state: T) -> T:
    y = ops.gated(ops.norm(state, f"{i}.ffn_norm"), f"{i}.gate", f"{i}.up")
    (y,) = ops.project(y, f"{i}.down")
    y = ops.norm(ops.outputs(ops.add(y, state)), f"{i}.head_norm")
    if config.centroids:
        return ops.centroid_logits(y, "centroids", "token_ordering", "target_embed", config.centroids.active)
    return ops.logits(y, "target_embed")
