"""A configuration as GGUF metadata: the inverse of gguf_config.py, with the keys that llama.cpp's converter writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_mtp.config import DrafterConfig, LayerConfig, ModelConfig
from gemma_mtp.errors import CheckpointError


def architecture(config: ModelConfig | DrafterConfig) -> str:
    return "gemma4-assistant" if isinstance(config, DrafterConfig) else config.family


def keys_from_config(config: ModelConfig | DrafterConfig, context: int) -> dict[str, Any]:
    """All keys of the architecture. context: positions the model was trained for. Raises CheckpointError."""
    own = _common(config, context) | _rope(config)
    if isinstance(config, ModelConfig):
        if config.logit_softcap:
            own["final_logit_softcapping"] = config.logit_softcap
        if config.family == "gemma3":
            own |= _gemma3(config)
        else:
            own |= _gemma4(config) | {
                "attention.shared_kv_layers": sum(layer.shares_kv_with is not None for layer in config.layers),
                "embedding_length_per_layer_input": config.ple_width,
            }
    else:
        own |= _gemma4(config) | {
            "attention.shared_kv_layers": len(config.layers),
            "embedding_length_per_layer_input": 0,
            "embedding_length_out": config.backbone_hidden,
            "nextn_predict_layers": len(config.layers),
        }
        if config.centroids:
            own["centroid_top_k"] = config.centroids.active
    return {f"{architecture(config)}.{key}": value for key, value in own.items()}


def rope_freqs(config: ModelConfig | DrafterConfig) -> np.ndarray | None:
    """A Gemma 4's tensor 'rope_freqs.weight': float32 [head_dim / 2 of full layers], 1e30 for pairs that stay."""
    if isinstance(config, ModelConfig) and config.family == "gemma3":
        return None
    full = _layer(config, "full")
    return np.where(np.arange(full.head_dim // 2) < full.rope.pairs, 1.0, 1e30).astype(np.float32)


def _common(config: ModelConfig | DrafterConfig, context: int) -> dict[str, Any]:
    layers, full = config.layers, _layer(config, "full")
    return {
        "context_length": context,
        "embedding_length": config.hidden,
        "block_count": len(layers),
        "feed_forward_length": _per_layer([layer.mlp_width for layer in layers]),
        "attention.head_count": _per_layer([layer.heads for layer in layers]),
        "attention.head_count_kv": _per_layer([layer.kv_heads for layer in layers]),
        "attention.layer_norm_rms_epsilon": config.eps,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.sliding_window": _layer(config, "sliding").window,
    }


def _rope(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    full, sliding = _layer(config, "full").rope, _layer(config, "sliding").rope
    keys: dict[str, Any] = {"rope.freq_base": full.theta, "rope.freq_base_swa": sliding.theta}
    if full.factor != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": full.factor}
    return keys


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    layers = config.layers
    keys: dict[str, Any] = {}
    if [layer.kind for layer in layers] != ["full" if (i + 1) % 6 == 0 else "sliding" for i in range(len(layers))]:
        keys["attention.sliding_window_pattern"] = _sliding(layers)
    # What llama.cpp and gguf_config.py take for granted; another scale they can only be told of.
    scalar = config.hidden // layers[0].heads if len(layers) == 62 else layers[0].head_dim
    if config.attention_scale != scalar**-0.5:
        keys["attention.scale"] = config.attention_scale
    return keys


def _gemma4(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    layers, full, sliding = config.layers, _layer(config, "full"), _layer(config, "sliding")
    keys: dict[str, Any] = {
        "attention.sliding_window_pattern": _sliding(layers),
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
    }
    if full.experts:
        keys["expert_count"] = full.experts.count
        keys["expert_used_count"] = full.experts.active
        keys["expert_feed_forward_length"] = full.experts.width
    return keys


def _sliding(layers: tuple[LayerConfig, ...]) -> np.ndarray:
    return np.array([layer.kind == "sliding" for layer in layers])


def _per_layer(values: list[int]) -> int | np.ndarray:
    """One number where it serves for all layers."""
    return values[0] if len(set(values)) == 1 else np.array(values, np.int32)


def _layer(config: ModelConfig | DrafterConfig, kind: str) -> LayerConfig:
    """A layer of a kind, after which all of that kind are described."""
    layers = [layer for layer in config.layers if layer.kind == kind]
    if not layers:
        raise CheckpointError(f"The model has no layers of {kind} attention, which its keys in GGUF take for granted.")
    described = {(layer.head_dim, layer.rope, layer.window) for layer in layers}
    if len(described) > 1:
        raise CheckpointError(f"The model's layers of {kind} attention differ in ways that GGUF's keys cannot say.")
    return layers[0]
