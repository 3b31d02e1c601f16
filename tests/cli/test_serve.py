"""`gemma-mtp serve`: what it refuses before it serves."""

import subprocess
import sys

import pytest

from gemma_mtp.cli.serve import served_name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", " "], "--api-key is empty"),
        (["--parallel", "65"], "between 1 and 64"),
        (["--parallel", "0"], "between 1 and 64"),
        (["--max-queue", "-1"], "--max-queue"),
        (["/no/such/model.gguf"], "/no/such/model.gguf"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_sentence(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "gemma_mtp", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "demo"), ("google/gemma-3-1b-it", "google/gemma-3-1b-it"), ("/a/b.gguf", "b"), ("./folder", "folder")],
)
def test_clients_know_a_model_by_its_name(model: str, name: str) -> None:
    assert served_name(model) == name
