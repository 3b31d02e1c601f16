"""The drafter that fits a target: its configuration, first weights, and the clusters of its centroid head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoints import load
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import is_compact
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.checkpoints.safetensors import open_folder
from gemma_mtp.config import AnyDrafterConfig, DrafterConfig, LayerKind, ModelConfig, RopeConfig
from gemma_mtp.errors import SettingsError
from gemma_mtp.ops.torch import TorchWeights
from gemma_mtp.training.optimise import initial_weights

PROJECTION = "embed_projection"
TOKENS_A_CENTROID = 16  # their number is a multiple of this, for which the native head is made


def drafter_config(
    target: ModelConfig,
    *,
    hidden: int | None = None,
    layers: int = 2,
    mlp_width: int | None = None,
    centroids: int | None = None,
    active: int = 32,
) -> dict[str, Any]:
    """config.json of a drafter for `target`, as transformers has it: sliding layers, and one of full attention last.

    Sizes of heads and rotation are those of the target's layers whose keys it reads. hidden: None for the target's own,
    so that its last layers can be what the drafter starts as. centroids: how many its head has,
    of which the `active` best are looked into; None: it scores every token. Raises SettingsError.
    """
    full, sliding = _source(target, "full"), _source(target, "sliding")
    if hidden is None:
        hidden, mlp_width = target.hidden, mlp_width or target.layers[-1].mlp_width
    text: dict[str, Any] = {
        "model_type": "gemma4_text",
        "hidden_size": hidden,
        "vocab_size": target.vocab,
        "vocab_size_per_layer_input": 0,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": mlp_width or 2 * hidden,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
        "num_kv_shared_layers": 0,
        "num_attention_heads": full.heads,
        "num_key_value_heads": sliding.kv_heads,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "sliding_window": sliding.window,
        "max_position_embeddings": target.context,
        "rms_norm_eps": target.eps,
        "rope_parameters": {
            "full_attention": _rope(full.rope, full.head_dim),
            "sliding_attention": _rope(sliding.rope, sliding.head_dim),
        },
        "bos_token_id": target.bos,
        "eos_token_id": list(target.eos),
        "pad_token_id": target.pad,
        "tie_word_embeddings": True,
    }
    if full.kv_heads != sliding.kv_heads:
        text |= {"attention_k_eq_v": True, "num_global_key_value_heads": full.kv_heads}
    config: dict[str, Any] = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target.hidden,
        "use_ordered_embeddings": centroids is not None,
        "tie_word_embeddings": True,
        "text_config": text,
    }
    if centroids is not None:
        check_centroids(target, centroids)
        config |= {"num_centroids": centroids, "centroid_intermediate_top_k": min(active, centroids)}
    parsed = config_from_hf(config, "the drafter's configuration")
    assert isinstance(parsed, DrafterConfig)
    parsed.check_target(target)
    return config


def check_centroids(target: ModelConfig, count: int) -> None:
    """Raises SettingsError when so many centroids cannot share the target's tokens."""
    if target.vocab % (TOKENS_A_CENTROID * count):
        raise SettingsError(
            f"{count} centroids cannot share {target.vocab} tokens in sixteens: "
            f"use a number that divides {target.vocab // TOKENS_A_CENTROID}."
        )


def inherited_layers(config: DrafterConfig, target: ModelConfig) -> list[int] | None:
    """The target's layers that the drafter's can start as: its last ones of each kind; None where they do not fit."""
    if config.hidden != target.hidden:
        return None
    left = list(enumerate(target.layers))
    found: list[int] = []
    for own in reversed(config.layers):
        of_kind = [(i, layer) for i, layer in left if layer.kind == own.kind]
        if not of_kind:
            return None
        i, layer = of_kind[-1]
        if layer.experts or (layer.heads, layer.head_dim, layer.mlp_width) != (own.heads, own.head_dim, own.mlp_width):
            return None
        found.insert(0, i)
        left = left[:i]
    return found


@torch.no_grad()
def first_weights(
    config: DrafterConfig, target: ModelConfig, of_target: TorchWeights, seed: int = 0
) -> dict[str, Tensor]:
    """Weights to start from: the target's last layers where they fit, else random ones.

    The drafter's embedding is not among them, `with_embedding` makes it. After layers of the target it is the target's
    output embedding. Else it is that times PROJECTION [target's hidden, hidden], which starts as the embedding's
    principal directions, so that tokens the target tells apart poorly are close together here too; and queries are
    normed as those of the target's layer that made the keys. The target's attention may have a factor that a drafter's
    has not: its norm of queries takes that in.
    """
    weights = initial_weights(config, seed, without={"embed"})
    embedding = output_embedding(of_target, target).float()
    layers = inherited_layers(config, target)
    if layers:
        of_layers = [(name, *name.partition(".")[::2]) for name in weights if "." in name]
        sources = {name: f"{layers[int(own)]}.{part}" for name, own, part in of_layers}
        weights |= {name: of_target[source].float().clone() for name, source in sources.items() if source in of_target}
        weights["final_norm"] = of_target["final_norm"].float().clone()
        weights["post_projection"] = torch.eye(target.hidden)
    else:
        directions = principal_directions(embedding, config.hidden)
        factor = config.hidden**-0.5 / (embedding @ directions).square().mean().sqrt()
        weights[PROJECTION] = directions * factor
    for own, layer in enumerate(config.layers):
        source = layers[own] if layers else target.kv_source(layer.kind)
        of_source = of_target[f"{source}.q_norm"].float()
        weights[f"{own}.q_norm"] = of_source * (target.attention_scale / config.attention_scale)
    if config.centroids:
        embed = with_embedding(weights, embedding)["embed"]
        weights["token_ordering"], weights["centroids"] = balanced_clusters(embed, config.centroids.count, seed)
    return weights


def weights_of(folder: Path, config: AnyDrafterConfig) -> dict[str, Tensor]:
    """A drafter's weights from its folder, to train on: of a compact one without an embedding, as first_weights are."""
    tensors = open_folder(folder)
    names = {name: file_name(name, "hf") for name in weight_shapes(config)}
    if is_compact(folder):
        del names["embed"]
        if load.PROJECTION in tensors:
            names[PROJECTION] = load.PROJECTION
    own = TorchWeights({name: tensors[of] for name, of in names.items()}, torch.device("cpu"), torch.float32)
    weights = {name: own[name].clone() for name in names}
    if PROJECTION in weights:
        weights[PROJECTION] = weights[PROJECTION].T.contiguous()
    return weights


def output_embedding(of_target: TorchWeights, target: ModelConfig) -> Tensor:
    """[vocab, hidden]: what turns the target's last hidden states into logits."""
    return of_target["embed" if target.tied_embedding else "lm_head"].detach()


@torch.no_grad()
def with_embedding(weights: Mapping[str, Tensor], embedding: Tensor) -> dict[str, Tensor]:
    """Weights as an assistant's, with an embedding if they have none. embedding: the target's output_embedding."""
    if "embed" in weights:
        return dict(weights)
    others = {name: value for name, value in weights.items() if name != PROJECTION}
    return others | {"embed": embedding.float() @ weights[PROJECTION] if PROJECTION in weights else embedding.float()}


def fitting_centroids(vocab: int) -> int | None:
    """How many centroids suit a vocabulary: about one for 128 tokens, as Google's have; None where none fit."""
    sixteens, rest = divmod(vocab, TOKENS_A_CENTROID)
    if rest:
        return None
    fitting = [count for count in range(8, sixteens + 1) if sixteens % count == 0]
    return min(fitting, key=lambda count: abs(math.log(vocab / count / 128)), default=None)


@torch.no_grad()
def balanced_clusters(vectors: Tensor, count: int, seed: int = 0, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """k-means with clusters of one size: the vectors' indices, cluster by cluster, and the centres [count, width].

    Each round every vector asks for its nearest centre that still has room; those that would lose most by going
    elsewhere, by the distance between their two nearest, choose first.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count]].clone()
    for _ in range(rounds):
        members = _fill(vectors, centres).view(count, -1)
        centres = vectors[members].mean(1)
    return members.flatten(), centres


def _fill(vectors: Tensor, centres: Tensor) -> Tensor:
    """int64 [vectors]: their indices, those of the first centre first."""
    count = len(centres)
    room = torch.full((count,), len(vectors) // count)
    chosen = torch.empty(len(vectors), dtype=torch.long)
    waiting = torch.arange(len(vectors))
    while len(waiting):
        free = room.nonzero().flatten()
        nearest, urgency = _nearest(vectors[waiting], centres[free])
        wish = free[nearest]
        order = urgency.argsort(descending=True)
        order = order[wish[order].argsort(stable=True)]  # by centre, the most urgent first
        asked = torch.bincount(wish, minlength=count)
        place = torch.arange(len(order)) - (asked.cumsum(0) - asked)[wish[order]]  # in the queue of its centre
        taken = place < room[wish[order]]
        chosen[waiting[order[taken]]] = wish[order[taken]]
        room -= torch.minimum(asked, room)
        waiting = waiting[order[~taken]]
    return chosen.argsort(stable=True)


def _nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vector the nearest centre, and how much farther away the next one is."""
    parts = [torch.cdist(part, centres).topk(min(2, len(centres)), largest=False) for part in vectors.split(8192)]
    distances = torch.cat([part.values for part in parts])
    return torch.cat([part.indices[:, 0] for part in parts]), distances[:, -1] - distances[:, 0]


def principal_directions(x: Tensor, width: int) -> Tensor:
    """[columns, width] of x [rows, columns], the largest first; random ones once there are no more."""
    columns = x.shape[1]
    _, directions = torch.linalg.eigh(x.T @ x)  # ascending
    found = directions.flip(1)[:, :width]
    if width > columns:
        generator = torch.Generator().manual_seed(0)
        rest = torch.randn(columns, width - columns, generator=generator) * 0.1 * columns**-0.5
        found = torch.cat([found, rest], 1)
    return found


def _source(target: ModelConfig, kind: LayerKind) -> Any:
    source = target.kv_source(kind)
    if source is None:
        raise SettingsError(f"The target has no layers of {kind} attention, which a drafter reads.")
    return target.layers[source]


def _rope(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    described: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.factor != 1:
        described |= {"rope_type": "linear", "factor": rope.factor}
    if rope.pairs < head_dim // 2:
        described |= {"rope_type": "proportional", "partial_rotary_factor": 2 * rope.pairs / head_dim}
    return described
