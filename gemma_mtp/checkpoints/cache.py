"""Packed matrices of ordinary checkpoints, kept in the user's cache folder so that the next start maps them.

A file is named after all that its bytes depend on: the source's files with their sizes and times, the dtype, the
format's version. It is written whole and then given its name, so that any number of processes may start at once, and
removed again when it is damaged or when the folder outgrows MOST_BYTES. Whatever goes wrong, the model runs without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import platformdirs

from gemma_mtp import _native
from gemma_mtp.checkpoints.load import Checkpoint
from gemma_mtp.checkpoints.packed import VERSION, check_layouts, open_matrices, packed_matrices, write_matrices
from gemma_mtp.checkpoints.packing import Packer, uses_of
from gemma_mtp.checkpoints.quantization import Dtype
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.errors import CheckpointError

LEAST_BYTES = 64 << 20
"""Matrices of less are packed in the time that opening a file takes."""
UNASKED_BYTES = 2 << 30
"""Matrices of more are only kept when that is asked for: writing them would delay the first answer."""
MOST_BYTES = 32 << 30
"""Of all files together: when another one would not fit, those that were not used for longest are removed."""
_FORGOTTEN = 24 * 3600  # seconds after which an unfinished file is nobody's any more
_SUFFIX = ".safetensors"

_log = logging.getLogger("gemma_mtp")


def cache_folder() -> Path:
    return platformdirs.user_cache_path("gemma-mtp") / "packed"


def cached_matrices(
    checkpoint: Checkpoint, dtype: Dtype, threads: int, limit: int = MOST_BYTES, folder: Path | None = None
) -> dict[str, TensorInfo]:
    """The packed matrices of a checkpoint by canonical name, packed and kept now if they were not yet.

    Empty for a model that is too small to gain or takes more than `limit` bytes, one that is packed already, and where
    they cannot be kept, which the log says. folder: by default in the user's cache folder. Raises CheckpointError for a
    checkpoint that cannot be packed.
    """
    if checkpoint.packed or sum(tensor.nbytes for tensor in checkpoint.weights.values()) < LEAST_BYTES:
        return {}
    folder = folder or cache_folder()
    path = folder / f"{checkpoint.path.resolve().stem[:40]}-{_key(checkpoint, dtype)}{_SUFFIX}"
    if os.path.isfile(path):  # unlike Path's, this raises nothing for a folder that may not be read
        try:
            found = _open(path, checkpoint)
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of its last use
            return found
        except CheckpointError as fault:
            _log.warning("%s It is made again.", fault)
    packer = Packer(_native.ThreadPool(threads), dtype, uses_of(checkpoint.config).heads)
    matrices = packed_matrices(checkpoint.weights, checkpoint.config, packer)
    size = sum(matrix.size for matrix in matrices.values())
    if size > limit:
        return {}
    try:
        make_room(folder, size, path)
        write_matrices(path, matrices)
        _log.info("%s keeps the weights of %s packed: the next start is quicker.", path, checkpoint.path)
        return _open(path, checkpoint)
    except (CheckpointError, OSError) as fault:
        _log.warning("The packed weights are not kept, and the model runs without: %s", fault)
        return {}


def _open(path: Path, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    found = open_matrices(path)
    check_layouts(path, checkpoint.config, found)
    for name, tensor in found.items():
        if name not in checkpoint.weights or checkpoint.weights[name].shape != tensor.shape:
            raise CheckpointError(f"{path} does not hold the weights it is named after.")
    return found


def _key(checkpoint: Checkpoint, dtype: Dtype) -> str:
    files = {tensor.file.path.resolve(): tensor.file for tensor in checkpoint.weights.values()}
    made_of = [(str(path), len(files[path].bytes), files[path].modified) for path in sorted(files)]
    return hashlib.sha256(json.dumps([VERSION, dtype, made_of]).encode()).hexdigest()[:16]


def make_room(folder: Path, size: int, path: Path) -> None:
    """Removes files of the folder that must go before one of `size` bytes comes to `path`, those unused for longest
    first. Raises CheckpointError where there is no room, or where it would take more than half of what is free."""
    folder.mkdir(parents=True, exist_ok=True)
    if size > MOST_BYTES or size > shutil.disk_usage(folder).free // 2:
        raise CheckpointError(f"{folder} has no room for the {size / 1e6:,.0f} MB of {path.name}.")
    kept = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            stat = file.stat()
            if file.suffix == ".partial":
                if time.time() - stat.st_mtime > _FORGOTTEN:
                    file.unlink()
            elif file.suffix == path.suffix and file != path:
                kept.append((stat.st_mtime, stat.st_size, file))
    total = size + sum(length for _, length, _ in kept)
    for _, length, file in sorted(kept):
        if total <= MOST_BYTES:
            break
        _log.info("%s is removed to make room for others.", file)
        file.unlink(missing_ok=True)
        total -= length
