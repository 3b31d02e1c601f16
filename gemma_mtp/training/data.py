"""Texts to train on: files, source trees, JSON lines, or Python's own library, and windows of their tokens."""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.errors import SettingsError

SUFFIXES = {
    ".txt", ".md", ".rst", ".jsonl", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".js", ".ts",
    ".java", ".kt", ".swift", ".rb", ".sh", ".sql", ".html", ".css", ".toml", ".yaml", ".yml",
}  # fmt: skip
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "node_modules", "build"}
_LARGEST = 2_000_000  # bytes of a file found in a folder; larger ones are tables rather than text


@dataclass(frozen=True)
class Text:
    """One document. `name` says where it is from, and decides whether it is held out."""

    name: str
    content: str


def python_library() -> list[Text]:
    """The sources of Python's standard library with their documentation, without its tests: 11 MB."""
    return read_texts([Path(sysconfig.get_paths()["stdlib"])], suffixes={".py"})


def read_texts(paths: Sequence[Path], suffixes: set[str] = SUFFIXES) -> list[Text]:
    """The texts of files, and of all files below folders that have one of the suffixes; in order of their names.

    Below folders, files of more than 2 MB are left out unless they are .jsonl. A line of a .jsonl file is a string, or
    an object with "text" or with "messages" of {"role", "content"}. Raises SettingsError for a path that is not there,
    a line that is none of these, or where no text is found at all.
    """
    check_paths(paths)
    texts: list[Text] = []
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(path)
                if file.suffix in suffixes and not _is_left_out(inside) and file.is_file() and not _is_table(file):
                    texts += _read_file(file, inside.as_posix())
        else:
            texts += _read_file(path, path.name)
    if not any(text.content.strip() for text in texts):
        raise SettingsError(f"No text is found in {', '.join(map(str, paths))}: give text, Markdown, sources or JSONL.")
    return texts


def check_paths(paths: Iterable[Path]) -> None:
    """Raises SettingsError for a path that is neither a file nor a folder."""
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise SettingsError(f"There is no data at {path}: give files or folders.")


def split(texts: Iterable[Text], share: float = 0.05) -> tuple[list[Text], list[Text]]:
    """Texts to train on and texts held out; which of the two a text is depends on its name alone."""
    parts: tuple[list[Text], list[Text]] = ([], [])
    for text in texts:
        parts[zlib.crc32(text.name.encode()) % 10_000 < share * 10_000].append(text)
    return parts


def token_stream(texts: Iterable[Text], encode: Callable[[str], list[int]], end: int) -> NDArray[np.int32]:
    """int32 [tokens]: all texts one after another, `end` after each."""
    ids = [np.array([*encode(text.content), end], np.int32) for text in texts if text.content.strip()]
    if not ids:
        raise SettingsError("There is no text to train on.")
    return np.concatenate(ids)


class Windows:
    """Batches of windows of a stream of tokens, each starting with `first` as a prompt does.

    end: the token that ends each of the stream's texts, if one does.
    """

    def __init__(self, tokens: NDArray[np.int32], length: int, first: int, seed: int = 0, end: int | None = None):
        if len(tokens) < length:
            raise SettingsError(f"The text has {len(tokens)} tokens, less than a window of {length}: give more.")
        self._tokens, self._length, self._first = tokens, length, first
        ends = np.flatnonzero(tokens == end) if end is not None else np.empty(0, np.int64)
        self._before_texts = ends[ends <= len(tokens) - length]
        self._rng = np.random.default_rng(seed)

    def batch(self, count: int) -> NDArray[np.int64]:
        """int64 [count, length], from random places."""
        return self._at(self._rng.integers(0, len(self._tokens) - self._length + 1, count))

    def openings(self, count: int) -> NDArray[np.int64]:
        """int64 [count, length], from where texts begin, each as likely; if there is but one, from random places."""
        if not len(self._before_texts):
            return self.batch(count)
        return self._at(self._rng.choice(self._before_texts, count))

    def _at(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        windows = np.stack([self._tokens[start : start + self._length] for start in starts]).astype(np.int64)
        windows[:, 0] = self._first
        return windows


def _is_left_out(inside: Path) -> bool:
    return any(part in _LEFT_OUT or part.startswith((".", "config-")) for part in inside.parts)


def _is_table(file: Path) -> bool:
    return file.stat().st_size > _LARGEST and file.suffix != ".jsonl"


def _read_file(file: Path, name: str) -> Iterator[Text]:
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError:
        return  # a few sources are in older encodings
    if file.suffix != ".jsonl":
        yield Text(name, content)
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield Text(f"{name}:{number}", _of_line(line, f"{file}, line {number}"))


def _of_line(line: str, where: str) -> str:
    fault = f"{where} is neither a string, an object with 'text', nor one with 'messages' of role and content."
    try:
        value = json.loads(line)
    except ValueError:
        raise SettingsError(fault) from None
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        turns = value["messages"]
        if all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
            return "\n\n".join(f"{turn.get('role', 'user')}: {turn['content']}" for turn in turns)
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise SettingsError(fault)
    return value
