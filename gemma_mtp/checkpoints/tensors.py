"""What every checkpoint format gives: a file mapped into memory, and tensors that are views of it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.errors import CheckpointError

Layout = Literal["rows", "packed", "split", "by centroid"]
"""How a matrix lies in its file: row after row; in the groups of native/include/gmtp/matrix.h; in those of its high and
of its low part and a table of errors (head.h); in groups whose rows are in the order of `packing.centroid_rows`."""


class MappedFile:
    """A file as read-only memory: `bytes` is uint8 [size], read from disk page by page as it is touched.

    `modified`: when it had changed last as it was opened, in nanoseconds.

    The mapping lives as long as a view of it. A file that another program cuts short meanwhile ends this process with a
    bus error when a lost page is read: replace checkpoints by renaming, as `pull` and `convert` do, never in place.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_size == 0:
                    raise CheckpointError(f"{path} is empty.")
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist.") from None
        except IsADirectoryError:
            raise CheckpointError(f"{path} is a folder where a file is expected.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        self.path = path
        self.modified = stat.st_mtime_ns
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)

    def release(self, start: int, length: int) -> None:
        """Lets the system drop the pages of [start, start + length) from memory; they are read again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, first, start + length - first)


def token_ordering(tensor: TensorInfo) -> NDArray[np.int64]:
    """int64 [vocab]: the tokens of a centroid head, centroid by centroid. Raises CheckpointError."""
    kinds = {"I64": "<i8", "I32": "<i4"}
    if tensor.type in kinds:
        tokens = tensor.data.view(kinds[tensor.type]).astype(np.int64)
        if np.array_equal(np.sort(tokens), np.arange(len(tokens))):
            return tokens
    raise CheckpointError(f"{tensor.file.path} has a tensor '{tensor.name}' that does not list every token once.")


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """A tensor of a checkpoint, still in its file.

    `shape` has the outputs first, as numpy and PyTorch have it: [rows, columns] of a weight matrix, a row being stored
    whole. `type` is the name GGUF gives the element type ("F32", "BF16", "Q4_K"). `data` is uint8 [nbytes], read-only.
    A matrix of a `layout` other than "rows" is packed: only checkpoints/packing.py reads its data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: NDArray[np.uint8] = field(repr=False)
    offset: int
    file: MappedFile = field(repr=False)
    layout: Layout = "rows"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def check_finite(self, values: NDArray[np.float32]) -> None:
        """Raises CheckpointError unless all its values are finite: what passes make of others need not show it."""
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.file.path} has a tensor '{self.name}' with values that are not finite.")

    def release(self) -> None:
        """Lets the system drop this tensor's pages from memory, so that loading does not keep file and copy at once."""
        self.file.release(self.offset, self.nbytes)
