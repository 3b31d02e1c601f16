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
from gemma_mtp.checkpoints.names import file_name, weight_shapes
from gemma_mtp.config import DrafterConfig, ModelConfig

ASSISTANT_TOKENS = 4  # that transformers drafts a round unless told otherwise


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes config.json, model.safetensors, and for a drafter the generation_config.json that transformers needs.

    weights: by canonical name, norms as the factors they are.
    """
    parsed = config_from_hf(config, "the configuration")
    folder.mkdir(parents=True, exist_ok=True)
    minus = 1.0 if isinstance(parsed, ModelConfig) and parsed.family == "gemma3" else 0.0
    tensors = {}
    for name, shape in weight_shapes(parsed).items():
        value = weights[name].detach().cpu()
        if tuple(value.shape) != shape:
            raise ValueError(f"the weight {name} is {list(value.shape)}, not {list(shape)}")
        if value.is_floating_point():
            value = (value - minus if name.endswith("norm") else value).to(dtype)
        tensors[file_name(name, "hf")] = value.contiguous()
    with written_whole(folder / "model.safetensors") as out:
        out.write(save(tensors, {"format": "pt"}))
    named = {**config, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(named, indent=2) + "\n")
    if isinstance(parsed, DrafterConfig):
        generation = {"num_assistant_tokens": ASSISTANT_TOKENS, "num_assistant_tokens_schedule": "constant"}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """float32 weights with the values that a file in `dtype` holds."""
    return {
        name: value.detach().to(dtype).float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
