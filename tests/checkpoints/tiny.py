"""Tiny checkpoints of every kind of model, with random weights: Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize
from safetensors.numpy import save_file

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.config import AnyConfig, DrafterConfig, ModelConfig

Weights = dict[str, np.ndarray]

_SIZES = {
    "hidden_size": 64,
    "vocab_size": 256,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "sliding_window": 32,
}
_GEMMA4 = {**_SIZES, "model_type": "gemma4_text", "global_head_dim": 64, "final_logit_softcapping": 30.0}
_WIDE = {  # the large ones: keys serve as values on full layers, where fewer heads have them
    **_GEMMA4,
    "num_hidden_layers": 6,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
}
_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]

# Keyword arguments of transformers' text configurations, one for each architecture of the families.
TARGETS: dict[str, dict[str, Any]] = {
    "gemma3": {**_SIZES, "model_type": "gemma3_text", "num_hidden_layers": 7, "query_pre_attn_scalar": 32},
    "gemma3 with scaled positions": {
        **_SIZES,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "E2B": {
        **_GEMMA4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 9,
        "layer_types": _PATTERN * 3,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 256,
    },
    "E4B": {
        **_GEMMA4,
        "num_hidden_layers": 12,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 256,
    },
    "12B unified": {**_WIDE, "model_type": "gemma4_unified_text"},
    "26B-A4B": {
        **_WIDE,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 32,
    },
    "31B": {**_WIDE, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2},
}
DRAFTER = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 96,
    "use_ordered_embeddings": True,
    "num_centroids": 64,
    "centroid_intermediate_top_k": 32,
    "text_config": {
        **_GEMMA4,
        "num_hidden_layers": 3,
        "layer_types": _PATTERN,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
}


HEADS = {
    "model_type": "gemma_mtp_heads",
    "backbone_hidden_size": 64,
    "vocab_size": 256,
    "num_heads": 4,
    "intermediate_size": 96,
    "num_centroids": 32,
    "centroid_intermediate_top_k": 8,
}


def drafter_for(target: Mapping[str, Any], *, centroids: bool, hidden: int = 48) -> dict[str, Any]:
    """config.json of a drafter that fits a tiny Gemma 4 target."""
    unified = "unified" in target["model_type"]
    of_target = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v")
    text = {
        **DRAFTER["text_config"],
        **{key: target[key] for key in of_target if key in target},
        "model_type": target["model_type"],
        "hidden_size": hidden,
    }
    if unified:
        del text["hidden_size_per_layer_input"], text["vocab_size_per_layer_input"]
    return {
        **DRAFTER,
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": centroids,
        "text_config": text,
    }


def random_weights(config: AnyConfig, seed: int = 0) -> Weights:
    """float32 weights by canonical name, scaled so that every part of the model shows in its logits."""
    rng = np.random.default_rng(seed)
    return {name: _random_weight(rng, config, name, shape) for name, shape in weight_shapes(config).items()}


def _random_weight(
    rng: np.random.Generator, config: AnyConfig, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    kind = name.rpartition(".")[2]
    if kind == "token_ordering":
        return rng.permutation(config.vocab)
    if len(shape) > 1:
        gain = {"router": 3.0}.get(kind, 1.0)  # a router that prefers some experts
        return (rng.standard_normal(shape) * gain / math.sqrt(shape[-1])).astype(np.float32)
    factors = rng.uniform(0.5, 1.5, shape)
    if kind == "final_norm":
        factors *= 5  # logits that the soft-cap bends
    if kind in ("q_norm", "k_norm"):
        # Scores spread by about 1.5, with Gemma 4's scale of 1 as with Gemma 3's.
        factors *= math.sqrt(1.5 / (config.attention_scale * math.sqrt(shape[0])))
    return factors.astype(np.float32)


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    weights: Weights | None = None,
    *,
    extra: Weights | None = None,
    **generation: Any,
) -> Weights:
    """A folder as transformers saves it, in float32; returns its weights by canonical name.

    config: what config.json holds. extra: further tensors, by their names in the file. generation: keys of
    generation_config.json.
    """
    path.mkdir(exist_ok=True)
    parsed = config_from_hf(config)
    weights = random_weights(parsed) if weights is None else weights
    minus = 1 if isinstance(parsed, ModelConfig) and parsed.family == "gemma3" else 0  # Gemma 3 applies norms as 1 + w
    decoder = "model.language_model." if "text_config" in config and isinstance(parsed, ModelConfig) else "model."
    tensors = {
        file_name(name, "hf", decoder): value - np.float32(minus) if name.endswith("norm") else value
        for name, value in weights.items()
    }
    save_file(tensors | (extra or {}), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    if generation:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return weights


def write_gguf(
    path: Path,
    config: ModelConfig | DrafterConfig,
    weights: Weights | None = None,
    *,
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
) -> None:
    """A GGUF file with the keys that llama.cpp's converter writes for such a model.

    kind: the type of matrices whose rows fit its blocks; a router, like norms, is always float32.
    tokenizer: keys of its own.
    """
    drafter = isinstance(config, DrafterConfig)
    family = "gemma4" if drafter else config.family
    writer = GGUFWriter(path, "gemma4-assistant" if drafter else family)
    layers = config.layers
    full = next(layer for layer in layers if layer.kind == "full")
    sliding = next(layer for layer in layers if layer.kind == "sliding")
    writer.add_context_length(512 if drafter else config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(len(layers))
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_head_count(full.heads)
    writer.add_sliding_window(sliding.window)
    writer.add_rope_freq_base(full.rope.theta)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    if full.rope.factor != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full.rope.factor)
    if family == "gemma3":
        writer.add_head_count_kv(full.kv_heads)
        writer.add_feed_forward_length(full.mlp_width)
        if config.attention_scale != full.head_dim**-0.5:
            writer.add_attention_scale(config.attention_scale)
    else:
        _add_gemma4_keys(writer, config)
    if drafter:
        writer.add_key_value("gemma4-assistant.embedding_length_out", config.backbone_hidden, 4)
    elif config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if tokenizer is not None:
        for key, value in tokenizer.items():
            _add_tokenizer_key(writer, key, value)
    elif not drafter:
        writer.add_bos_token_id(config.bos)
        writer.add_eos_token_id(config.eos[0])
        writer.add_pad_token_id(config.pad)
    weights = random_weights(config) if weights is None else weights
    for name, value in weights.items():
        _add_weight(writer, name, value, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_weight(writer: GGUFWriter, name: str, value: np.ndarray, kind: GGMLQuantizationType) -> None:
    if name == "token_ordering":
        writer.add_tensor(file_name(name, "gguf"), value.astype(np.int32))
    elif value.ndim == 1 or kind == GGMLQuantizationType.F32 or name.endswith("router"):
        writer.add_tensor(file_name(name, "gguf"), value)
    else:
        writer.add_tensor(file_name(name, "gguf"), quantize(value, kind), raw_dtype=kind)


def _add_tokenizer_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_gemma4_keys(writer: GGUFWriter, config: ModelConfig | DrafterConfig) -> None:
    layers = config.layers
    full = next(layer for layer in layers if layer.kind == "full")
    sliding = next(layer for layer in layers if layer.kind == "sliding")
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_feed_forward_length([layer.mlp_width for layer in layers])
    writer.add_sliding_window_pattern([layer.kind == "sliding" for layer in layers])
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_freq_base_swa(sliding.rope.theta)
    writer.add_shared_kv_layers(sum(layer.shares_kv_with is not None for layer in layers))
    writer.add_embedding_length_per_layer_input(0 if isinstance(config, DrafterConfig) else config.ple_width)
    if full.experts:
        writer.add_expert_count(full.experts.count)
        writer.add_expert_used_count(full.experts.active)
        writer.add_expert_feed_forward_length(full.experts.width)
    factors = [1.0] * full.rope.pairs + [1e30] * (full.head_dim // 2 - full.rope.pairs)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
