"""Converts a checkpoint of any supported format to GGUF, as llama.cpp reads it, or packs it for the kernels."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.compact import open_drafter
from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.checkpoints.gguf_keys import architecture, keys_from_config, rope_freqs
from gemma_mtp.checkpoints.gguf_tokenizer import keys_from_tokenizer
from gemma_mtp.checkpoints.gguf_writer import OutTensor, write_gguf, write_gguf_to
from gemma_mtp.checkpoints.keys import Keys, read_json
from gemma_mtp.checkpoints.load import Checkpoint, centroids_path, open_checkpoint
from gemma_mtp.checkpoints.names import file_name
from gemma_mtp.checkpoints.packed import write_packed
from gemma_mtp.checkpoints.packing import read_rows
from gemma_mtp.checkpoints.quantization import Fitting
from gemma_mtp.checkpoints.rounding import ROWS_AT_ONCE, compensation, quantize_compensated
from gemma_mtp.checkpoints.safetensors import write_safetensors
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import DrafterConfig, HeadsConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

PACKED = "packed"
"""What `convert --type` takes for a packed checkpoint."""

_SLAB = 1 << 22  # values converted at a time
_CENTROIDS = ("centroids", "token_ordering")  # they go beside the file
# general.file_type: the type of most weights, as llama.cpp numbers such files.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
_FILES_OWN = {"general.alignment", "general.file_type", "general.quantization_version"}

_log = logging.getLogger("gemma_mtp")

Moments = Mapping[str, Sequence[NDArray[np.float32]]]
"""By canonical name, what training/calibrate.py found each matrix to be multiplied with."""


def convert(
    source: Path,
    out: Path,
    kind: str | None = None,
    force: bool = False,
    target: Path | None = None,
    moments: Moments | None = None,
) -> list[Path]:
    """Writes the checkpoint at `source` as a GGUF file or packed, and returns the files written.

    kind: a type of quantization.TYPES for all matrices (but routers, which stay float32 like vectors), None to keep
    each one's, or PACKED for a packed checkpoint, which keeps them too. In GGUF a drafter's centroid head goes into a
    file of its own. force: replace files that are there. target: of a compact drafter, to make its embedding from.
    moments: matrices of these that become Q4_0 are rounded with error compensation (checkpoints/rounding.py).
    Raises CheckpointError, and then leaves nothing half written.
    """
    checkpoint = open_drafter(source, open_checkpoint(target)) if target else open_checkpoint(source)
    config = checkpoint.config
    if checkpoint.packed:
        raise CheckpointError(f"{source} is packed already: convert the checkpoint it was made of.")
    if isinstance(config, HeadsConfig):
        raise CheckpointError(f"{source} holds parallel heads, for which GGUF has no form.")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: its folder does not exist.")
    packed = kind == PACKED
    companion = centroids_path(out) if isinstance(config, DrafterConfig) and not packed else None
    for path in (out, companion):
        if path is not None and path.exists() and not force:
            raise CheckpointError(f"{path} exists already: use --force to replace it.")
    if skipped := checkpoint.skipped:
        _log.warning("%s %s", checkpoint.path, skipped)
    pool = _native.ThreadPool(os.cpu_count() or 1)
    if packed:
        header = io.BytesIO()
        write_gguf_to(header, _metadata(checkpoint, config), [*_rotation(config)])
        write_packed(out, checkpoint.weights, config, header.getvalue(), pool)
        return [out]
    fitting = Fitting(kind) if kind else None
    tensors = [*_rotation(config), *_matrices_and_vectors(checkpoint, fitting, moments or {}, pool)]
    values: Counter[str] = Counter()
    for tensor in tensors:
        values[tensor.type] += int(np.prod(tensor.shape))
    metadata = _metadata(checkpoint, config) | {
        "general.file_type": _FILE_TYPES[values.most_common(1)[0][0]],
        "general.quantization_version": 2,
    }
    centroids = {
        file_name(name, "gguf"): _plain(checkpoint.weights[name]) for name in _CENTROIDS if name in checkpoint.weights
    }
    if companion is not None and centroids:
        with written_whole(companion) as beside:
            write_safetensors(beside, centroids)
            write_gguf(out, metadata, tensors)
        return [out, companion]
    if companion is not None:
        companion.unlink(missing_ok=True)  # an earlier drafter's, which would be taken for this one's
    write_gguf(out, metadata, tensors)
    return [out]


def _metadata(checkpoint: Checkpoint, config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    if checkpoint.metadata is not None:
        kept = {
            key: value
            for key, value in checkpoint.metadata.items()
            if key not in _FILES_OWN and not key.startswith("split.")
        }
        if isinstance(config, DrafterConfig) and config.centroids:
            kept["gemma4-assistant.centroid_top_k"] = config.centroids.active
        return kept
    folder = checkpoint.path
    general = {
        "general.architecture": architecture(config),
        "general.type": "model",
        "general.name": folder.resolve().name,
    }
    keys = general | keys_from_config(config, _context(folder, config))
    if f"{architecture(config)}.attention.scale" in keys:
        _log.warning("%s scales attention as llama.cpp does in no Gemma 3: its results there will differ.", folder)
    if isinstance(config, ModelConfig) and len(config.eos) > 3:
        _log.warning("%s names %d end tokens, of which GGUF keeps the first three.", folder, len(config.eos))
    if isinstance(config, DrafterConfig) and not (folder / "tokenizer.json").is_file():
        _log.warning("%s has no tokenizer.json: llama.cpp will not load the drafter without one.", folder)
        return keys
    return keys | keys_from_tokenizer(folder, config)


def _context(folder: Path, config: ModelConfig | DrafterConfig) -> int:
    if isinstance(config, ModelConfig):
        return config.context
    text = Keys(read_json(folder / "config.json"), folder / "config.json").section("text_config", {})
    return text.integer("max_position_embeddings", 131_072)


def _rotation(config: ModelConfig | DrafterConfig) -> Iterator[OutTensor]:
    factors = rope_freqs(config)
    if factors is not None:
        data = factors.view(np.uint8)
        yield OutTensor("rope_freqs.weight", factors.shape, "F32", lambda: [data])


def _matrices_and_vectors(
    checkpoint: Checkpoint, fitting: Fitting | None, moments: Moments, pool: _native.ThreadPool
) -> Iterator[OutTensor]:
    for name, tensor in checkpoint.weights.items():
        if name in _CENTROIDS:
            continue
        if tensor.type not in _native.WEIGHT_TYPES:
            raise CheckpointError(
                f"{tensor.file.path} has the tensor '{tensor.name}' as {tensor.type}, which cannot be converted."
            )
        if len(tensor.shape) == 1 or name.endswith(".router"):
            kind = "F32"
        else:
            kind = fitting.type_of(tensor.shape[-1]) if fitting else tensor.type
        if kind == "Q4_0" and name in moments:
            chunks = partial(_compensated, tensor, moments[name])
        else:
            chunks = partial(_converted, tensor, kind, pool)
        yield OutTensor(file_name(name, "gguf"), tensor.shape, kind, chunks)


def _converted(tensor: TensorInfo, kind: str, pool: _native.ThreadPool) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes as another type, some rows at a time; pages of its file are let go once they are done with."""
    cols = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    row_bytes = _native.file_row_bytes(tensor.type, cols)
    slab = max(1, _SLAB // cols)
    for first in range(0, rows, slab):
        count = min(slab, rows - first)
        data = tensor.data[first * row_bytes : (first + count) * row_bytes]
        if kind == tensor.type:
            yield data
        else:
            values = _native.dequantize(tensor.type, data, count * cols).reshape(count, cols)
            try:
                yield _native.quantize_weights(kind, values, pool)
            except _native.InputError as fault:
                raise CheckpointError(
                    f"{tensor.file.path} has the tensor '{tensor.name}' that cannot become {kind}: {fault}."
                ) from None
        tensor.file.release(tensor.offset + first * row_bytes, data.nbytes)


def _compensated(tensor: TensorInfo, moments: Sequence[NDArray[np.float32]]) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes as Q4_0, rounded with error compensation."""
    factors = [compensation(part) for part in moments]
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    for first in range(0, rows, ROWS_AT_ONCE):
        values = read_rows(tensor, first, min(ROWS_AT_ONCE, rows - first))
        try:
            yield quantize_compensated(values, factors)
        except ValueError as fault:
            raise CheckpointError(
                f"{tensor.file.path} has the tensor '{tensor.name}' that cannot become Q4_0: {fault}."
            ) from None


def _plain(tensor: TensorInfo) -> TensorInfo:
    """A tensor as a type that safetensors has: a quantised one as float32."""
    if tensor.type in _native.WEIGHT_TYPES and tensor.type not in ("F32", "F16", "BF16"):
        values = _native.dequantize(tensor.type, tensor.data, int(np.prod(tensor.shape))).reshape(-1)
        return TensorInfo(tensor.name, tensor.shape, "F32", values.view(np.uint8), tensor.offset, tensor.file)
    return tensor

