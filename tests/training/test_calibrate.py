"""What matrices are multiplied with in a text, and files whose rounding it guides."""

from pathlib import Path

import numpy as np
import pytest

from gemma_mtp import CheckpointError, Model
from gemma_mtp.checkpoints.convert import convert
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.training.calibrate import WINDOW, calibrate, input_moments, windows_of
from gemma_mtp.training.data import read_texts

from ..checkpoints.tiny import TARGETS, write_folder
from ..test_convert import config_of, folder_of, values

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def matrices(weights: dict[str, TensorInfo]) -> set[str]:
    """Those that are multiplied with, experts apart."""
    return {
        name
        for name, tensor in weights.items()
        if len(tensor.shape) == 2 and name != "ple_embed"
    }


@pytest.mark.parametrize("kind", TARGETS)
def test_every_matrix_but_experts_gets_the_moments_of_its_inputs(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "hf", TARGETS[kind])
    checkpoint = open_checkpoint(tmp_path / "hf")
    moments = input_moments(checkpoint.config, checkpoint.weights, [[2, 5, 7], [2, 9]])
    assert moments.keys() == matrices(checkpoint.weights)
    for name, (found,) in moments.items():
        cols = checkpoint.weights[name].shape[-1]
        assert found.shape == (cols, cols)
        assert np.linalg.matrix_rank(found, tol=1e-4 * np.trace(found)) <= 5  # as many rows were run
        assert np.trace(found) > 0
    assert moments["0.k"] is moments["0.q"]


def test_moments_of_the_head_are_those_of_the_hidden_states(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    checkpoint, ids = open_checkpoint(tmp_path / "hf"), [2, 5, 7, 9]
    (found,) = input_moments(checkpoint.config, checkpoint.weights, [ids])["embed"]
    hidden = Model.load(tmp_path / "hf", threads=1, dtype="f32").hidden(ids).astype(np.float64)
    np.testing.assert_allclose(found, hidden.T @ hidden, rtol=1e-3, atol=1e-3)


def test_a_calibrated_file_is_q4_0_and_nearer_to_its_source(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    moments = calibrate(str(tmp_path / "hf"), read_texts([text]))
    convert(tmp_path / "hf", tmp_path / "plain.gguf", "q4_0")
    convert(tmp_path / "hf", tmp_path / "calibrated.gguf", "q4_0", moments=moments)
    plain, calibrated, source = (
        open_checkpoint(tmp_path / name) for name in ("plain.gguf", "calibrated.gguf", "hf")
    )
    assert {n: t.type for n, t in calibrated.weights.items()} == {n: t.type for n, t in plain.weights.items()}
    for name, (of_inputs,) in moments.items():
        exact = values(source, name)
        misses = [values(checkpoint, name) - exact for checkpoint in (calibrated, plain)]
        errors = [np.einsum("ri,ij,rj", miss, of_inputs, miss) for miss in misses]
        assert errors[0] < 0.8 * errors[1], name


def test_windows_are_spread_over_the_text() -> None:
    tokens = np.arange(200 * WINDOW, dtype=np.int32)
    windows = windows_of(tokens, first=2)
    assert len(windows) == 64
    assert {len(window) for window in windows} == {WINDOW}
    assert {window[0] for window in windows} == {2}
    assert windows[0][1] == 0
    assert windows[-1][-1] > 199 * (WINDOW - 1)
    assert windows_of(tokens[:3], first=2) == [[2, 0, 1, 2]]


def test_drafters_and_packed_files_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", config_of("gemma3"))
    convert(tmp_path / "hf", tmp_path / "packed.safetensors", "packed")
    with pytest.raises(CheckpointError, match="is packed: calibrate the checkpoint it was made of"):
        calibrate(str(tmp_path / "packed.safetensors"), [])
