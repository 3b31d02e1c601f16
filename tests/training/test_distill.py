"""Training runs the models as decoding does: in batches, and rounds at every position at once."""

from typing import Any

import pytest
import torch

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.config import DrafterConfig, HeadsConfig, ModelConfig
from gemma_mtp.errors import SettingsError
from gemma_mtp.models.assistant import draft_step
from gemma_mtp.models.heads import draft_heads
from gemma_mtp.ops.torch import Pass, TorchOps, TorchWeights
from gemma_mtp.training.distill import DistillingOps, centroid_probs, draft_rounds, lesson_of, total_loss
from gemma_mtp.training.drafter import (
    balanced_clusters,
    drafter_config,
    first_weights,
    output_embedding,
    with_embedding,
)
from gemma_mtp.training.evaluate import before_loop
from gemma_mtp.training.export import widened
from gemma_mtp.training.heads import first_heads, heads_config
from gemma_mtp.training.optimise import Budget, Optimiser, initial_weights, on_device
from gemma_mtp.training.pretrain import run_target

from ..checkpoints.tiny import TARGETS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KINDS = ["gemma3", "gemma3 with scaled positions", "E2B", "12B unified", "26B-A4B", "31B"]


def target_of(kind: str) -> ModelConfig:
    config = config_from_hf(TARGETS[kind])
    assert isinstance(config, ModelConfig)
    return config


def drafter_of(target: ModelConfig, **options: Any) -> DrafterConfig:
    config = config_from_hf(drafter_config(target, hidden=32, layers=2, **options))
    assert isinstance(config, DrafterConfig)
    return config


def own_weights(drafter: DrafterConfig, target: ModelConfig, of_target: TorchWeights) -> TorchWeights:
    """An untrained drafter's, with all that its training and its decoding read."""
    first, embedding = first_weights(drafter, target, of_target), output_embedding(of_target, target)
    shared = {"target_embed": of_target["embed"], "target_output": embedding}
    return on_device({**first, **with_embedding(first, embedding)}, shared)


def texts(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_a_pass_do_not_see_each_other(kind: str) -> None:
    config = target_of(kind)
    weights = on_device(initial_weights(config))
    tokens = texts(3, 40)
    with torch.no_grad():
        together = run_target(weights, config, tokens)[0].logits.unflatten(0, tokens.shape)
        for text, logits in zip(tokens, together, strict=True):
            torch.testing.assert_close(logits, run_target(weights, config, text[None])[0].logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_at_every_position_are_those_of_decoding(kind: str) -> None:
    target = target_of(kind)
    drafter = drafter_of(target)
    weights = on_device(initial_weights(target))
    own = own_weights(drafter, target, weights)
    tokens = texts(2, 44)
    with torch.no_grad():
        steps = draft_rounds(own, drafter, target, lesson_of(weights, target, tokens), depth=3)
        for sequence, newest in ((0, 1), (1, 20), (1, 41)):
            decoded, cache = run_target(weights, target, tokens[sequence : sequence + 1, :newest])
            state = decoded.hidden[-1:]
            for step, rows in enumerate(steps):
                token = tokens[sequence, newest + step : newest + step + 1]
                one = Pass(token, newest, cache, outputs=1, hidden=state)
                expected = draft_step(TorchOps(own, drafter.eps, one), drafter, target)
                state = expected.hidden
                found = rows.logits.unflatten(0, (2, -1))[sequence, newest - 1]
                torch.testing.assert_close(found, expected.logits[0], atol=1e-4, rtol=1e-3)


def test_a_few_candidates_are_scored_as_among_all() -> None:
    target = target_of("E2B")
    drafter = drafter_of(target, centroids=16, active=4)
    of_target = on_device(initial_weights(target))
    weights = own_weights(drafter, target, of_target)
    lesson = lesson_of(of_target, target, texts(1, 12))
    some = torch.tensor([3, 200, 17])
    with torch.no_grad():
        rows = Pass(lesson.tokens[0, 1:9], 1, lesson.cache, outputs=8, hidden=lesson.hidden[0, :8])
        every, few = (
            draft_step(DistillingOps(weights, 1e-6, rows, scored), drafter, target)
            for scored in (weights["embed"], weights["embed"][some])
        )
    torch.testing.assert_close(few.logits, every.logits[:, some])
    torch.testing.assert_close(few.hidden, every.hidden)
    assert torch.allclose(centroid_probs(weights, drafter, lesson).sum(-1), torch.ones(1, 12))


def test_the_loss_falls_and_reaches_every_weight() -> None:
    target = target_of("E2B")
    drafter = drafter_of(target, centroids=16, active=4)
    of_target = on_device(initial_weights(target))
    weights = first_weights(drafter, target, of_target)
    running = on_device(weights, {"target_embed": of_target["embed"], "target_output": of_target["embed"]})
    lesson = lesson_of(of_target, target, texts(2, 24))
    optimiser = Optimiser(weights, rate=3e-3)
    losses = []
    for step in range(12):
        loss = total_loss(draft_rounds(running, drafter, target, lesson, depth=2))
        optimiser.step(loss, progress=step / 12)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in optimiser.trained)


def test_an_update_of_several_lessons_is_that_of_a_larger_one() -> None:
    target = target_of("E2B")
    drafter = drafter_of(target, centroids=16, active=4)
    of_target = on_device(initial_weights(target))
    tokens = texts(4, 24)
    found = []
    for size in (4, 2, 1):
        weights = first_weights(drafter, target, of_target)
        running = on_device(weights, {"target_embed": of_target["embed"], "target_output": of_target["embed"]})
        lessons = [lesson_of(of_target, target, part) for part in tokens.split(size)]
        losses = (total_loss(draft_rounds(running, drafter, target, lesson, depth=2)) for lesson in lessons)
        optimiser = Optimiser(weights, rate=1e-3)
        loss = optimiser.accumulate(losses, progress=0.5)
        found.append((torch.tensor(loss), [weight.grad for weight in optimiser.trained]))
    for of_several in found[1:]:
        torch.testing.assert_close(of_several, found[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "31B"])
@pytest.mark.parametrize("head", [{}, {"centroids": 16, "active": 4}], ids=len)
def test_heads_learn_what_they_are_asked_for(kind: str, head: dict[str, int]) -> None:
    """Head i's rows are the target's of the token i + 2 places after its state; its logits are those of decoding."""
    target = target_of(kind)
    config = config_from_hf(heads_config(target, count=2, width=24, **head))
    assert isinstance(config, HeadsConfig)
    of_target = on_device(initial_weights(target))
    weights = first_heads(config, target, of_target)
    output = output_embedding(of_target, target)
    running = on_device(weights, {"target_embed": output, "target_output": output})
    lesson = lesson_of(of_target, target, texts(2, 20))
    steps = draft_rounds(running, config, target, lesson, depth=2)
    at = 7  # a position of the second text
    one = Pass(lesson.tokens[1, at + 1 : at + 2], at + 1, lesson.cache, outputs=1, hidden=lesson.hidden[1, at : at + 1])
    for i, (rows, expected) in enumerate(zip(steps, draft_heads(TorchOps(running, 1e-6, one), config), strict=True)):
        chosen = expected[0].isfinite()
        torch.testing.assert_close(rows.logits.unflatten(0, (2, -1))[1, at][chosen], expected[0][chosen])
        torch.testing.assert_close(rows.probs.unflatten(0, (2, -1))[1, at], lesson.probs[1, at + 1 + i])
    optimiser = Optimiser(weights, rate=3e-3)
    losses = []
    for step in range(12):
        loss = total_loss(draft_rounds(running, config, target, lesson, depth=2))
        optimiser.step(loss, progress=step / 12)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in optimiser.trained)


def test_a_wider_drafter_says_the_same() -> None:
    target = target_of("E2B")
    described = drafter_config(target, layers=2, centroids=16)
    drafter, of_target = config_from_hf(described), on_device(initial_weights(target))
    first = first_weights(drafter, target, of_target)
    weights = with_embedding(first, output_embedding(of_target, target))
    wide, wide_weights = widened(described, weights, target.hidden + 32)
    lesson = lesson_of(of_target, target, texts(1, 16))
    shared = {"target_embed": of_target["embed"], "target_output": of_target["embed"]}
    with torch.no_grad():
        expected = draft_rounds(on_device(weights, shared), drafter, target, lesson, depth=2)
        found = draft_rounds(on_device(wide_weights, shared), config_from_hf(wide), target, lesson, depth=2)
    for rows, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(rows.logits, wanted.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rows.centroid_scores, wanted.centroid_scores, atol=1e-4, rtol=1e-4)


def test_clusters_are_of_one_size_and_hold_what_is_near() -> None:
    centres = torch.eye(8) * 10
    vectors = (centres[torch.arange(128) % 8] + torch.randn(128, 8, generator=torch.Generator().manual_seed(0)) * 0.1)
    ordering, found = balanced_clusters(vectors, 8)
    assert ordering.sort().values.tolist() == list(range(128))
    assert found.shape == (8, 8)
    within = (vectors[ordering].unflatten(0, (8, 16)) - found[:, None]).square().sum(-1).mean()
    assert within < vectors.var(0).sum() / 2


def test_a_number_of_centroids_that_does_not_divide_the_vocabulary_is_an_error() -> None:
    with pytest.raises(SettingsError, match="divides 16"):
        drafter_config(target_of("E2B"), centroids=7)


def test_a_budget_ends_by_time_or_by_steps() -> None:
    assert Budget(seconds=10).progress(5, 1000) == 0.5
    assert Budget(steps=10).progress(5, 10) == 1
    assert Budget(seconds=10, steps=100).progress(1, 50) == 0.5


def test_a_loop_is_found_where_it_starts() -> None:
    assert before_loop(range(100)) == 100
    assert before_loop([*range(20), *range(20)]) == 20
    assert before_loop([7] * 40) == 1
