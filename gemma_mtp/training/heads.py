"""Parallel heads that fit a target: their configuration and first weights. What they are, models/heads.py says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.names import weight_shapes
from gemma_mtp.config import HeadsConfig, ModelConfig
from gemma_mtp.ops.torch import TorchWeights
from gemma_mtp.training.drafter import balanced_clusters, check_centroids, output_embedding, principal_directions

_CLUSTERED = 128  # the most directions of the embedding that tokens are clustered by


def heads_config(
    target: ModelConfig, *, count: int = 3, width: int | None = None, centroids: int | None = None, active: int = 32
) -> dict[str, Any]:
    """config.json of `count` parallel heads for `target`. width: of each head's MLP, None for the target's own.

    centroids: as drafter_config has them. Raises SettingsError.
    """
    config: dict[str, Any] = {
        "model_type": "gemma_mtp_heads",
        "backbone_hidden_size": target.hidden,
        "vocab_size": target.vocab,
        "num_heads": count,
        "intermediate_size": width or target.hidden,
        "rms_norm_eps": target.eps,
    }
    if centroids is not None:
        check_centroids(target, centroids)
        config |= {"num_centroids": centroids, "centroid_intermediate_top_k": min(active, centroids)}
    parsed = config_from_hf(config, "the configuration of the heads")
    assert isinstance(parsed, HeadsConfig)
    parsed.check_target(target)
    return config


@torch.no_grad()
def first_heads(config: HeadsConfig, target: ModelConfig, of_target: TorchWeights, seed: int = 0) -> dict[str, Tensor]:
    """Weights to start from: every head says what the target says of the next token, its MLP being nearly silent."""
    generator = torch.Generator().manual_seed(seed)
    size = of_target["final_norm"].square().mean().sqrt().item()  # of the target's hidden states
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        kind = name.rpartition(".")[2]
        if len(shape) > 1:
            gain = 0.1 if kind == "down" else 1.0
            weights[name] = torch.randn(shape, generator=generator) * (gain * shape[-1] ** -0.5)
        else:
            weights[name] = torch.full(shape, size if kind == "head_norm" else 1.0)
    if config.centroids:
        embedding = output_embedding(of_target, target).float()
        directions = principal_directions(embedding, min(_CLUSTERED, target.hidden))
        ordering, _ = balanced_clusters(embedding @ directions, config.centroids.count, seed)
        weights["token_ordering"] = ordering
        weights["centroids"] = embedding[ordering].unflatten(0, (config.centroids.count, -1)).mean(1)
    return weights
