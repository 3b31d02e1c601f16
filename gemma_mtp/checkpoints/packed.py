"""Packed checkpoints: matrices as the kernels read them, in a safetensors file that is run where it is mapped.

docs/packed.md describes the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.checkpoints.gguf import parse_gguf
from gemma_mtp.checkpoints.keys import parse_json, shown
from gemma_mtp.checkpoints.names import file_name
from gemma_mtp.checkpoints.packing import Packer, centroid_rows, packed_size, uses_of
from gemma_mtp.checkpoints.safetensors import are_sizes, encode_safetensors, read_safetensors
from gemma_mtp.checkpoints.tensors import Layout, TensorInfo
from gemma_mtp.config import AnyConfig
from gemma_mtp.errors import CheckpointError

FORMAT = "gemma-mtp packed"
VERSION = "2"
ALIGNMENT = 64  # bytes, of every packed matrix in its file
_HEADER = "gguf"  # the tensor that holds a GGUF file of all but weights
_CENTROIDS = "masked_embd_centroids.weight"


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix to write: how it lies in the file, and `pack()`, its bytes uint8 [size]."""

    layout: Layout
    type: str
    shape: tuple[int, ...]
    size: int
    pack: Callable[[], NDArray[np.uint8]]


def packed_matrices(weights: Mapping[str, TensorInfo], config: AnyConfig, packer: Packer) -> dict[str, PackedMatrix]:
    """All matrices of a checkpoint that are packed to be run, by canonical name. Raises CheckpointError."""
    uses, matrices = uses_of(config), {}
    for name, tensor in weights.items():
        if len(tensor.shape) < 2 or name in uses.looked_up:
            continue
        if tensor.type not in _native.WEIGHT_TYPES:
            raise CheckpointError(
                f"{tensor.file.path} has the tensor '{tensor.name}' as {tensor.type}, which cannot be packed."
            )
        layout: Layout
        rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        if name in uses.by_centroid:
            tokens = centroid_rows(weights["token_ordering"], weights["centroids"].shape[0])
            layout, kind, rows = "by centroid", packer.type_of(tensor), tokens.size
            pack = partial(packer.by_centroid, tensor, tokens)
        else:
            layout, kind = packer.form(name, tensor)
            pack = partial(packer.matrix, name, tensor)
        try:
            size = packed_size(layout, kind, rows, cols)
        except _native.InputError as fault:
            raise CheckpointError(f"{tensor.file.path} has the tensor '{tensor.name}', but {fault}.") from None
        matrices[name] = PackedMatrix(layout, kind, tensor.shape, size, partial(_bytes, pack))
    return matrices


def write_matrices(
    path: Path,
    matrices: Mapping[str, PackedMatrix],
    others: Mapping[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]] | None = None,
) -> None:
    """A file of packed matrices, and after them of other tensors (type, shape, bytes); there whole or not at all.

    Raises CheckpointError.
    """
    listed = {name: [matrix.layout, matrix.type, list(matrix.shape)] for name, matrix in matrices.items()}
    metadata = {"format": FORMAT, "version": VERSION, "matrices": json.dumps(listed)}
    stored = {name: ("U8", (matrix.size,)) for name, matrix in matrices.items()}
    others = others or {}
    kept = {name: (kind, shape) for name, (kind, shape, _) in others.items()}
    with written_whole(path) as out:
        out.write(encode_safetensors(stored | kept, metadata, ALIGNMENT))
        for name, matrix in matrices.items():
            data = matrix.pack()
            assert data.nbytes == matrix.size, name
            assert matrix.layout == "rows" or out.tell() % ALIGNMENT == 0, name
            out.write(data.data)
        for _, _, data in others.values():
            out.write(data.data)


def write_packed(
    path: Path, weights: Mapping[str, TensorInfo], config: AnyConfig, header: bytes, pool: _native.ThreadPool
) -> None:
    """Writes a checkpoint that loads alone. header: a GGUF file with its metadata. Raises CheckpointError."""
    matrices = packed_matrices(weights, config, Packer(pool, "as-is", uses_of(config).heads))
    others = {}
    for name, tensor in sorted(weights.items(), key=lambda item: item[0] != "token_ordering"):  # its numbers are wider
        if name in matrices or name in uses_of(config).looked_up:
            continue
        if name == "token_ordering":
            others[name] = (tensor.type, tensor.shape, tensor.data)
        else:
            values = _native.dequantize(tensor.type, tensor.data, math.prod(tensor.shape)).reshape(-1)
            others[name] = ("F32", tensor.shape, values.view(np.uint8))
    others = {file_name(name, "gguf"): value for name, value in others.items()}
    tables = {
        name: PackedMatrix("rows", tensor.type, tensor.shape, tensor.nbytes, partial(_data, tensor))
        for name, tensor in weights.items()
        if name in uses_of(config).looked_up
    }
    named = {file_name(name, "gguf"): matrix for name, matrix in (matrices | tables).items()}
    others[_HEADER] = ("U8", (len(header),), np.frombuffer(header, np.uint8))
    write_matrices(path, named, others)


def is_packed(path: Path) -> bool:
    """Whether a file is of safetensors, as packed checkpoints are, and not GGUF."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[:4] != b"GGUF" and start[8:] == b"{"


def open_matrices(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that `write_matrices` made, by the names they have there. Raises CheckpointError."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no packed checkpoint: of a Hugging Face model give the folder, of any other its GGUF file."
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is packed in version {shown(metadata.get('version'))} of the format, and this program reads "
            f"version {VERSION}: convert the checkpoint it was made of again."
        )
    listed = parse_json(str(metadata.get("matrices", "")).encode(), path)
    centroids = listed.get(_CENTROIDS, listed.get("centroids"))
    return tensors | {name: _matrix(path, tensors.get(name), name, entry, centroids) for name, entry in listed.items()}


def check_layouts(path: Path, config: AnyConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError for a matrix that lies otherwise than the model reads it. tensors: by canonical name."""
    uses = uses_of(config)
    for name, tensor in tensors.items():
        expected: set[Layout] = {"packed"}
        if len(tensor.shape) < 2 or name in uses.looked_up:
            expected = {"rows"}
        elif name in uses.by_centroid:
            expected = {"by centroid"}
        elif name in uses.heads:
            expected = {"packed", "split"}
        if tensor.layout not in expected:
            raise CheckpointError(f"{path} has the matrix {shown(tensor.name)} in a layout that no model reads it in.")


def open_packed(path: Path) -> tuple[Mapping[str, Any], dict[str, TensorInfo]]:
    """The metadata and the tensors of a packed checkpoint, as those of a GGUF file. Raises CheckpointError."""
    tensors = open_matrices(path)
    header = tensors.pop(_HEADER, None)
    if header is None or header.type != "U8" or not header.nbytes:
        raise CheckpointError(f"{path} holds packed matrices, but not the model's metadata.")
    metadata, others = parse_gguf(header.file, header.offset, header.nbytes)
    if twice := tensors.keys() & others.keys():
        raise CheckpointError(f"{path} has the tensor {shown(min(twice))} twice.")
    return metadata, tensors | others


def _matrix(path: Path, tensor: TensorInfo | None, name: str, entry: Any, centroids: Any) -> TensorInfo:
    """A tensor of the file as the matrix that its entry of the list says it is."""
    fault = CheckpointError(f"{path} describes its packed matrix {shown(name)} in a way that makes no sense.")
    if tensor is None or tensor.type != "U8" or not isinstance(entry, list) or len(entry) != 3:
        raise fault
    layout, kind, shape = entry
    if layout not in get_args(Layout) or kind not in _native.WEIGHT_TYPES or not are_sizes(shape) or len(shape) < 2:
        raise fault
    if layout == "split" and kind != "Q8_0":
        raise fault
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if layout == "by centroid":
        if not isinstance(centroids, list) or len(centroids) != 3 or not are_sizes(centroids[2]) or not centroids[2]:
            raise fault
        count = max(centroids[2][0], 1)
        rows = count * (-(-(rows // count) // 16) * 16)
    try:
        size = packed_size(layout, kind, rows, cols) if max(rows, cols) < 2**31 else -1
    except _native.InputError:
        raise fault from None
    if size != tensor.nbytes:
        raise CheckpointError(f"{path} has {tensor.nbytes} bytes of the packed matrix {shown(name)} instead of {size}.")
    if layout != "rows" and tensor.offset % ALIGNMENT:
        raise CheckpointError(f"{path} has the packed matrix {shown(name)} at an offset that is no multiple of 64.")
    return TensorInfo(name, tuple(shape), kind, tensor.data, tensor.offset, tensor.file, layout)


def _bytes(pack: Callable[[], _native.Weight]) -> NDArray[np.uint8]:
    return pack().data


def _data(tensor: TensorInfo) -> NDArray[np.uint8]:
    return tensor.data
