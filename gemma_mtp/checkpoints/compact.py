"""Compact drafters: folders without the drafter's embedding, which is made of its target's output embedding.

Such a folder is an assistant's as transformers has it, without `model.embed_tokens.weight` [vocab, hidden]: that is the
target's output embedding, or that times `model.embed_projection.weight` [hidden, backbone_hidden] if there is one. Of a
vocabulary of 262,144 tokens that leaves a tenth of the file or less. A product is made once, in Q8_0, and kept in the
user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.cache import make_room
from gemma_mtp.checkpoints.checksum import progress_bar
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.checkpoints.gguf_writer import OutTensor, write_gguf
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.keys import read_json
from gemma_mtp.checkpoints.load import PROJECTION, Checkpoint, is_compact, open_checkpoint
from gemma_mtp.checkpoints.names import file_name, name_weights
from gemma_mtp.checkpoints.packing import read_rows
from gemma_mtp.checkpoints.quantization import Fitting
from gemma_mtp.checkpoints.safetensors import open_folder
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.errors import CheckpointError

_SLAB = 8192  # rows made at a time
_NAME = "embedding"


def open_drafter(path: Path, target: Checkpoint, cache: Path | None = None) -> Checkpoint:
    """Opens a drafter of `target`, compact or not.

    cache: where embeddings of compact ones are kept, by default in the user's cache folder. Raises CheckpointError,
    PairError.
    """
    if not is_compact(path):
        return open_checkpoint(path)
    config = config_from_hf(read_json(path / "config.json"), path / "config.json")
    assert isinstance(target.config, ModelConfig)
    if not isinstance(config, DrafterConfig):
        raise CheckpointError(f"{path} has no embedding, as a compact drafter, but is the folder of something else.")
    config.check_target(target.config)
    tensors = open_folder(path)
    source = target.weights["embed" if target.config.tied_embedding else "lm_head"]
    projection = tensors.pop(PROJECTION, None)
    if projection is None and config.hidden != config.backbone_hidden:
        raise CheckpointError(f"{path} has no projection and is not as wide as its target, whose embedding it needs.")
    if projection and (
        projection.shape != (config.hidden, config.backbone_hidden) or projection.type not in ("F32", "F16", "BF16")
    ):
        raise CheckpointError(
            f"{path} has a projection of shape {list(projection.shape)} and type {projection.type} where floats of "
            f"[{config.hidden}, {config.backbone_hidden}] belong."
        )
    if projection or target.packed:
        source = _embedding(path.resolve().name, projection, source, cache)
    tensors[file_name("embed", "hf")] = source
    named = name_weights(config, tensors, "hf", path)
    return Checkpoint(path, config, named.weights, named.ignored, None)


def _embedding(name: str, projection: TensorInfo | None, source: TensorInfo, cache: Path | None) -> TensorInfo:
    """`source`, times `projection` if there is one, as rows in Q8_0: from the cache, or put there."""
    cache = cache or platformdirs.user_cache_path("gemma-mtp") / "drafters"
    stat = source.file.path.stat()
    shape = (source.shape[0], projection.shape[0] if projection else source.shape[1])
    kind = Fitting("q8_0").type_of(shape[1])
    made_of = [str(source.file.path.resolve()), stat.st_size, stat.st_mtime_ns, source.name, shape, kind]
    factor = projection.data.tobytes() if projection else b""
    path = cache / f"{name}-{hashlib.sha256(json.dumps(made_of).encode() + factor).hexdigest()[:16]}.gguf"
    if not path.is_file():
        embedding = OutTensor(_NAME, shape, kind, lambda: _rows(projection, source, kind))
        try:
            make_room(cache, embedding.nbytes, path)
        except OSError as error:
            raise CheckpointError(f"A drafter's embedding cannot be put into {cache}: {error.strerror}.") from None
        write_gguf(path, {}, [embedding])
    found = GGUF.open(path).tensors.get(_NAME)
    if found is None or found.shape != shape or found.type != kind:
        raise CheckpointError(f"{path} is damaged: remove it, and it is made again.")
    return found


def _rows(projection: TensorInfo | None, source: TensorInfo, kind: str) -> Iterator[NDArray[np.uint8]]:
    across = None
    if projection:
        factor = _native.dequantize(projection.type, projection.data, int(np.prod(projection.shape)))
        across = factor.reshape(projection.shape).T
    rows = source.shape[0]
    pool = _native.ThreadPool(os.cpu_count() or 1)
    with progress_bar("Preparing the drafter (once)", rows) as advance:
        for first in range(0, rows, _SLAB):
            count = min(_SLAB, rows - first)
            values = read_rows(source, first, count)
            if across is not None:
                values = values @ across
            try:
                yield _native.quantize_weights(kind, np.ascontiguousarray(values, np.float32), pool)
            except _native.InputError as fault:
                raise CheckpointError(f"{(projection or source).file.path} makes no embedding: {fault}.") from None
            advance(count)
