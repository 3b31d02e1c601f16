"""Where a model named on a command line lies: the demo, a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_mtp.checkpoints.checksum import sha256_of
from gemma_mtp.checkpoints.demo import DRAFTER, demo_path
from gemma_mtp.checkpoints.gguf import part_names
from gemma_mtp.checkpoints.keys import shown
from gemma_mtp.checkpoints.load import config_of, open_checkpoint
from gemma_mtp.config import ModelConfig
from gemma_mtp.errors import CheckpointError, PairError

_REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[^:]+))?", re.ASCII)
_FOLDER_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRAFTER_WORDS = ("assistant", "drafter", "-mtp")  # one of these is in the name of a drafter's GGUF file

_log = logging.getLogger("gemma_mtp")


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
            f"There is no file {shown(str(model), 300)}, nor is it a model in the local cache: fetch it with "
            f"`gemma-mtp pull {model}`."
        )
    chosen = file or _choose(str(model), files)
    return folder / chosen if chosen else folder


def pull(model: str) -> Path:
    """Fetches "owner/name[:file]" into the local Hugging Face cache, where `resolve` finds it; returns its path.

    A connection that breaks is taken up again where it broke, and files that are there already are not fetched again.
    The SHA-256 of every large file is checked each time; a file that fails is removed. HF_HOME, HF_TOKEN (or the token
    of `hf auth login`) and HF_HUB_OFFLINE are honoured. Raises CheckpointError with what to do about it when there is
    no such model, no permission or no network, or a file is damaged.
    """
    if model == "demo":
        return demo_path()
    repo, file = _parse(model)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import filter_repo_objects

    try:
        offered = {sibling.rfilename for sibling in HfApi().model_info(repo).siblings or ()}
        if file and file not in offered:
            raise CheckpointError(f"'{repo}' has no file {shown(file)}.")
        chosen = file or _choose(model, offered)
        patterns = [_literal(part) for part in part_names(chosen)] if chosen else _FOLDER_FILES
        with _progress_bar(f"Fetching {model}") as bar:
            folder = Path(snapshot_download(repo, allow_patterns=patterns, tqdm_class=bar))
        for name in filter_repo_objects(offered, allow_patterns=patterns):
            _check_sha256(repo, folder / name)
    except (HTTPError, OSError) as error:
        raise CheckpointError(_explain(repo, error)) from None
    return folder / chosen if chosen else folder


@contextlib.contextmanager
def _progress_bar(purpose: str) -> Iterator[Any]:
    """What snapshot_download takes as `tqdm_class`: of its several bars only the one that counts bytes is shown, on
    standard error where that is a terminal, and it is gone in the end."""
    from huggingface_hub.utils import tqdm

    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            counts_bytes = settings.get("name") == "huggingface_hub.snapshot_download"
            settings |= {"desc": purpose, "leave": False}
            super().__init__(*arguments, **settings | {"disable": not (counts_bytes and sys.stderr.isatty())})
            bars.append(self)

        def set_description(self, *_: Any, **__: Any) -> None:
            """Nothing: the library would tell of its own steps."""

        set_description_str = set_description

    try:
        yield Bar
    finally:
        for bar in bars:
            bar.close()


def _check_sha256(repo: str, path: Path) -> None:
    """Removes a large file of the cache whose SHA-256 is not what the hub said, and raises CheckpointError.

    huggingface_hub compares sizes alone. It keeps a large (LFS) file under its SHA-256, as it does a small one under
    git's hash of it, and the snapshot links there.
    """
    blob = Path(os.path.realpath(path))
    if not _SHA256.fullmatch(blob.name) or sha256_of(blob, f"Checking {path.name}") == blob.name:
        return
    blob.unlink()
    path.unlink()
    raise CheckpointError(
        f"The file {shown(path.name)} of '{repo}' was damaged on the way, as its SHA-256 shows, and has been removed: "
        "pull it again."
    )


def find_assistant(model: str, path: Path) -> Path | None:
    """The drafter of the target that was named `model` and lies at `path`, where there is one near it; else None.

    The demo's comes with the package. Others are looked for in a folder as `assistant/` and `drafter/`; beside a folder
    as NAME-assistant; beside a GGUF file as one that is named like a drafter, the longer the common start of the names
    the better; and for "owner/name" as "owner/name-assistant" in the local hub cache. Nothing but a drafter that fits
    this target is taken; of several that are equally good none is, and the log names them. Touches no network. Raises
    CheckpointError for the target.
    """
    if model == "demo":
        return DRAFTER if DRAFTER.is_dir() and (DRAFTER / "config.json").is_file() else None
    path = Path(os.path.abspath(path))
    if path.is_dir():
        places = [path / "assistant", path / "drafter", path.parent / f"{path.name}-assistant"]
        found = _fitting(path, [place for place in places if place.is_dir()])[:1]
    else:
        found = _closest(path.name, _fitting(path, _named_like_drafters(path)))
    if not found and _existing(model) is None and (named := _REPOSITORY.fullmatch(model)):
        folder = _snapshot(f"{named['repo']}-assistant")
        found = _fitting(path, [folder] if folder and folder.is_dir() else [])
    if len(found) > 1:
        listed = ", ".join(shown(drafter.name) for drafter in found)
        _log.warning("No drafter is chosen for %s, as these fit it equally well: %s.", path.name, listed)
        return None
    return found[0] if found else None


def _named_like_drafters(path: Path) -> list[Path]:
    """The GGUF files beside `path` whose names say that they are drafters; of split ones the first part."""
    own = part_names(path.name)
    return [
        file
        for file in sorted(path.parent.glob("*.gguf"))
        if any(word in file.name.lower() for word in _DRAFTER_WORDS)
        and file.name == part_names(file.name)[0]
        and file.name not in own
    ]


def _fitting(path: Path, candidates: list[Path]) -> list[Path]:
    """Those of the candidates that are drafters of the target at `path`."""
    if not candidates:
        return []
    target = open_checkpoint(path).config
    if not isinstance(target, ModelConfig):
        return []
    fitting = []
    for candidate in candidates:
        try:
            config = config_of(candidate)
            if isinstance(config, ModelConfig):
                raise PairError("It is a target, not a drafter.")
            config.check_target(target)
        except (CheckpointError, PairError) as fault:
            _log.info("%s is not taken as the drafter of %s: %s", candidate, path, fault)
        else:
            fitting.append(candidate)
    return fitting


def _closest(name: str, files: list[Path]) -> list[Path]:
    """Those of the files whose names start like `name` for longest."""
    prefix = os.path.commonprefix  # of characters, which is what is meant here
    shared = {file: len(prefix([file.name.lower(), name.lower()])) for file in files}
    return [file for file in files if shared[file] == max(shared.values())]


def _explain(repo: str, error: Exception) -> str:
    """What kept a model from being fetched, and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"'{repo}' is gated: accept its terms on https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model '{repo}' on the Hugging Face hub, "
            "or it is private and needs `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError):
        return f"'{repo}' cannot be fetched: the Hugging Face hub answered with status {error.response.status_code}."
    if isinstance(error, HTTPError | ConnectionError | LocalEntryNotFoundError):
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
