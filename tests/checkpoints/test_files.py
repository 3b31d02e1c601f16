"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.errors import CheckpointError


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as out:
        out.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), written_whole(path) as out:
        out.write(bytes(1 // 0))
    assert path.read_bytes() == b"new"
    assert [*tmp_path.iterdir()] == [path]


def test_two_can_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as first:
        first.write(b"first")
        with written_whole(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    sentence = r"nowhere/file cannot be written: No such file or directory\.$"
    with pytest.raises(CheckpointError, match=sentence), written_whole(tmp_path / "nowhere" / "file"):
        pass
