"""Where a model named on a command line lies: the demo, a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import part_names
from gemma_mtp.checkpoints.keys import shown
from gemma_mtp.errors import CheckpointError

_REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[^:]+))?", re.ASCII)
_FOLDER_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(model: str | Path) -> Path:
    """The file or folder of a model: "demo", a path, or "owner/name[:file]" in the local Hugging Face cache.

    Touches no network; `pull` does. Raises CheckpointError when there is nothing of that name.
    """
    if model == "demo":
        return demo_path()
    if path := _existing(model):
        return path
    repo, file = _parse(str(model))
    folder = _snapshot(repo)
    files = {str(found.relative_to(folder)) for found in folder.rglob("*") if found.is_file()} if folder else set()
    if folder is None or not files or (file and file not in files):
        raise CheckpointError(
            f"There is no file {shown(str(model))}, nor is it a model in the local cache: fetch it with "
            f"`gemma-mtp pull {model}`."
        )
    chosen = file or _choose(str(model), files)
    return folder / chosen if chosen else folder


def pull(model: str) -> Path:
    """Fetches "owner/name[:file]" into the local Hugging Face cache, where `resolve` finds it; returns its path.

    A connection that breaks is taken up again where it broke, and files that are there already are not fetched again.
    Raises CheckpointError with what to do about it when there is no such model, no permission or no network.
    """
    if model == "demo":
        return demo_path()
    repo, file = _parse(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        offered = {info.filename for info in snapshot_download(repo, dry_run=True)}
        if file and file not in offered:
            raise CheckpointError(f"'{repo}' has no file {shown(file)}.")
        chosen = file or _choose(model, offered)
        patterns = [_literal(part) for part in part_names(chosen)] if chosen else _FOLDER_FILES
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
    except (HTTPError, OSError) as error:
        raise CheckpointError(_explain(repo, error)) from None
    return folder / chosen if chosen else folder


def _explain(repo: str, error: Exception) -> str:
    """What kept a model from being fetched, and what to do about it."""
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, DryRunError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return (
            f"'{repo}' is gated: accept its terms on https://huggingface.co/{repo}, then log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no model '{repo}' on the Hugging Face hub, or it is private and needs `hf auth login`."
    if isinstance(error, HfHubHTTPError):
        return f"'{repo}' cannot be fetched: the Hugging Face hub answered with status {error.response.status_code}."
    if isinstance(error, HTTPError | ConnectionError | DryRunError | LocalEntryNotFoundError):
        return f"'{repo}' cannot be fetched: the Hugging Face hub is out of reach, or HF_HUB_OFFLINE is set."
    assert isinstance(error, OSError)
    return f"'{repo}' cannot be fetched: {error.strerror or error}."


def _existing(model: str | Path) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if str(model) and path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a path, or of an unknown user ("~name")
        return None


def _parse(model: str) -> tuple[str, str | None]:
    named = _REPOSITORY.fullmatch(model)
    if named is None:
        raise CheckpointError(
            f"There is no file or folder {shown(model, 300)}, nor is that a model's name ('owner/name')."
        )
    return named["repo"], named["file"]


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository's main branch in the local cache, complete or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    home = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    branch = home / "refs" / "main"
    return home / "snapshots" / branch.read_text().strip() if branch.is_file() else None


def _choose(model: str, files: Iterable[str]) -> str | None:
    """The only GGUF file of a repository (the first part of a split one), or None for one of safetensors."""
    files = sorted(files)
    if "config.json" in files and any(file.endswith(".safetensors") for file in files):
        return None
    candidates = [file for file in files if file.endswith(".gguf") and part_names(file)[0] == file]
    if not candidates:
        raise CheckpointError(f"'{model}' has neither GGUF files nor safetensors with a config.json.")
    if len(candidates) > 1:
        listed = ", ".join(shown(file) for file in candidates)
        raise CheckpointError(f"'{model}' has several models: choose one as '{model}:FILE' from {listed}.")
    return candidates[0]


def _literal(name: str) -> str:
    """A file's name as a pattern that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
