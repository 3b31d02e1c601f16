"""What is held out of a training is not learnt from, and its log and picture show how a drafter does on it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.training import distill as distilling
from gemma_mtp.training.chart import chart_of_training, read_figures
from gemma_mtp.training.distill import agreement, distill, draft_rounds, lesson_of, total_loss
from gemma_mtp.training.drafter import drafter_config, first_weights
from gemma_mtp.training.optimise import Budget, Log, initial_weights, on_device
from gemma_mtp.training.states import TEXTS_A_SHARD, TOP, Lessons, sources

from ..checkpoints.tiny import TARGETS

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LENGTH = 12


def tiny_target() -> ModelConfig:
    config = config_from_hf(TARGETS["gemma3"])
    assert isinstance(config, ModelConfig)
    return config


def write_shards(folder: Path, config: ModelConfig, count: int) -> None:
    """Shards whose tokens say which text they are of: text t of shard s has the token 16 s + t throughout."""
    shape = (TEXTS_A_SHARD, LENGTH)
    for number in range(count):
        tokens = (number * TEXTS_A_SHARD + torch.arange(TEXTS_A_SHARD, dtype=torch.int32))[:, None].expand(shape)
        shard = {"tokens": tokens.contiguous(), "hidden": torch.randn(*shape, config.hidden).half()}
        shard["top"] = torch.zeros(*shape, TOP, dtype=torch.int32)
        for layer in sources(config):
            width = config.layers[layer].kv_heads * config.layers[layer].head_dim
            shard |= {f"{layer}.{name}": torch.randn(*shape, width).half() for name in "kv"}
        save_file(shard, folder / f"{number:05}.safetensors")


def test_the_last_shard_is_held_out_and_read_the_same_each_time(tmp_path: Path) -> None:
    config = tiny_target()
    write_shards(tmp_path, config, 3)
    lessons = Lessons(tmp_path, config, torch.randn(config.vocab, config.hidden), texts=5)
    learnt = {int(token) for _ in range(60) for token in lessons.next().tokens[:, 0]}
    assert learnt == set(range(2 * TEXTS_A_SHARD))
    first, again = (list(lessons.held_out()) for _ in range(2))
    assert [lesson.tokens[:, 0].tolist() for lesson in first] == [[*range(at, at + 5)] for at in (32, 37, 42)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.probs, other.probs)


def test_a_training_that_goes_on_draws_other_lessons(tmp_path: Path) -> None:
    config = tiny_target()
    write_shards(tmp_path, config, 3)
    embedding = torch.randn(config.vocab, config.hidden)

    def drawn(after: int) -> list[int]:
        lessons = Lessons(tmp_path, config, embedding, texts=1, drawn=after)
        return [int(lessons.next().tokens[0, 0]) for _ in range(20)]

    assert drawn(0) == drawn(0)
    assert drawn(20) == drawn(20) != drawn(0)


def test_a_lone_shard_is_learnt_from(tmp_path: Path) -> None:
    config = tiny_target()
    write_shards(tmp_path, config, 1)
    lessons = Lessons(tmp_path, config, torch.randn(config.vocab, config.hidden), texts=5)
    assert lessons.next().tokens.shape == (5, LENGTH)
    assert list(lessons.held_out()) == []


def test_the_log_has_the_agreement_on_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "_LOG_EVERY", 4)
    target = tiny_target()
    drafter = config_from_hf(drafter_config(target, hidden=32, layers=2))
    assert isinstance(drafter, DrafterConfig)
    of_target = on_device(initial_weights(target))
    weights = first_weights(drafter, target, of_target)
    tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(5))
    learnt, *others = (lesson_of(of_target, target, tokens[i : i + 2]) for i in (0, 2, 4))
    how = {"mixed": False, "held_out": lambda: others}
    with Log(tmp_path / "log.jsonl") as log:
        distill(drafter, weights, target, of_target, lambda: learnt, Budget(steps=40), log, **how)
    lines, held_out = read_figures(tmp_path / "log.jsonl")
    assert list(lines) == list(range(4, 41, 4))
    assert list(held_out) == [20, 40]
    embedding = of_target["embed"].detach()
    running = on_device(weights, {"target_embed": embedding, "target_output": embedding})
    with torch.no_grad():
        last = [draft_rounds(running, drafter, target, lesson, depth=3) for lesson in others]
        assert held_out[40]["loss"] == pytest.approx(sum(total_loss(rows).item() for rows in last) / 2, rel=1e-4)
    for name in ("greedy", "sampled"):
        both = [agreement(rows)[name] for rows in last]
        assert held_out[40][name] == pytest.approx([sum(of) / 2 for of in zip(*both, strict=True)], abs=1e-4)
    # Two texts over and over: it learns them by heart, and the log must show that it does so in vain.
    assert lines[40]["loss"] < held_out[40]["loss"] - 0.05


def line(event: str, **figures: object) -> str:
    return json.dumps({"time": 1.0, "event": event, **figures})


def drafter_line(step: int, loss: float) -> str:
    return line("drafter", step=step, loss=loss, greedy=[loss / 10, 0.2, 0.1], sampled=[0.3, 0.2, 0.1], reach=1.0)


def test_of_steps_done_again_the_last_count_and_a_start_afresh_clears_what_was(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    before = [line("start", resumed=False), drafter_line(20, 9.0), drafter_line(60, 8.0)]
    fresh = [line("start", resumed=False), drafter_line(20, 7.0), drafter_line(40, 6.0), '{"time": 2, "eve']
    resumed = [line("start", resumed=True), line("held out", step=40, loss=5.5), drafter_line(40, 5.0)]
    log.write_text("\n".join([*before, *fresh, *resumed]) + "\n")
    learnt, held_out = read_figures(log)
    assert [(step, of["loss"]) for step, of in learnt.items()] == [(20, 7.0), (40, 5.0)]
    assert [(step, of["loss"]) for step, of in held_out.items()] == [(40, 5.5)]


def test_the_picture_shows_every_figure_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line("start", resumed=False) + "\n")
    assert chart_of_training(log, "A drafter") is None
    seen = line("held out", step=100, loss=4.5, greedy=[0.5, 0.4, 0.3], sampled=[0.25, 0.2, 0.15])
    log.write_text("\n".join([line("start", resumed=False), drafter_line(20, 7.0), drafter_line(100, 4.0), seen]))
    drawn = ElementTree.fromstring(chart_of_training(log, "A drafter") or "")
    shown = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert shown[0] == "A drafter"
    assert {"loss, 20: 7", "loss, 100: 4", "loss, held out, 100: 4.5"} <= set(shown)
    assert {"depth 1, 20: 0.7", "depth 1, 100: 0.4", "depth 3, held out, 100: 0.3"} <= set(shown)
    assert {"depth 2, 100: 0.2", "depth 2, held out, 100: 0.2", "depth 3, held out, 100: 0.15"} <= set(shown)
    assert len(shown) == 1 + 3 * (1 + 2 * 3)  # at three places, a loss and two agreements at three depths
