"""Model configurations from Hugging Face's config.json. Keys and defaults are those of transformers' Gemma classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.checkpoints.keys import MAX_LAYERS, Keys, shown
from gemma_mtp.config import (
    AnyConfig,
    CentroidsConfig,
    DrafterConfig,
    ExpertsConfig,
    Family,
    HeadsConfig,
    LayerConfig,
    LayerKind,
    ModelConfig,
    RopeConfig,
    layers_sharing_kv,
)
from gemma_mtp.errors import CheckpointError

_TARGETS: dict[str, Family] = {
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}
_DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
_HEADS = "gemma_mtp_heads"
_KINDS: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def config_from_hf(
    config: Mapping[str, Any], source: object = "config.json", generation: Mapping[str, Any] | None = None
) -> AnyConfig:
    """The configuration of a target or drafter. `source` names the file in errors. Raises CheckpointError.

    `generation` is generation_config.json, where chat models list all tokens that end a turn.
    """
    try:
        return _config(Keys(config, source), Keys(generation or {}, source), source)
    except ValueError as fault:
        raise CheckpointError(f"{source} describes a model that cannot be: {fault}.") from None


def _config(top: Keys, generation: Keys, source: object) -> AnyConfig:
    kind = top.text("model_type")
    unified = kind.startswith("gemma4_unified")
    if kind in _DRAFTERS:
        return _drafter(top, unified)
    if kind == _HEADS:
        return _heads(top)
    if kind not in _TARGETS:
        known = ", ".join([*_TARGETS, *_DRAFTERS, _HEADS])
        raise CheckpointError(f"{source} describes a model of the kind {shown(kind)}, but only {known} are supported.")
    text = top.section("text_config") if top.has("text_config") else top
    return _target(_TARGETS[kind], text, top, generation, unified)


def _target(family: Family, text: Keys, top: Keys, generation: Keys, unified: bool) -> ModelConfig:
    vocab = text.integer("vocab_size", 262_208 if family == "gemma3" else 262_144)
    ple_width = 0
    if family == "gemma4" and not unified:
        ple_width = text.integer("hidden_size_per_layer_input", 256, low=0)
    context = 262_144 if unified else 131_072
    return ModelConfig(
        family=family,
        hidden=text.integer("hidden_size", 2304),
        vocab=vocab,
        layers=_gemma3_layers(text) if family == "gemma3" else _gemma4_layers(text, unified),
        context=text.integer("max_position_embeddings", context),
        eps=text.number("rms_norm_eps", 1e-6),
        attention_scale=text.number("query_pre_attn_scalar", 256) ** -0.5 if family == "gemma3" else 1.0,
        norm_values=family == "gemma4",
        ple_width=ple_width,
        ple_vocab=text.integer("vocab_size_per_layer_input", 262_144) if ple_width else 0,
        logit_softcap=text.number("final_logit_softcapping") if text.has("final_logit_softcapping") else None,
        tied_embedding=top.flag("tie_word_embeddings", text.flag("tie_word_embeddings", True)),
        bos=text.integer("bos_token_id", 2, low=0),
        eos=_ends(generation, top, text),
        pad=text.integer("pad_token_id", 0, low=0),
    )


def _drafter(top: Keys, unified: bool) -> DrafterConfig:
    text = top.section("text_config", {})
    centroids = None
    if top.flag("use_ordered_embeddings", False):
        centroids = CentroidsConfig(top.integer("num_centroids", 2048), top.integer("centroid_intermediate_top_k", 32))
    return DrafterConfig(
        backbone_hidden=top.integer("backbone_hidden_size", 3840 if unified else 1536),
        hidden=text.integer("hidden_size", 2304),
        vocab=text.integer("vocab_size", 262_144),
        layers=_gemma4_layers(text, unified, drafter=True),
        eps=text.number("rms_norm_eps", 1e-6),
        centroids=centroids,
    )


def _heads(top: Keys) -> HeadsConfig:
    centroids = None
    if top.has("num_centroids"):
        centroids = CentroidsConfig(top.integer("num_centroids"), top.integer("centroid_intermediate_top_k", 32))
    return HeadsConfig(
        backbone_hidden=top.integer("backbone_hidden_size"),
        vocab=top.integer("vocab_size"),
        count=top.integer("num_heads", high=64),
        width=top.integer("intermediate_size"),
        eps=top.number("rms_norm_eps", 1e-6),
        centroids=centroids,
    )


def _gemma3_layers(text: Keys) -> tuple[LayerConfig, ...]:
    _check_common(text)
    if text.has("attn_logit_softcapping"):
        raise text.fault("attn_logit_softcapping", "set, which no Gemma 3 does")
    head_dim = text.integer("head_dim", 256)
    if text.has("rope_parameters"):
        ropes = text.section("rope_parameters")
        full, sliding = _rope(ropes, "full_attention", head_dim, 1e6), _rope(ropes, "sliding_attention", head_dim, 1e4)
    else:  # the spelling of earlier files
        factor = _rope_factor(text.section("rope_scaling")) if text.has("rope_scaling") else 1.0
        full = RopeConfig(text.number("rope_theta", 1e6), head_dim // 2, factor)
        sliding = RopeConfig(text.number("rope_local_base_freq", 1e4), head_dim // 2)
    window = text.integer("sliding_window", 4096)
    return tuple(
        LayerConfig(
            kind=kind,
            heads=text.integer("num_attention_heads", 8),
            kv_heads=text.integer("num_key_value_heads", 4),
            head_dim=head_dim,
            mlp_width=text.integer("intermediate_size", 9216),
            rope=full if kind == "full" else sliding,
            window=None if kind == "full" else window,
        )
        for kind in _kinds(text, text.integer("num_hidden_layers", 26, high=MAX_LAYERS))
    )


def _gemma4_layers(text: Keys, unified: bool, drafter: bool = False) -> tuple[LayerConfig, ...]:
    _check_common(text)
    kinds = _kinds(text, text.integer("num_hidden_layers", 30, high=MAX_LAYERS))
    kinds[-1] = "full"  # as transformers does, whatever the file says
    shared = 0 if drafter else text.integer("num_kv_shared_layers", 0, low=0)
    sources = layers_sharing_kv(kinds, shared)
    window = text.integer("sliding_window", 1024 if unified else 512)
    width = text.integer("intermediate_size", 9216)
    double_wide = text.flag("use_double_wide_mlp", False)
    key_is_value = text.flag("attention_k_eq_v", False)
    experts = None
    if not unified and text.flag("enable_moe_block", False):
        experts = ExpertsConfig(
            text.integer("num_experts"), text.integer("top_k_experts"), text.integer("moe_intermediate_size")
        )
    default_ropes = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    ropes = text.section("rope_parameters", default_ropes)
    layers = []
    for i, kind in enumerate(kinds):
        head_dim, kv_heads = _layer_heads(text, i, kind, key_is_value)
        layers.append(
            LayerConfig(
                kind=kind,
                heads=text.integer("num_attention_heads", 8),
                kv_heads=kv_heads,
                head_dim=head_dim,
                mlp_width=width * 2 if double_wide and sources[i] is not None else width,
                rope=_rope(ropes, f"{kind}_attention", head_dim, 1e6 if kind == "full" else 1e4),
                window=None if kind == "full" else window,
                shares_kv_with=sources[i],
                value_is_key=key_is_value and kind == "full" and sources[i] is None and not drafter,
                experts=experts,
            )
        )
    return tuple(layers)


def _layer_heads(text: Keys, index: int, kind: LayerKind, key_is_value: bool) -> tuple[int, int]:
    """Head dimension and key/value heads of a layer, from `per_layer_config` or as earlier files have them."""
    head_dim, kv_heads = text.integer("head_dim", 256), text.integer("num_key_value_heads", 4)
    if text.has("per_layer_config"):
        overrides = text.section("per_layer_config")
        # transformers pads the numbers of layers to the same length: "05" beside "11".
        key = next((name for name in overrides.names() if name and name.lstrip("0") == str(index).lstrip("0")), None)
        if key is None:
            return head_dim, kv_heads
        own = overrides.section(key)
        if unknown := own.names() - {"head_dim", "num_key_value_heads"}:
            raise own.fault(min(unknown), "set for one layer, which is not supported")
        return own.integer("head_dim", head_dim), own.integer("num_key_value_heads", kv_heads)
    if kind == "full":
        head_dim = text.integer("global_head_dim", 512)
        if key_is_value:
            kv_heads = text.integer("num_global_key_value_heads", kv_heads)
    return head_dim, kv_heads


def _kinds(text: Keys, count: int) -> list[LayerKind]:
    if not text.has("layer_types"):
        period = text.integer("sliding_window_pattern", text.integer("_sliding_window_pattern", 6))
        return ["full" if (i + 1) % period == 0 else "sliding" for i in range(count)]
    names = text.get("layer_types")
    if not isinstance(names, list) or len(names) != count or not all(name in list(_KINDS) for name in names):
        raise text.fault("layer_types", f"that does not name {' or '.join(_KINDS)} for each of the {count} layers")
    return [_KINDS[name] for name in names]


def _rope(ropes: Keys, key: str, head_dim: int, theta: float) -> RopeConfig:
    own = ropes.section(key, {"rope_type": "default"})
    kind = own.text("rope_type", "default")
    partial = own.number("partial_rotary_factor", 1.0)
    factor = 1.0 if kind == "default" else _rope_factor(own, kind)
    if partial > 1 or (partial < 1 and kind != "proportional"):
        raise own.fault("partial_rotary_factor", f"set to {partial}, which the RoPE type {shown(kind)} does not allow")
    return RopeConfig(own.number("rope_theta", theta), int(partial * head_dim // 2), factor)


def _rope_factor(own: Keys, kind: str | None = None) -> float:
    kind = kind or own.text("rope_type")
    if kind == "proportional":
        return own.number("factor", 1.0)
    if kind == "linear":
        return own.number("factor")
    raise own.fault("rope_type", f"set to {shown(kind)}, but only default, linear and proportional are supported")


def _check_common(text: Keys) -> None:
    """Switches that no released Gemma sets and that the maths here does not have."""
    if text.text("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise text.fault("hidden_activation", "set to something other than gelu_pytorch_tanh")
    if text.flag("attention_bias", False):
        raise text.fault("attention_bias", "set, but projections with a bias are not supported")
    if text.get("use_bidirectional_attention", False) not in (False, "vision"):
        raise text.fault("use_bidirectional_attention", "set: this is an encoder, not a model that generates text")


def _ends(*places: Keys) -> tuple[int, ...]:
    """The tokens that end a generation, from the first place that names any."""
    for keys in places:
        if keys.has("eos_token_id") and (tokens := keys.integers("eos_token_id", low=0)):
            return tuple(dict.fromkeys(tokens))
    return (1,)
