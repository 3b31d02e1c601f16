"""Work of some seconds on large files, with a progress bar, and their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_BLOCK = 1 << 20


def sha256_of(path: Path, purpose: str) -> str:
    """The SHA-256 of a file in hexadecimal. `purpose` is what the progress bar says."""
    digest = hashlib.sha256()
    for block in blocks([path], purpose):
        digest.update(block)
    return digest.hexdigest()


def blocks(files: Sequence[Path], purpose: str) -> Iterator[bytes]:
    """The files' bytes, with a progress bar."""
    with progress_bar(purpose, sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            with file.open("rb") as source:
                while block := source.read(_BLOCK):
                    yield block
                    advance(len(block))


@contextlib.contextmanager
def progress_bar(purpose: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal, gone in the end; what it gives takes the amounts done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(purpose, total=total)
        yield lambda amount: progress.advance(task, amount)
