"""Which drafter `--drafter auto` finds near a target."""

import logging
from pathlib import Path

import pytest

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.hub import find_assistant
from gemma_mtp.checkpoints.load import config_of

from .tiny import DRAFTER, TARGETS, write_folder, write_gguf

TARGET = TARGETS["E4B"]
FITTING = DRAFTER | {"backbone_hidden_size": TARGET["hidden_size"]}
OTHER = DRAFTER | {"backbone_hidden_size": 2 * TARGET["hidden_size"]}


def add_gguf(folder: Path, name: str, config: dict) -> Path:
    write_gguf(folder / name, config_from_hf(config))
    return folder / name


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_folder(tmp_path / "gemma", TARGET)
    return tmp_path / "gemma"


@pytest.mark.parametrize("place", ["gemma/assistant", "gemma/drafter", "gemma-assistant"])
def test_in_a_folder_or_beside_it(target: Path, place: str) -> None:
    assert find_assistant(str(target), target) is None
    drafter = target.parent / place
    write_folder(drafter, FITTING)
    assert find_assistant(str(target), target) == drafter


def test_what_is_no_drafter_of_the_target_is_passed_over_and_named(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gemma_mtp")
    write_folder(target / "assistant", TARGET)
    write_folder(target / "drafter", OTHER)
    (target.parent / "gemma-assistant").mkdir()
    assert find_assistant(str(target), target) is None
    said = [record.getMessage() for record in caplog.records]
    assert [any(words in line for line in said) for words in ("not a drafter", "hidden size 128", "no model")]
    assert len(said) == 3


def test_a_drafter_has_no_drafter(tmp_path: Path) -> None:
    write_folder(tmp_path / "gemma", FITTING)
    write_folder(tmp_path / "gemma-assistant", FITTING)
    assert find_assistant("gemma", tmp_path / "gemma") is None


@pytest.mark.parametrize("name", ["e4b-it-assistant-Q8_0.gguf", "E4B-it-MTP.gguf", "drafter.gguf"])
def test_beside_a_file(tmp_path: Path, name: str) -> None:
    target = add_gguf(tmp_path, "e4b-it-Q4_0.gguf", TARGET)
    drafter = add_gguf(tmp_path, name, FITTING)
    assert find_assistant(str(target), target) == drafter


def test_the_name_most_alike_wins_among_files(tmp_path: Path) -> None:
    target = add_gguf(tmp_path, "e4b-it-Q4_0.gguf", TARGET)
    add_gguf(tmp_path, "e4b-assistant.gguf", FITTING)
    add_gguf(tmp_path, "e4b-it-Q4_0-assistant.gguf", OTHER)
    add_gguf(tmp_path, "e4b-it-Q4.gguf", FITTING)  # not named like a drafter
    (tmp_path / "e4b-it-Q4_0-mtp.gguf").write_bytes(b"GGUF")
    drafter = add_gguf(tmp_path, "e4b-it-assistant.gguf", FITTING)
    assert find_assistant(str(target), target) == drafter


def test_of_files_equally_alike_none_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = add_gguf(tmp_path, "e4b.gguf", TARGET)
    add_gguf(tmp_path, "e4b-assistant-F16.gguf", FITTING)
    add_gguf(tmp_path, "e4b-assistant-Q8_0.gguf", FITTING)
    assert find_assistant(str(target), target) is None
    assert [record.getMessage() for record in caplog.records] == [
        "No drafter is chosen for e4b.gguf, as these fit it equally well: "
        "'e4b-assistant-F16.gguf', 'e4b-assistant-Q8_0.gguf'."
    ]


def test_by_name_in_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_cache(name: str, config: dict) -> Path:
        home = tmp_path / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0123")
        (home / "snapshots").mkdir()
        write_folder(home / "snapshots" / "0123", config)
        return home / "snapshots" / "0123"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    target = in_cache("google/e4b-it", TARGET)
    assert find_assistant("google/e4b-it", target) is None
    drafter = in_cache("google/e4b-it-assistant", FITTING)
    assert find_assistant("google/e4b-it", target) == drafter
    assert find_assistant("google/e4b-it:model.gguf", target) == drafter
    assert find_assistant(str(target), target) is None  # a path is no name
    in_cache("google/other", TARGET)
    in_cache("google/other-assistant", OTHER)
    assert find_assistant("google/other", target) is None


def test_a_target_alone_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, TARGET)
    assert find_assistant(".", Path(".")) is None
    assert find_assistant("demo.gguf", add_gguf(tmp_path, "demo.gguf", TARGETS["gemma3"])) is None


def test_the_demos_comes_with_the_package() -> None:
    found = find_assistant("demo", Path("anywhere"))
    assert found is not None
    assert config_of(found).backbone_hidden == 640
