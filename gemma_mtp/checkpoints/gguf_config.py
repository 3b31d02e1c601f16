"""Model configurations from GGUF metadata. The keys and their defaults are those that llama.cpp writes and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np

from gemma_mtp.checkpoints.keys import MAX_LAYERS, Keys, shown
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import (
    CentroidsConfig,
    DrafterConfig,
    ExpertsConfig,
    LayerConfig,
    LayerKind,
    ModelConfig,
    RopeConfig,
    layers_sharing_kv,
)
from gemma_mtp.errors import CheckpointError

_NOT_TURNED = 1e29  # rope_freqs divides a pair's angle by 1, or by 1e30 for a pair that does not turn


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], source: object = "The GGUF file"
) -> ModelConfig | DrafterConfig:
    """The configuration of a target or drafter. `source` names the file in errors. Raises CheckpointError."""
    arch = Keys(metadata, source).text("general.architecture")
    readers: dict[str, Callable[..., ModelConfig | DrafterConfig]]
    readers = {"gemma3": _gemma3, "gemma4": _gemma4, "gemma4-assistant": _drafter}
    if arch not in readers:
        known = ", ".join(readers)
        raise CheckpointError(f"{source} holds a model of the kind {shown(arch)}, but only {known} are supported.")
    try:
        return readers[arch](Keys(metadata, source, arch + "."), Keys(metadata, source), tensors, source)
    except ValueError as fault:
        raise CheckpointError(f"{source} describes a model that cannot be: {fault}.") from None


def _gemma3(keys: Keys, top: Keys, tensors: Mapping[str, TensorInfo], source: object) -> ModelConfig:
    hidden, count = _sizes(keys)
    heads = keys.per_layer("attention.head_count", count)
    kv_heads = keys.per_layer("attention.head_count_kv", count)
    mlp_widths = keys.per_layer("feed_forward_length", count)
    head_dim = _head_dim(keys, "attention.key_length", "attention.value_length")
    window = keys.integer("attention.sliding_window")
    full_rope = RopeConfig(keys.number("rope.freq_base", 1e6), head_dim // 2, _rope_factor(keys))
    sliding_rope = RopeConfig(keys.number("rope.freq_base_swa", 1e4), head_dim // 2)
    layers = tuple(
        LayerConfig(
            kind=kind,
            heads=heads[i],
            kv_heads=kv_heads[i],
            head_dim=head_dim,
            mlp_width=mlp_widths[i],
            rope=full_rope if kind == "full" else sliding_rope,
            window=None if kind == "full" else window,
        )
        for i, kind in enumerate(_kinds(keys, count, default_period=6))
    )
    # The file does not say query_pre_attn_scalar: it is the head dimension, but hidden / heads in the 27B (62 layers).
    scalar = hidden / heads[0] if count == 62 else head_dim
    return ModelConfig(
        family="gemma3",
        layers=layers,
        attention_scale=keys.number("attention.scale", scalar**-0.5),
        norm_values=False,
        **_common(keys, top, tensors, source, hidden),
    )


def _gemma4(keys: Keys, top: Keys, tensors: Mapping[str, TensorInfo], source: object) -> ModelConfig:
    hidden, count = _sizes(keys)
    ple_width = keys.integer("embedding_length_per_layer_input", 0, low=0)
    ple_vocab = _shape(tensors, "per_layer_token_embd.weight", source)[0] if ple_width else 0
    experts = None
    if keys.integer("expert_count", 0, low=0):
        experts = ExpertsConfig(
            keys.integer("expert_count"), keys.integer("expert_used_count"), keys.integer("expert_feed_forward_length")
        )
    shared = keys.integer("attention.shared_kv_layers", 0, low=0)
    return ModelConfig(
        family="gemma4",
        layers=_gemma4_layers(keys, tensors, source, count, shared, experts),
        attention_scale=1.0,
        norm_values=True,
        ple_width=ple_width,
        ple_vocab=ple_vocab,
        **_common(keys, top, tensors, source, hidden),
    )


def _drafter(keys: Keys, top: Keys, tensors: Mapping[str, TensorInfo], source: object) -> DrafterConfig:
    hidden, count = _sizes(keys)
    centroids = None
    if "masked_embd_centroids.weight" in tensors:
        number = _shape(tensors, "masked_embd_centroids.weight", source)[0]
        centroids = CentroidsConfig(number, keys.integer("centroid_top_k", min(32, number)))
    return DrafterConfig(
        backbone_hidden=keys.integer("embedding_length_out"),
        hidden=hidden,
        vocab=_shape(tensors, "token_embd.weight", source)[0],
        layers=_gemma4_layers(keys, tensors, source, count, shared=0, experts=None),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        centroids=centroids,
    )


def _gemma4_layers(
    keys: Keys,
    tensors: Mapping[str, TensorInfo],
    source: object,
    count: int,
    shared: int,
    experts: ExpertsConfig | None,
) -> tuple[LayerConfig, ...]:
    heads = keys.per_layer("attention.head_count", count)
    kv_heads = keys.per_layer("attention.head_count_kv", count)
    mlp_widths = keys.per_layer("feed_forward_length", count)
    head_dim = {
        "full": _head_dim(keys, "attention.key_length", "attention.value_length"),
        "sliding": _head_dim(keys, "attention.key_length_swa", "attention.value_length_swa"),
    }
    rope = {
        "full": RopeConfig(
            keys.number("rope.freq_base", 1e6), _turned_pairs(tensors, source, head_dim["full"]), _rope_factor(keys)
        ),
        "sliding": RopeConfig(keys.number("rope.freq_base_swa", 1e4), head_dim["sliding"] // 2),
    }
    window = keys.integer("attention.sliding_window")
    kinds = _kinds(keys, count)
    sources = layers_sharing_kv(kinds, shared)
    return tuple(
        LayerConfig(
            kind=kind,
            heads=heads[i],
            kv_heads=kv_heads[i],
            head_dim=head_dim[kind],
            mlp_width=mlp_widths[i],
            rope=rope[kind],
            window=None if kind == "full" else window,
            shares_kv_with=sources[i],
            value_is_key=f"blk.{i}.attn_k.weight" in tensors and f"blk.{i}.attn_v.weight" not in tensors,
            experts=experts,
        )
        for i, kind in enumerate(kinds)
    )


def _common(keys: Keys, top: Keys, tensors: Mapping[str, TensorInfo], source: object, hidden: int) -> dict[str, Any]:
    """The values that both families have in the same place."""
    vocab = _shape(tensors, "token_embd.weight", source)[0]
    tokens = top.get("tokenizer.ggml.tokens") if top.has("tokenizer.ggml.tokens") else None
    if isinstance(tokens, Sized) and len(tokens) != vocab:
        raise CheckpointError(f"{source} has embeddings of {vocab} tokens, but a vocabulary of {len(tokens)}.")
    ends = [top.integer("tokenizer.ggml.eos_token_id", 1, low=0)]
    for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        if top.has(key):
            ends.append(top.integer(key, low=0))
    return {
        "hidden": hidden,
        "vocab": vocab,
        "context": keys.integer("context_length"),
        "eps": keys.number("attention.layer_norm_rms_epsilon"),
        "logit_softcap": keys.number("final_logit_softcapping") if keys.has("final_logit_softcapping") else None,
        "tied_embedding": "output.weight" not in tensors,
        "bos": top.integer("tokenizer.ggml.bos_token_id", 2, low=0),
        "eos": tuple(dict.fromkeys(ends)),
        "pad": top.integer("tokenizer.ggml.padding_token_id", 0, low=0),
    }


def _sizes(keys: Keys) -> tuple[int, int]:
    return keys.integer("embedding_length"), keys.integer("block_count", high=MAX_LAYERS)


def _head_dim(keys: Keys, key: str, value_key: str) -> int:
    size = keys.integer(key, 256)
    if keys.integer(value_key, size) != size:
        raise keys.fault(value_key, f"set to another size than '{key}', which no Gemma does")
    return size


def _kinds(keys: Keys, count: int, default_period: int | None = None) -> list[LayerKind]:
    """The attention of each layer, from a flag for each one or from "every n-th is full"."""
    pattern = keys.get("attention.sliding_window_pattern", default_period)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != count or pattern.dtype != np.bool_:
            raise keys.fault("attention.sliding_window_pattern", f"without one flag for each of the {count} layers")
        return ["sliding" if sliding else "full" for sliding in pattern]
    period = keys.integer("attention.sliding_window_pattern", default_period)
    return ["full" if (i + 1) % period == 0 else "sliding" for i in range(count)]


def _rope_factor(keys: Keys) -> float:
    """The linear scaling of full layers' positions."""
    kind = keys.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise keys.fault("rope.scaling.type", f"set to {shown(kind)}, but only linear scaling is supported")
    return keys.number("rope.scaling.factor") if kind == "linear" else 1.0


def _turned_pairs(tensors: Mapping[str, TensorInfo], source: object, head_dim: int) -> int:
    """How many rotation pairs of a full layer turn: `rope_freqs` has 1 for those, and 1e30 for those that do not."""
    if "rope_freqs.weight" not in tensors:
        raise CheckpointError(f"{source} lacks the tensor 'rope_freqs.weight'.")
    tensor = tensors["rope_freqs.weight"]
    if tensor.type == "F32" and tensor.shape == (head_dim // 2,):
        factors = tensor.data.view("<f4")
        pairs = int((factors == 1.0).sum())
        if pairs and (factors[:pairs] == 1.0).all() and (factors[pairs:] > _NOT_TURNED).all():
            return pairs
    raise CheckpointError(f"{source} has a tensor 'rope_freqs.weight' that is not {head_dim // 2} times 1, then 1e30.")


def _shape(tensors: Mapping[str, TensorInfo], name: str, source: object) -> tuple[int, ...]:
    """The shape of a matrix that the configuration depends on."""
    if name not in tensors:
        raise CheckpointError(f"{source} lacks the tensor '{name}'.")
    if len(tensors[name].shape) != 2:
        raise CheckpointError(f"{source} has a tensor '{name}' that is not a matrix.")
    return tensors[name].shape
