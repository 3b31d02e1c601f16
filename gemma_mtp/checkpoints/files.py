"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemma_mtp.errors import CheckpointError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name once the block has ended without an error and is gone otherwise.

    Replaces a file that has the name already; whoever has that one open or mapped keeps it. Raises CheckpointError.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as out:
            try:
                yield out
                out.flush()
                os.fsync(out.fileno())
                os.replace(partial, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise CheckpointError(f"{path} cannot be written: {reason}.") from None
