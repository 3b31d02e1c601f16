"""The cost of passes, measured on an engine whose time is given."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_mtp.decoding.economy import GUESSED_SHAPE
from gemma_mtp.engine import cost_shape as module
from gemma_mtp.engine.cost_shape import cost_shape, measured_shape

COSTS = {1: 10, 2: 11, 3: 13, 4: 15, 5: 18, 6: 21, 7: 24, 8: 27}  # milliseconds


class Timed:
    """An engine that only takes time: `scale` times COSTS for a pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scale: float = 1.0, max_depth: int = 15):
        self.config, self.max_depth = SimpleNamespace(vocab=100), max_depth
        self.now, self.passes, self.scale, self.open = 0.0, 0, scale, 0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def create(self) -> list[int]:
        self.open += 1
        return []

    def release(self, sequence: list[int]) -> None:
        self.open -= 1

    def truncate(self, sequence: list[int], length: int) -> None:
        del sequence[length:]

    def step(self, sequence: list[int], tokens: list[int], rows: int, params: object) -> None:
        assert len(tokens) == rows
        assert all(0 <= token < 100 for token in tokens)
        sequence += tokens
        self.passes += 1
        self.now += self.scale * COSTS[rows] / 1000


def test_widths_between_and_beyond_those_measured_are_on_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch)
    assert measured_shape(engine) == pytest.approx([1, 1.1, 1.3, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0])
    assert engine.now < 0.25
    assert not engine.open


def test_a_slow_model_is_measured_at_fewer_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch, scale=4)
    assert measured_shape(engine) == pytest.approx([1, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5])
    assert engine.now < 0.25
    assert measured_shape(Timed(monkeypatch, scale=10)) is None


def test_an_engine_that_runs_few_rows_is_measured_up_to_these(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_shape(Timed(monkeypatch, max_depth=3)) == pytest.approx([1, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5])


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch)
    first = cost_shape(engine, "key", tmp_path)
    passes = engine.passes
    assert cost_shape(engine, "key", tmp_path) == pytest.approx(first, abs=1e-4)
    assert engine.passes == passes
    cost_shape(engine, "other", tmp_path)
    assert engine.passes > passes
    assert cost_shape(engine, None, tmp_path) == pytest.approx(first)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_quick_model_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch, scale=0.01)
    assert measured_shape(engine) == pytest.approx([1, 1.1, 1.3, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0])
    assert engine.now < 0.01


def test_a_very_slow_model_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch, scale=1000)
    assert cost_shape(engine, "key", tmp_path) == GUESSED_SHAPE
    assert engine.passes == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "{", "null", "[1.0, 2.0]", '["a"]', str([0.5] * 9), str([float(10**9)] * 9)])
def test_a_damaged_file_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    (tmp_path / "key.json").write_text(damage)
    assert cost_shape(Timed(monkeypatch), "key", tmp_path)[3] == pytest.approx(1.5)


def test_where_it_cannot_be_kept_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert cost_shape(Timed(monkeypatch), "key", tmp_path / "file")[3] == pytest.approx(1.5)
    assert "measured again" in caplog.text
