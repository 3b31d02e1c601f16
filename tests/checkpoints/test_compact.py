"""A compact drafter is the drafter whose embedding is its target's times the projection, whoever opens it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_mtp import SamplingParams, _native
from gemma_mtp.checkpoints.compact import open_drafter
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.load import PROJECTION, Checkpoint, open_checkpoint
from gemma_mtp.engine.engine import Engine
from gemma_mtp.errors import CheckpointError, GemmaMtpError, PairError

from .tiny import TARGETS, drafter_for, random_weights, write_folder

TARGET = TARGETS["E2B"]
HIDDEN = 64
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def target(tmp_path: Path) -> Checkpoint:
    write_folder(tmp_path / "target", TARGET)
    return open_checkpoint(tmp_path / "target")


@pytest.fixture
def compact(tmp_path: Path) -> Path:
    """The folder of a drafter with a projection in place of its embedding."""
    folder, described = tmp_path / "small", drafter_for(TARGET, centroids=True, hidden=HIDDEN)
    write_folder(folder, described, random_weights(config_from_hf(described), seed=1))
    rng = np.random.default_rng(2)
    edit(folder, **{EMBED: None, PROJECTION: rng.standard_normal((HIDDEN, TARGET["hidden_size"])).astype(np.float32)})
    return folder


def edit(folder: Path, **tensors: np.ndarray | None) -> None:
    path = folder / "model.safetensors"
    kept = load_file(path) | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, path)


def embedding(checkpoint: Checkpoint) -> np.ndarray:
    tensor = checkpoint.weights["embed"]
    return _native.dequantize(tensor.type, tensor.data, int(np.prod(tensor.shape))).reshape(tensor.shape)


def test_the_embedding_is_the_targets_times_the_projection(target: Checkpoint, compact: Path, tmp_path: Path) -> None:
    found = embedding(open_drafter(compact, target, tmp_path / "cache"))
    expected = embedding(target) @ load_file(compact / "model.safetensors")[PROJECTION].T
    # Half a step of Q8_0, and the rounding of its scale.
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 200


def test_without_a_projection_the_embedding_is_the_targets_own(target: Checkpoint, tmp_path: Path) -> None:
    described = drafter_for(TARGET, centroids=True, hidden=TARGET["hidden_size"])
    write_folder(tmp_path / "wide", described, random_weights(config_from_hf(described), seed=1))
    edit(tmp_path / "wide", **{EMBED: None})
    opened = open_drafter(tmp_path / "wide", target, tmp_path / "cache")
    assert opened.weights["embed"] is target.weights["embed"]
    assert not (tmp_path / "cache").exists()
    described = drafter_for(TARGET, centroids=True, hidden=2 * TARGET["hidden_size"])
    write_folder(tmp_path / "wider", described, random_weights(config_from_hf(described), seed=1))
    edit(tmp_path / "wider", **{EMBED: None})
    with pytest.raises(CheckpointError, match="not as wide as its target"):
        open_drafter(tmp_path / "wider", target, tmp_path / "cache")


def test_it_is_made_once_for_each_target_and_projection(target: Checkpoint, compact: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    open_drafter(compact, target, cache)
    (made,) = cache.iterdir()
    before = made.stat().st_mtime_ns
    open_drafter(compact, target, cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]
    write_folder(tmp_path / "target", TARGET, random_weights(target.config, seed=9))
    open_drafter(compact, open_checkpoint(tmp_path / "target"), cache)
    assert len(list(cache.iterdir())) == 2


def test_what_was_not_used_for_longest_makes_room(
    target: Checkpoint, compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    old = tmp_path / "cache" / "old.gguf"
    old.write_bytes(bytes(1000))
    monkeypatch.setattr("gemma_mtp.checkpoints.cache.MOST_BYTES", 18_000)  # the embedding takes 17,408
    open_drafter(compact, target, tmp_path / "cache")
    assert len(list(old.parent.iterdir())) == 1
    assert not old.exists()
    monkeypatch.setattr("gemma_mtp.checkpoints.cache.MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match="has no room"):
        open_drafter(compact, target, tmp_path / "elsewhere")


def test_it_drafts_as_the_same_drafter_written_out(target: Checkpoint, compact: Path, tmp_path: Path) -> None:
    written = tmp_path / "written.gguf"
    opened = open_drafter(compact, target, tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "user")
        convert(compact, written, target=target.path)
    drafts, params = [], SamplingParams()
    for drafter in (opened, open_checkpoint(written)):
        engine = Engine(target.config, target.weights, threads=1, context=64)
        engine.attach(drafter.config, drafter.weights)
        sequence = engine.create()
        engine.step(sequence, [2, 5, 9, 11], 1, params)
        drafts.append(engine.draft(sequence, 0, 7, 6, params).tokens)
    assert drafts[0] == drafts[1]
    assert len(set(drafts[0])) > 1


def test_alone_it_says_that_it_needs_its_target(compact: Path) -> None:
    with pytest.raises(CheckpointError, match="opens only together with its target"):
        open_checkpoint(compact)


def test_another_target_is_refused(compact: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "other", TARGETS["12B unified"])
    with pytest.raises(PairError):
        open_drafter(compact, open_checkpoint(tmp_path / "other"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("projection", "said"),
    [
        (np.zeros((HIDDEN, 3), np.float32), "projection of shape"),
        (np.zeros((HIDDEN, TARGET["hidden_size"]), np.int32), "projection of shape"),
        (np.full((HIDDEN, TARGET["hidden_size"]), np.nan, np.float32), "not finite|finite"),
    ],
    ids=["another width", "whole numbers", "not numbers"],
)
def test_a_wrong_projection_is_refused(
    target: Checkpoint, compact: Path, tmp_path: Path, projection: np.ndarray, said: str
) -> None:
    edit(compact, **{PROJECTION: projection})
    with pytest.raises(GemmaMtpError, match=said):
        open_drafter(compact, target, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").glob("*") if path.suffix == ".gguf"]


def test_a_damaged_embedding_is_named(target: Checkpoint, compact: Path, tmp_path: Path) -> None:
    open_drafter(compact, target, tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    made.write_bytes(made.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=made.name):
        open_drafter(compact, target, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_said(target: Checkpoint, compact: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(CheckpointError, match="cannot be put into"):
        open_drafter(compact, target, tmp_path / "cache")
