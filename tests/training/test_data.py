"""Texts are found, split by name, and cut into windows; what cannot be read is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from gemma_mtp.errors import SettingsError
from gemma_mtp.training.data import Text, Windows, python_library, read_texts, split, token_stream


def test_files_and_folders_are_read_without_tests(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("a.py", "b.md", "picture.png", "tests/c.py"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    assert [text.name for text in read_texts([tmp_path])] == ["a.py", "b.md"]
    assert read_texts([tmp_path / "b.md"]) == [Text("b.md", "text of b.md")]


def test_json_lines_hold_texts_and_messages(tmp_path: Path) -> None:
    lines = ["plain", {"text": "named"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [text.content for text in read_texts([tmp_path])] == ["plain", "named", "user: Hello"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"content": "x"}', '{"messages": [1]}'])
def test_a_line_of_another_kind_is_an_error_that_says_where(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(SettingsError, match="line 2 is neither"):
        read_texts([tmp_path])


def test_a_large_file_is_read_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("word " * 500_000)
    (tmp_path / "small.txt").write_text("word")
    assert [text.name for text in read_texts([tmp_path])] == ["small.txt"]
    assert len(read_texts([tmp_path / "large.txt"])[0].content) == 2_500_000


def test_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There is no data at"):
        read_texts([tmp_path / "none"])
    with pytest.raises(SettingsError, match="No text is found"):
        read_texts([tmp_path])


def test_a_text_is_held_out_by_its_name_alone() -> None:
    texts = [Text(f"{i}.py", "x") for i in range(1000)]
    train, held_out = split(texts)
    assert len(train) + len(held_out) == 1000
    assert 20 < len(held_out) < 100
    assert set(split(texts[::2])[1]) <= set(held_out)


def test_the_python_library_is_there_without_its_tests() -> None:
    names = {text.name for text in python_library()}
    assert "argparse.py" in names
    assert not any("/test" in f"/{name}" and "/test" in name.rsplit("/", 1)[0] for name in names)


def test_windows_start_as_prompts_do_and_are_the_seed_s() -> None:
    tokens = token_stream([Text("a", "abc"), Text("b", "de")], lambda text: [ord(c) for c in text], end=1)
    assert tokens.tolist() == [97, 98, 99, 1, 100, 101, 1]
    batch = Windows(tokens, 4, first=2, seed=3).batch(5)
    assert batch.shape == (5, 4)
    assert (batch[:, 0] == 2).all()
    assert np.array_equal(batch, Windows(tokens, 4, first=2, seed=3).batch(5))
    with pytest.raises(SettingsError, match="less than a window"):
        Windows(tokens, 8, first=2)
