"""The cache of packed weights: the same logits, and nothing that befalls the cache befalls the model."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp import SettingsError, loading
from gemma_mtp.checkpoints import cache, files
from gemma_mtp.checkpoints.cache import cached_matrices
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.quantization import Dtype
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.engine.engine import Engine
from gemma_mtp.loading import Settings, load

from .tiny import TARGETS, drafter_for, random_weights, write_folder, write_gguf

TOKENS = np.random.default_rng(3).integers(3, 256, 20).tolist()


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", config_from_hf(TARGETS["gemma3"]), kind="Q8_0")
    return tmp_path / "model.gguf"


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def logits(checkpoint: Checkpoint, packed: dict[str, TensorInfo] | None = None, dtype: Dtype = "as-is") -> np.ndarray:
    engine = Engine(checkpoint.config, checkpoint.weights, threads=1, context=64, dtype=dtype, packed=packed)
    return engine.logits(TOKENS)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", ["as-is", "q4_0", "f32"])
def test_the_second_start_maps_what_the_first_kept(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    write_folder(tmp_path / "hf", TARGETS[kind])
    checkpoint = open_checkpoint(tmp_path / "hf")
    expected = logits(checkpoint, dtype=dtype)
    first = cached_matrices(checkpoint, dtype, 1, folder=tmp_path / "cache")
    (file,) = kept(tmp_path / "cache")
    written = file.stat().st_ino
    second = cached_matrices(open_checkpoint(tmp_path / "hf"), dtype, 1, folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == [file]
    assert file.stat().st_ino == written, "it was written again"
    for packed in (first, second):
        assert packed["0.q"].file.path == file
        np.testing.assert_array_equal(logits(checkpoint, packed, dtype), expected)


def test_drafters_with_a_centroid_head_are_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", drafter_for(TARGETS["E2B"], centroids=True, hidden=64))
    drafter = open_checkpoint(tmp_path / "hf")
    assert cached_matrices(drafter, "as-is", 1, folder=tmp_path / "cache")["embed"].layout == "by centroid"


def test_a_changed_source_and_another_dtype_have_files_of_their_own(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cached_matrices(open_checkpoint(source), "as-is", 1, folder=folder)
    cached_matrices(open_checkpoint(source), "q4_0", 1, folder=folder)
    assert len(kept(folder)) == 2
    config = config_from_hf(TARGETS["gemma3"])
    other = tmp_path / "other.gguf"
    write_gguf(other, config, random_weights(config, seed=9), kind="Q8_0")
    os.replace(other, source)  # of the same size
    changed = open_checkpoint(source)
    packed = cached_matrices(changed, "as-is", 1, folder=folder)
    assert len(kept(folder)) == 3
    np.testing.assert_array_equal(logits(changed, packed), logits(changed))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b'"version": "2"', b'"version": "1"'),
        lambda data: data.replace(b"[128, 64]", b"[64, 128]"),
        lambda data: data.replace(b'\\"packed\\"', b'\\"rows\\"  '),
    ],
    ids=["cut", "empty", "another version", "other shapes", "another layout"],
)
def test_a_damaged_file_is_made_again(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    checkpoint, folder = open_checkpoint(source), tmp_path / "cache"
    cached_matrices(checkpoint, "as-is", 1, folder=folder)
    (file,) = kept(folder)
    whole = file.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    file.unlink()
    file.write_bytes(damaged)
    packed = cached_matrices(checkpoint, "as-is", 1, folder=folder)
    assert "It is made again." in caplog.text
    assert file.read_bytes() == whole
    np.testing.assert_array_equal(logits(checkpoint, packed), logits(checkpoint))


def test_a_full_disk_costs_nothing_but_a_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    checkpoint = open_checkpoint(source)
    assert cached_matrices(checkpoint, "as-is", 1, folder=tmp_path / "cache") == {}
    assert kept(tmp_path / "cache") == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "runs without: " in record.message
    assert "the disk is full." in record.message


def test_where_no_folder_can_be_made_the_model_runs_without(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert cached_matrices(open_checkpoint(source), "as-is", 1, folder=tmp_path / "file" / "cache") == {}
    assert "runs without" in caplog.text


def test_the_folder_stays_within_its_bounds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, folder = open_checkpoint(source), tmp_path / "cache"
    made = []
    for dtype in ("as-is", "q8_0", "q4_0"):
        cached_matrices(checkpoint, dtype, 1, folder=folder)
        (new,) = set(kept(folder)) - set(made)
        made.append(new)
    for age, path in enumerate(made):
        os.utime(path, (1000 - age, 1000 - age))
    cached_matrices(checkpoint, "q8_0", 1, folder=folder)  # which makes it the one used last
    monkeypatch.setattr(cache, "MOST_BYTES", sum(path.stat().st_size for path in made))
    cached_matrices(checkpoint, "q4_1", 1, folder=folder)
    left = kept(folder)
    assert made[1] in left
    assert made[2] not in left
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    assert cached_matrices(checkpoint, "q5_0", 1, folder=folder) == {}
    assert kept(folder) == left, "nothing goes for a file that cannot come"
    assert "has no room for the" in caplog.text


def test_unfinished_files_of_others_are_left_for_a_day(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    old, new = folder / "a.safetensors.1.partial", folder / "b.safetensors.2.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    cached_matrices(open_checkpoint(source), "as-is", 1, folder=folder)
    assert not old.exists()
    assert new.exists()


_START = """
import hashlib, sys, time
from pathlib import Path
from gemma_mtp.checkpoints import cache
from gemma_mtp.checkpoints.load import open_checkpoint

cache.LEAST_BYTES = 0
source, folder, start = map(Path, sys.argv[1:])
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
found = cache.cached_matrices(open_checkpoint(source), "as-is", 1, folder=folder)
print(hashlib.sha256(b"".join(found[name].data.tobytes() for name in sorted(found))).hexdigest())
"""


def test_processes_that_start_at_once_all_have_the_weights(source: Path, tmp_path: Path) -> None:
    arguments = [str(source), str(tmp_path / "cache"), str(tmp_path / "start")]
    command = [sys.executable, "-c", _START, *arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "start").touch()
    found = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    expected = cached_matrices(open_checkpoint(source), "as-is", 1, folder=tmp_path / "alone")
    data = b"".join(expected[name].data.tobytes() for name in sorted(expected))
    assert found == [hashlib.sha256(data).hexdigest()] * 4
    assert len(kept(tmp_path / "cache")) == 1


def test_it_is_used_when_asked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_mtp.loading.tokenizer_of", lambda _: None)
    monkeypatch.setattr("gemma_mtp.loading._template", lambda *_: None)
    folder = tmp_path / "cache"
    monkeypatch.setattr(cache, "cache_folder", lambda: folder)

    def uses(asked: bool | None, variable: str) -> bool:
        monkeypatch.setenv("GEMMA_MTP_CACHE", variable)
        load(source, "none", Settings(cache=asked))
        made = kept(folder) if folder.exists() else []
        for path in made:
            path.unlink()
        return bool(made)

    assert not uses(None, "off")
    assert not uses(False, "on")
    assert uses(None, "on")
    assert uses(None, "auto")
    assert uses(True, "off")
    monkeypatch.setitem(loading.LIMITS, "auto", 1000)
    assert not uses(None, "auto")
    assert uses(None, "on")
    monkeypatch.setenv("GEMMA_MTP_CACHE", "yes")
    with pytest.raises(SettingsError, match="GEMMA_MTP_CACHE is 'yes': it must be on, auto or off"):
        load(source, "none", Settings())


def test_small_and_packed_checkpoints_are_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LEAST_BYTES", 1 << 30)
    assert cached_matrices(open_checkpoint(source), "as-is", 1, folder=tmp_path / "cache") == {}
    assert not (tmp_path / "cache").exists()
