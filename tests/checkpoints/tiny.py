"""Tiny checkpoints of every kind of model: as transformers' configurations, and as GGUF files of any configuration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.config import DrafterConfig, ModelConfig

_SIZES = {
    "hidden_size": 64,
    "vocab_size": 256,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 32,
}
_GEMMA4 = {**_SIZES, "model_type": "gemma4_text", "global_head_dim": 32, "final_logit_softcapping": 30.0}
_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]

# Keyword arguments of transformers' text configurations, one for each architecture of the families.
TARGETS = {
    "gemma3": {**_SIZES, "model_type": "gemma3_text", "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
    "gemma3 with scaled positions": {
        **_SIZES,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "gemma4 with shared keys and per-layer embeddings": {
        **_GEMMA4,
        "num_hidden_layers": 9,
        "layer_types": _PATTERN * 3,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 256,
    },
    "gemma4 with keys as values": {
        **_GEMMA4,
        "num_hidden_layers": 6,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4 with experts": {
        **_GEMMA4,
        "num_hidden_layers": 6,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
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


def write_gguf(path: Path, config: ModelConfig | DrafterConfig, seed: int = 0) -> None:
    """A GGUF file of random float32 weights, with the keys that llama.cpp's converter writes for such a model."""
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
    else:
        _add_gemma4_keys(writer, config)
    if drafter:
        writer.add_key_value("gemma4-assistant.embedding_length_out", config.backbone_hidden, 4)
    else:
        writer.add_bos_token_id(config.bos)
        writer.add_eos_token_id(config.eos[0])
        writer.add_pad_token_id(config.pad)
        if config.logit_softcap:
            writer.add_final_logit_softcapping(config.logit_softcap)
    rng = np.random.default_rng(seed)
    for name, shape in weight_shapes(config).items():
        if name == "token_ordering":
            values = rng.permutation(config.vocab).astype(np.int32)
        else:
            values = (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
        writer.add_tensor(file_name(name, "gguf"), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
