"""The names of weights: ours, GGUF's and Hugging Face's, and the check that a checkpoint has exactly what it should.

A weight's canonical name is "embed" for one of the whole model and "3.q" for one of layer 3. Shapes have outputs first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_mtp.checkpoints.keys import shown
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import AnyConfig, DrafterConfig, HeadsConfig, LayerConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

Format = Literal["gguf", "hf"]


@dataclass(frozen=True)
class _Names:
    gguf: str
    hf: str


# HF names are relative to the decoder ("model.language_model." and the like), but for those that start with "/".
_NAMES = {
    "embed": _Names("token_embd.weight", "embed_tokens.weight"),
    "final_norm": _Names("output_norm.weight", "norm.weight"),
    "lm_head": _Names("output.weight", "/lm_head.weight"),
    "ple_embed": _Names("per_layer_token_embd.weight", "embed_tokens_per_layer.weight"),
    "ple_model_proj": _Names("per_layer_model_proj.weight", "per_layer_model_projection.weight"),
    "ple_model_norm": _Names("per_layer_proj_norm.weight", "per_layer_projection_norm.weight"),
    "pre_projection": _Names("nextn.pre_projection.weight", "/pre_projection.weight"),
    "post_projection": _Names("nextn.post_projection.weight", "/post_projection.weight"),
    "centroids": _Names("masked_embd_centroids.weight", "/masked_embedding.centroids.weight"),
    "token_ordering": _Names("masked_embd_ordering", "/masked_embedding.token_ordering"),
}
_LAYER_NAMES = {
    "attn_norm": _Names("attn_norm.weight", "input_layernorm.weight"),
    "q": _Names("attn_q.weight", "self_attn.q_proj.weight"),
    "k": _Names("attn_k.weight", "self_attn.k_proj.weight"),
    "v": _Names("attn_v.weight", "self_attn.v_proj.weight"),
    "o": _Names("attn_output.weight", "self_attn.o_proj.weight"),
    "q_norm": _Names("attn_q_norm.weight", "self_attn.q_norm.weight"),
    "k_norm": _Names("attn_k_norm.weight", "self_attn.k_norm.weight"),
    "post_attn_norm": _Names("post_attention_norm.weight", "post_attention_layernorm.weight"),
    "ffn_norm": _Names("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    "gate": _Names("ffn_gate.weight", "mlp.gate_proj.weight"),
    "up": _Names("ffn_up.weight", "mlp.up_proj.weight"),
    "down": _Names("ffn_down.weight", "mlp.down_proj.weight"),
    "post_ffn_norm": _Names("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
    "layer_scale": _Names("layer_output_scale.weight", "layer_scalar"),
    "ple_gate": _Names("inp_gate.weight", "per_layer_input_gate.weight"),
    "ple_proj": _Names("proj.weight", "per_layer_projection.weight"),
    "ple_norm": _Names("post_norm.weight", "post_per_layer_input_norm.weight"),
    "router": _Names("ffn_gate_inp.weight", "router.proj.weight"),
    "router_scale": _Names("ffn_gate_inp.scale", "router.scale"),
    "expert_scale": _Names("ffn_down_exps.scale", "router.per_expert_scale"),
    "experts_gate_up": _Names("ffn_gate_up_exps.weight", "experts.gate_up_proj"),
    "experts_down": _Names("ffn_down_exps.weight", "experts.down_proj"),
    "expert_norm": _Names("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight"),
    "post_ffn_norm_1": _Names("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight"),
    "post_ffn_norm_2": _Names("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight"),
    "head_norm": _Names("head_norm.weight", "norm.weight"),
}

# Where the decoder lies in a Hugging Face file: of a text model, or inside a multimodal one (two generations of names).
_HF_DECODERS = ("model.", "model.language_model.", "language_model.model.")

# Tensors that text does not need: encoders of images and sound, and rotation factors, which the configuration holds.
_ENCODER = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector)\..*"
    r"|(v|a|mm)\..*"
)
_ROTATION = re.compile(r"rope_freqs\.weight|.*\.rotary_emb\..*")


@dataclass(frozen=True)
class NamedWeights:
    """The tensors of a checkpoint by canonical name, and the names of those left aside because text needs none."""

    weights: dict[str, TensorInfo]
    ignored: list[str]


def weight_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every weight of a model, in the order they are used."""
    if isinstance(config, HeadsConfig):
        return _heads_shapes(config)
    hidden = config.hidden
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab, hidden)}
    if isinstance(config, DrafterConfig):
        shapes["pre_projection"] = (hidden, 2 * config.backbone_hidden)
    elif config.ple_width:
        width = config.ple_width * len(config.layers)
        shapes["ple_embed"] = (config.ple_vocab, width)
        shapes["ple_model_proj"] = (width, hidden)
        shapes["ple_model_norm"] = (config.ple_width,)
    for i, layer in enumerate(config.layers):
        shapes |= {f"{i}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    shapes["final_norm"] = (hidden,)
    if isinstance(config, DrafterConfig):
        shapes["post_projection"] = (config.backbone_hidden, hidden)
        if config.centroids:
            shapes |= {"centroids": (config.centroids.count, hidden), "token_ordering": (config.vocab,)}
    elif not config.tied_embedding:
        shapes["lm_head"] = (config.vocab, hidden)
    return shapes


def _layer_shapes(config: ModelConfig | DrafterConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads, keys = config.hidden, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), "q": (heads, hidden), "q_norm": (layer.head_dim,)}
    if isinstance(config, ModelConfig) and layer.shares_kv_with is None:
        shapes |= {"k": (keys, hidden), "k_norm": (layer.head_dim,)}
        if not layer.value_is_key:
            shapes["v"] = (keys, hidden)
    shapes |= {"o": (hidden, heads), "post_attn_norm": (hidden,), "ffn_norm": (hidden,)}
    shapes |= {"gate": (layer.mlp_width, hidden), "up": (layer.mlp_width, hidden), "down": (hidden, layer.mlp_width)}
    if layer.experts:
        count, width = layer.experts.count, layer.experts.width
        shapes |= {"router": (count, hidden), "router_scale": (hidden,), "expert_scale": (count,)}
        shapes |= {"experts_gate_up": (count, 2 * width, hidden), "experts_down": (count, hidden, width)}
        shapes |= {"expert_norm": (hidden,), "post_ffn_norm_1": (hidden,), "post_ffn_norm_2": (hidden,)}
    shapes["post_ffn_norm"] = (hidden,)
    if isinstance(config, ModelConfig) and config.ple_width:
        width = config.ple_width
        shapes |= {"ple_gate": (width, hidden), "ple_proj": (hidden, width), "ple_norm": (hidden,)}
    if isinstance(config, DrafterConfig) or config.family == "gemma4":
        shapes["layer_scale"] = (1,)
    return shapes


def _heads_shapes(config: HeadsConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.backbone_hidden, config.width
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.count):
        shapes |= {f"{i}.ffn_norm": (hidden,), f"{i}.gate": (width, hidden), f"{i}.up": (width, hidden)}
        shapes |= {f"{i}.down": (hidden, width), f"{i}.head_norm": (hidden,)}
    if config.centroids:
        shapes |= {"centroids": (config.centroids.count, hidden), "token_ordering": (config.vocab,)}
    return shapes


def file_name(canonical: str, file_format: Format, decoder: str = "model.") -> str:
    """What a weight is called in a file. `decoder` is what HF names inside the decoder start with."""
    layer, _, name = canonical.rpartition(".")
    names = _LAYER_NAMES[name] if layer else _NAMES[name]
    if file_format == "gguf":
        return f"blk.{layer}.{names.gguf}" if layer else names.gguf
    if names.hf.startswith("/"):
        return names.hf[1:]
    return f"{decoder}layers.{layer}.{names.hf}" if layer else decoder + names.hf


def name_weights(
    config: AnyConfig,
    tensors: Mapping[str, TensorInfo],
    file_format: Format,
    source: object = "The checkpoint",
) -> NamedWeights:
    """Finds every weight of `config` in a checkpoint's tensors and checks its shape.

    Raises CheckpointError naming weights that are missing, have another shape, or that no part of the model uses.
    """
    decoder = _decoder_prefix(tensors) if file_format == "hf" else ""
    shapes = weight_shapes(config)
    names = {canonical: file_name(canonical, file_format, decoder) for canonical in shapes}
    if missing := [name for name in names.values() if name not in tensors]:
        raise CheckpointError(f"{source} lacks {_listed(missing)}.")
    for canonical, name in names.items():
        if tensors[name].shape != shapes[canonical]:
            raise CheckpointError(
                f"{source} has a tensor '{name}' of shape {list(tensors[name].shape)} where its "
                f"configuration asks for {list(shapes[canonical])}."
            )
    duplicates = {file_name(name, file_format, decoder) for name in _duplicates(config)}
    rest = [name for name in tensors if name not in set(names.values())]
    if left_over := [name for name in rest if name not in duplicates and not _is_ignored(name)]:
        raise CheckpointError(f"{source} has {_listed(left_over)}, which this kind of model does not use.")
    return NamedWeights({canonical: tensors[name] for canonical, name in names.items()}, rest)


def is_encoder(name: str) -> bool:
    """Whether a file's tensor belongs to an encoder of images or sound."""
    return _ENCODER.fullmatch(name) is not None


def _is_ignored(name: str) -> bool:
    return is_encoder(name) or _ROTATION.fullmatch(name) is not None


def _duplicates(config: AnyConfig) -> list[str]:
    """Weights that files may carry although others take their place: of shared keys and values, of a tied LM head."""
    if isinstance(config, HeadsConfig):
        return []
    if isinstance(config, DrafterConfig):
        sharing, tied = [*range(len(config.layers))], True
    else:
        sharing = [i for i, layer in enumerate(config.layers) if layer.shares_kv_with is not None]
        tied = config.tied_embedding
    return [f"{i}.{name}" for i in sharing for name in ("k", "v", "k_norm")] + ["lm_head"] * tied


def _decoder_prefix(names: Iterable[str]) -> str:
    names = set(names)
    embed = _NAMES["embed"].hf
    return next((prefix for prefix in _HF_DECODERS if prefix + embed in names), _HF_DECODERS[0])


def _listed(names: list[str]) -> str:
    tensors = "the tensor" if len(names) == 1 else "the tensors"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{tensors} {', '.join(shown(name) for name in names[:3])}{rest}"
