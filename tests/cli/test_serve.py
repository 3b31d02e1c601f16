"""`gemma-mtp serve`: what it refuses before it serves."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mtp.cli.serve import check_address, read_keys, served_name
from gemma_mtp.errors import SettingsError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", " "], "--api-key is empty"),
        (["--api-key-file", "/no/such/file"], "/no/such/file cannot be read"),
        (["--api-key-file", os.devnull], "has no API key"),
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
    [
        ("demo", "demo"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-it"),
        ("b.gguf", "b"),
        ("./folder", "folder"),
        ("in/folder/", "folder"),
        (".", "here"),
    ],
)
def test_clients_know_a_model_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, name: str
) -> None:
    for folder in ("demo", "folder", "in/folder"):
        (tmp_path / "here" / folder).mkdir(parents=True)
    (tmp_path / "here" / "b.gguf").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert served_name(model) == name


def test_an_address_where_nothing_can_listen_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match=r"^Nothing can listen at 127\.0\.0\.1, port \d+: Address already in"):
            check_address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(SettingsError, match="Nothing can listen at no such host"):
        check_address("no such host", 8000)
    check_address("localhost", 0)


def test_a_file_of_keys_has_one_a_line_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# alice\nsk-a\n\n  sk-b  \n#sk-old\n")
    assert read_keys(path) == ["sk-a", "sk-b"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(path)
