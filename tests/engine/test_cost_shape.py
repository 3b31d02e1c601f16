"""The cost of passes, measured on an engine whose time is given."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.decoding import Rows, SamplingParams
from gemma_mtp.decoding.economy import GUESSED_SHAPE, CostShape, Experts
from gemma_mtp.engine import cost_shape as module
from gemma_mtp.engine.cost_shape import cost_shape, measured_shape
from gemma_mtp.engine.engine import Engine

from ..checkpoints.tiny import TARGETS, write_folder

COSTS = {1: 10, 2: 11, 3: 13, 4: 15, 5: 18, 6: 21, 7: 24, 8: 27}  # milliseconds
PROMPT = 0.9  # a token


class Timed:
    """An engine that only takes time: `scale` times COSTS and PROMPT for a pass, and `expert` milliseconds for each
    expert read beyond 8, which every token of its own wakes. disturbed: two passes of three take 10 ms longer."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        scale: float = 1.0,
        max_depth: int = 15,
        expert: float | None = None,
        disturbed: bool = False,
    ):
        layer = SimpleNamespace(experts=None if expert is None else "some")
        self.config, self.max_depth, self.expert = SimpleNamespace(vocab=100, layers=[layer]), max_depth, expert
        self.context, self.lock = 1000, nullcontext()
        self.now, self.passes, self.scale, self.open, self.disturbed = 0.0, 0, scale, 0, disturbed
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def create(self) -> list[int]:
        self.open += 1
        return []

    def release(self, sequence: list[int]) -> None:
        self.open -= 1

    def truncate(self, sequence: list[int], length: int) -> None:
        del sequence[length:]

    def step(self, sequence: list[int], tokens: list[int], rows: int, params: object) -> Rows:
        assert rows in (1, len(tokens))
        assert all(0 <= token < 100 for token in tokens)
        sequence += tokens
        assert len(sequence) <= self.context
        self.passes += 1
        read = 8 * len(set(tokens)) if self.expert is not None else 0
        prompt = PROMPT * (len(tokens) - rows)
        self.now += (self.scale * (COSTS[rows] + prompt) + (self.expert or 0) * (read - 8)) / 1000
        self.now += self.disturbed * (self.passes % 3 > 0) * 0.01
        return Rows([0] * rows, experts=read)


def test_widths_between_and_beyond_those_measured_are_on_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch)
    assert measured_shape(engine).shape.rows == pytest.approx([1, 1.1, 1.3, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0])
    assert engine.now < 0.25
    assert not engine.open


def test_a_slow_model_is_measured_at_fewer_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch, scale=4)
    assert measured_shape(engine).shape.rows == pytest.approx([1, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5])
    assert engine.now < 0.25
    assert measured_shape(Timed(monkeypatch, scale=10)) is None


def test_an_engine_that_runs_few_rows_is_measured_up_to_these(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = measured_shape(Timed(monkeypatch, max_depth=3)).shape
    assert shape.rows == pytest.approx([1, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5])


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch)
    first = cost_shape(engine, "key", tmp_path)
    passes = engine.passes
    assert cost_shape(engine, "key", tmp_path) == first
    assert engine.passes == passes
    cost_shape(engine, "other", tmp_path)
    assert engine.passes > passes
    assert cost_shape(engine, None, tmp_path).rows == pytest.approx(first.rows)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_quick_model_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Timed(monkeypatch, scale=0.01)
    assert measured_shape(engine).shape.rows == pytest.approx([1, 1.1, 1.3, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0])
    assert engine.now < 0.01


def test_a_very_slow_model_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch, scale=1000)
    assert cost_shape(engine, "key", tmp_path) == GUESSED_SHAPE
    assert engine.passes == 1
    assert not list(tmp_path.iterdir())


def test_a_prompts_tokens_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_shape(Timed(monkeypatch)).shape.prompt_row == pytest.approx(PROMPT / COSTS[1])
    slow = measured_shape(Timed(monkeypatch, scale=4)).shape  # which leaves no time for that
    assert slow.prompt is None
    assert slow.prompt_row == slow.row


@pytest.mark.parametrize("context", [1, 2, 3, 8, 17, 18])
def test_no_pass_is_longer_than_the_context(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    engine = Timed(monkeypatch)
    engine.context = context
    measured = measured_shape(engine)
    assert (measured is None) == (context < 3)  # which leaves one width or none
    assert measured is None or (measured.shape.prompt is None) == (context < 18)


def test_what_a_small_context_leaves_out_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch)
    engine.context = 8
    assert cost_shape(engine, "key", tmp_path).prompt is None
    engine.context = 1000
    assert cost_shape(engine, "key", tmp_path) == measured_shape(Timed(monkeypatch)).shape


def test_a_prompt_that_costs_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "PROMPT", -0.1)  # as noise can make it where passes have a fixed size
    engine = Timed(monkeypatch)
    found = cost_shape(engine, "key", tmp_path)
    passes = engine.passes
    assert found.prompt == 0
    assert cost_shape(engine, "key", tmp_path) == found
    assert engine.passes == passes


def test_what_a_busy_machine_says_is_used_but_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Timed(monkeypatch, scale=0.5, disturbed=True)
    assert cost_shape(engine, "key", tmp_path).rows[3] == pytest.approx(1.5)
    assert not list(tmp_path.iterdir())
    engine.disturbed = False
    assert cost_shape(engine, "key", tmp_path).rows[3] == pytest.approx(1.5)
    assert list(tmp_path.iterdir())


def kept(rows: object, experts: object, prompt: object = 0.1) -> str:
    return json.dumps({"rows": rows, "experts": experts, "prompt": prompt})


NINE = [1.0] * 9
DAMAGES = [
    "",
    "{",
    "null",
    "[1.0, 2.0]",
    kept(["a"] * 9, None),
    kept([0.5] * 9, None),
    kept([1e9] * 9, None),
    kept(NINE[:-1], None),
    kept(NINE, [NINE]),
    kept(NINE, [NINE[:-1], 0.1]),
    kept(NINE, [NINE, -1.0]),
    kept(NINE, [NINE, "a"]),
    kept(None, None),
    kept(NINE, 7),
    kept(NINE, None, "a"),
    kept(NINE, None, -1.0),
    json.dumps({"rows": NINE, "experts": None}),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    (tmp_path / "key.json").write_text(damage)
    assert cost_shape(Timed(monkeypatch), "key", tmp_path).rows[3] == pytest.approx(1.5)


def test_where_it_cannot_be_kept_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert cost_shape(Timed(monkeypatch), "key", tmp_path / "file").rows[3] == pytest.approx(1.5)
    assert "measured again" in caplog.text
    caplog.clear()
    (tmp_path / "key.json").mkdir()  # nor can a file have the name of a folder
    assert cost_shape(Timed(monkeypatch), "key", tmp_path).rows[3] == pytest.approx(1.5)
    assert "measured again" in caplog.text


def test_what_an_expert_costs_is_told_by_one_token_over_and_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Timed(monkeypatch, scale=0.5, expert=0.05)
    shape = cost_shape(engine, "key", tmp_path)
    seconds = {rows: 0.5 * COSTS[rows] + 0.4 * (rows - 1) for rows in (1, 2, 4, 8)}
    ratios = [took / 5 for took in seconds.values()]
    assert [shape.rows[rows - 1] for rows in seconds] == pytest.approx(ratios, abs=1e-3)
    assert shape.experts == Experts(pytest.approx([8.0 * rows for rows in range(1, 10)]), pytest.approx(0.05 / 5))
    assert cost_shape(engine, "key", tmp_path) == CostShape(shape.rows, Experts(*shape.experts), shape.prompt)


def test_an_engine_counts_the_experts_that_its_passes_read(tmp_path: Path) -> None:
    write_folder(tmp_path, TARGETS["26B-A4B"])
    checkpoint = open_checkpoint(tmp_path)
    engine = Engine(checkpoint.config, checkpoint.weights, threads=2, context=128)
    layers, active = len(checkpoint.config.layers), TARGETS["26B-A4B"]["top_k_experts"]
    sequence, params = engine.create(), SamplingParams()
    assert engine.step(sequence, [2], 1, params).experts == layers * active
    many = engine.step(sequence, list(range(3, 35)), 1, params).experts
    assert layers * active < many <= layers * TARGETS["26B-A4B"]["num_experts"]
    experts = measured_shape(engine).shape.experts
    assert experts.read[0] == layers * active
    assert experts.read[-1] > experts.read[0]
