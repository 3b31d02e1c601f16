"""Trained weights as folders that transformers loads, and as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import PROJECTION
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.training import drafter

ASSISTANT_TOKENS = 4  # that transformers drafts a round unless told otherwise


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes config.json, model.safetensors, and for a drafter the generation_config.json that transformers needs.

    weights: by canonical name, norms as the factors they are.
    """
    parsed = config_from_hf(config, "the configuration")
    minus = 1.0 if isinstance(parsed, ModelConfig) and parsed.family == "gemma3" else 0.0
    tensors = {}
    for name, shape in weight_shapes(parsed).items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"the weight {name} is {list(weights[name].shape)}, not {list(shape)}")
        value = _stored(weights[name], dtype, minus if name.endswith("norm") else 0.0)
        tensors[file_name(name, "hf")] = value
    _write(folder, {**config, "dtype": str(dtype).removeprefix("torch.")}, tensors)
    if isinstance(parsed, DrafterConfig):
        generation = {"num_assistant_tokens": ASSISTANT_TOKENS, "num_assistant_tokens_schedule": "constant"}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_compact(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Writes a drafter as checkpoints.compact has it. weights: as they are trained, without an embedding."""
    parsed = config_from_hf(config, "the configuration")
    tensors = {}
    if drafter.PROJECTION in weights:
        tensors[PROJECTION] = _stored(weights[drafter.PROJECTION].T, torch.float16)
    for name in weight_shapes(parsed):
        if name != "embed":
            tensors[file_name(name, "hf")] = _stored(weights[name], torch.float16)
    _write(folder, {**config, "dtype": "float16"}, tensors)


def widened(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], hidden: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same assistant, wider, filled up with zeros: llama.cpp takes none that is as wide as its target."""
    text = config["text_config"]
    wide = {**config, "text_config": {**text, "hidden_size": hidden}}
    of_norms = (text["hidden_size"] / hidden) ** 0.5  # the mean of the squares now counts zeros too
    filled = {}
    for name, shape in weight_shapes(config_from_hf(wide, "the configuration")).items():
        filled[name] = value = weights[name].detach()
        if value.shape != shape:
            filled[name] = value.new_zeros(shape)
            filled[name][tuple(map(slice, value.shape))] = value * of_norms if value.ndim == 1 else value
    return wide, filled


def _stored(weight: Tensor, dtype: torch.dtype, minus: float = 0.0) -> Tensor:
    """A weight as a file has it: floats less `minus` in dtype, token ids as int64."""
    value = weight.detach().cpu()
    return ((value - minus).to(dtype) if value.is_floating_point() else value).contiguous()


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "model.safetensors") as out:
        out.write(save(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """float32 weights with the values that a file in `dtype` holds."""
    return {
        name: value.detach().to(dtype).float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
