"""Opens a checkpoint of any supported format: its configuration, and its weights by canonical name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp.checkpoints.gguf import GGUF, part_names
from gemma_mtp.checkpoints.gguf_config import config_from_gguf
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.keys import read_json
from gemma_mtp.checkpoints.names import file_name, is_encoder, name_weights
from gemma_mtp.checkpoints.packed import check_layouts, is_packed, open_packed
from gemma_mtp.checkpoints.safetensors import open_folder, open_safetensors
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import AnyConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

PROJECTION = "model.embed_projection.weight"
"""Of a compact drafter's folder: what makes its embedding of its target's, where it is not the very same."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    `weights` holds exactly those that `names.weight_shapes(config)` lists, norms with the factor they multiply by.
    `ignored` names tensors that text does not need. `metadata` is that of a GGUF file, or what a packed checkpoint has
    in its place; None for a folder.
    """

    path: Path
    config: AnyConfig
    weights: dict[str, TensorInfo]
    ignored: list[str]
    metadata: Mapping[str, Any] | None

    @property
    def packed(self) -> bool:
        """Whether its matrices lie packed in their file (checkpoints/packed.py), for the native backend alone."""
        return any(tensor.layout != "rows" for tensor in self.weights.values())

    @property
    def skipped(self) -> str | None:
        """Of a multimodal checkpoint, what is left aside, as the end of a sentence about it."""
        encoders = [name for name in self.ignored if is_encoder(name)]
        return f"is run as text: {len(encoders)} tensors for images and sound are left aside." if encoders else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file (or the only one of a folder), a packed one, or a folder as Hugging Face has it.

    Raises CheckpointError.
    """
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    if is_compact(path):
        raise CheckpointError(f"{path} is a compact drafter, which opens only together with its target.")
    if path.is_dir():
        generation = path / "generation_config.json"
        config = config_from_hf(
            read_json(path / "config.json"),
            path / "config.json",
            read_json(generation) if generation.is_file() else None,
        )
        named = name_weights(config, open_folder(path), "hf", path)
        weights = named.weights
        if isinstance(config, ModelConfig) and config.family == "gemma3":
            weights = {name: _plus_one(info) if name.endswith("norm") else info for name, info in weights.items()}
        return Checkpoint(path, config, weights, named.ignored, None)
    if is_packed(path):
        metadata, tensors = open_packed(path)
        config = config_from_gguf(metadata, tensors, path)
        named = name_weights(config, tensors, "gguf", path)
        check_layouts(path, config, named.weights)
        return Checkpoint(path, config, named.weights, named.ignored, metadata)
    file = GGUF.open(path)
    tensors = file.tensors
    companion = centroids_path(file.path)
    if file.metadata.get("general.architecture") == "gemma4-assistant" and companion.is_file():
        tensors = tensors | open_safetensors(companion)
    config = config_from_gguf(file.metadata, tensors, file.path)
    named = name_weights(config, tensors, "gguf", file.path)
    return Checkpoint(file.path, config, named.weights, named.ignored, file.metadata)


def is_compact(path: Path) -> bool:
    """Whether a folder is a drafter's without an embedding: see checkpoints.compact. Raises CheckpointError."""
    if not (path / "model.safetensors").is_file():
        return False
    tensors = open_safetensors(path / "model.safetensors")
    return file_name("pre_projection", "hf") in tensors and file_name("embed", "hf") not in tensors


def config_of(path: Path) -> AnyConfig:
    """A checkpoint's configuration, of a compact drafter's too. Raises CheckpointError."""
    if is_compact(path):
        return config_from_hf(read_json(path / "config.json"), path / "config.json")
    return open_checkpoint(path).config


def centroids_path(drafter: Path) -> Path:
    """Where the centroid head of a drafter's GGUF file lies: llama.cpp loads no file that has it inside."""
    return drafter.with_suffix(".centroids.safetensors")


def _only_gguf(folder: Path) -> Path:
    models = [path for path in sorted(folder.glob("*.gguf")) if path.name == part_names(path.name)[0]]
    if not models:
        raise CheckpointError(f"{folder} holds no model: neither a config.json nor a GGUF file.")
    if len(models) > 1:
        raise CheckpointError(f"{folder} holds several models: name one of {', '.join(path.name for path in models)}.")
    return models[0]


def _plus_one(norm: TensorInfo) -> TensorInfo:
    """A Gemma 3 norm, which Hugging Face stores as w and applies as 1 + w, as float32."""
    if norm.type == "BF16":
        values = (norm.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif norm.type in ("F16", "F32"):
        values = norm.data.view("<f2" if norm.type == "F16" else "<f4").astype(np.float32)
    else:
        raise CheckpointError(
            f"{norm.file.path} has the norm '{norm.name}' as {norm.type} instead of BF16, F16 or F32."
        )
    data = (values + np.float32(1)).view(np.uint8)
    return TensorInfo(norm.name, norm.shape, "F32", data, norm.offset, norm.file)
