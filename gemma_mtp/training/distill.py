"""Trains a drafter to say what its target says, as it is used at run time.

A round drafts from the newest token, at position p, with the target's hidden state of position p - 1. Step 1 proposes
the token at p + 1, step j the one at p + j; from step 2 on the drafter is fed its own state. All steps of a round query
from position p and see the target's keys before p. Here a round starts at every position of a text at once, and the
token that step j is fed is the text's: on text that the target wrote itself, that is what an accepted draft is.

Parallel heads (models/heads.py) make all steps of a round from the target's state alone, head j the token at p + j.

The loss of a step is least where drafter and target agree. A part of it is what acceptance depends on: the total
variation 1 - sum min(p, q), which is the share of tokens that even the best coupling rejects. It hardly moves what is
far from right, so the rest is the cross-entropy to the target's distribution ("knowledge distillation", Hinton et al.
2015, arXiv 1503.02531). A step deeper counts DEPTH_WEIGHT times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import AnyDrafterConfig, HeadsConfig, ModelConfig
from gemma_mtp.models.assistant import draft_step
from gemma_mtp.models.heads import head
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights
from gemma_mtp.training.drafter import PROJECTION, output_embedding
from gemma_mtp.training.optimise import SAVE_SECONDS, Budget, Log, Optimiser, Progress, has_bfloat16, on_device
from gemma_mtp.training.pretrain import run_target

DEPTH_WEIGHT = 0.8
OVERLAP_WEIGHT = 0.6  # of the total variation in the loss, the rest being cross-entropy
CENTROID_WEIGHT = 0.3
_LOG_EVERY = 20  # steps
_HELD_OUT_EVERY = 5  # lines of the log


@dataclass(frozen=True)
class Lesson:
    """Texts and what the target computed of them.

    tokens: int64 [sequences, length]; hidden: float32 [sequences, length, backbone_hidden], after the final norm;
    cache: the target's keys and values. probs: float32 [sequences, length, candidates], of the token after each;
    candidates: int64 [candidates], the tokens it is about (None: all of the vocabulary).
    """

    tokens: Tensor
    hidden: Tensor
    cache: PassCache
    probs: Tensor
    candidates: Tensor | None = None


@dataclass(frozen=True)
class DraftedRows:
    """What a draft step gave at every position of a lesson, and what the target says there.

    logits, probs: float32 [rows, candidates], the drafter's and the target's. centroid_scores, centroid_probs: float32
    [rows, centroids], what the centroid head chooses by, and the target's probability of each centroid's tokens
    together, which that should follow; None without such a head.
    """

    logits: Tensor
    probs: Tensor
    centroid_scores: Tensor | None
    centroid_probs: Tensor | None

    def loss(self) -> Tensor:
        logs = self.logits.log_softmax(-1)
        entropy = -(self.probs * logs).sum(-1).mean()
        apart = 1 - torch.minimum(logs.exp(), self.probs).sum(-1).mean()
        loss = (1 - OVERLAP_WEIGHT) * entropy + OVERLAP_WEIGHT * apart
        if self.centroid_scores is not None and self.centroid_probs is not None:
            loss = loss + CENTROID_WEIGHT * F.cross_entropy(self.centroid_scores, self.centroid_probs)
        return loss

    @torch.no_grad()
    def agreement(self) -> tuple[float, float]:
        """The share of rows where target and drafter agree: greedily, and sampled.

        Sampled: tokens drawn from p and q with shared Gumbel noise are the same at least s / (2 - s) of the time, s
        being the sum of min(p, q) (Daliri et al. 2024).
        """
        greedy = (self.logits.argmax(-1) == self.probs.argmax(-1)).float().mean().item()
        shared = torch.minimum(self.logits.softmax(-1), self.probs).sum(-1)
        return greedy, (shared / (2 - shared)).mean().item()


class DistillingOps(TorchOps):
    """TorchOps whose head scores the tokens asked for, whatever head the drafter has: as training needs it.

    scored: float32 [candidates, hidden], the rows of the drafter's embedding of those tokens. centroid_scores: after a
    step of a drafter with a centroid head, what that head would choose by.
    """

    def __init__(self, weights: TorchWeights, eps: float, rows: Pass, scored: Tensor):
        super().__init__(weights, eps, rows)
        self._scored = scored
        self.centroid_scores: Tensor | None = None

    def logits(self, x: Tensor, weight: str) -> Tensor:
        return self._times(x, self._scored)

    def centroid_logits(self, x: Tensor, centroids: str, ordering: str, weight: str, active: int) -> Tensor:
        self.centroid_scores = self._times(x, self._weights[centroids])
        return self.logits(x, weight)


@torch.no_grad()
def lesson_of(weights: TorchWeights, config: ModelConfig, tokens: Tensor) -> Lesson:
    """What the target computes of int64 [sequences, length] tokens, over its whole vocabulary."""
    decoded, cache = run_target(weights, config, tokens)
    probs = decoded.logits.softmax(-1).unflatten(0, tokens.shape)
    return Lesson(tokens, decoded.hidden.unflatten(0, tokens.shape), cache, probs)


def draft_rounds(
    weights: TorchWeights, config: AnyDrafterConfig, target: ModelConfig, lesson: Lesson, depth: int
) -> list[DraftedRows]:
    """The steps of rounds that start at every position of the lesson that has `depth` tokens after it.

    weights: the drafter's, with an embedding or with what first_weights makes instead, and of the target the embedding
    as "target_embed" and the output embedding as "target_output".
    """
    sequences, length = lesson.tokens.shape
    rounds = length - depth  # of each sequence, at positions 1 to rounds
    if rounds < 1:
        raise ValueError(f"a text of {length} tokens has no place for rounds of {depth}")
    state = lesson.hidden[:, :rounds].flatten(0, 1)
    own = "embed" in weights
    embedding = weights["embed" if own else "target_output"]
    scored = embedding if lesson.candidates is None else embedding[lesson.candidates]
    if PROJECTION in weights and not own:
        scored = scored @ weights[PROJECTION]
    of_centroids = centroid_probs(weights, config, lesson) if config.centroids else None
    steps = []
    for step in range(depth):
        newest = lesson.tokens[:, 1 + step : 1 + step + rounds].flatten()
        rows = Pass(newest, 1, lesson.cache, outputs=len(newest), hidden=state, sequences=sequences)
        ops = DistillingOps(weights, config.eps, rows, scored)
        if isinstance(config, HeadsConfig):
            logits = head(ops, config, step, state)
        else:
            logits, state = draft_step(ops, config, target)
        place = slice(1 + step, 1 + step + rounds)
        probs = lesson.probs[:, place].flatten(0, 1)
        together = None if of_centroids is None else of_centroids[:, place].flatten(0, 1)
        steps.append(DraftedRows(logits, probs, ops.centroid_scores, together))
    return steps


@torch.no_grad()
def centroid_probs(weights: TorchWeights, config: AnyDrafterConfig, lesson: Lesson) -> Tensor:
    """float32 [sequences, length, centroids]: the target's probability of each centroid's tokens together."""
    assert config.centroids
    ordering, count = weights["token_ordering"], config.centroids.count
    if lesson.candidates is None:
        return lesson.probs[..., ordering].unflatten(-1, (count, -1)).sum(-1)
    of_token = torch.empty_like(ordering)
    of_token[ordering] = torch.arange(len(ordering), device=ordering.device) // (len(ordering) // count)
    rows = lesson.probs.flatten(0, 1)
    sums = torch.zeros(count, len(rows), device=rows.device)
    sums.index_add_(0, of_token[lesson.candidates], rows.T)  # whole rows: far faster than along the last dimension
    return sums.T.unflatten(0, lesson.probs.shape[:2])


def distill(
    config: AnyDrafterConfig,
    weights: dict[str, Tensor],
    target: ModelConfig,
    of_target: TorchWeights,
    next_lesson: Callable[[], Lesson],
    budget: Budget,
    log: Log,
    *,
    depth: int = 3,
    rate: float = 3e-3,
    accumulate: int = 1,
    mixed: bool | None = None,
    done: Progress | None = None,
    held_out: Callable[[], Iterable[Lesson]] = tuple,
    show: Callable[[float], None] = lambda share: None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Trains `weights` in place. of_target: the target's, for their embeddings.

    accumulate: how many lessons an update is made of, one after another. mixed: whether matrices are multiplied in
    bfloat16; None: where that is faster. done: where an earlier run that `save` kept stopped, to go on from (with that
    run's weights). held_out: gives lessons that next_lesson never does, of which the loss and the agreement are logged
    now and then. show: called after every update, with the share of the budget that is used. save: called every
    SAVE_SECONDS, when the budget is used up, and when an error or Ctrl-C ends the training.
    """
    optimiser = Optimiser(weights, rate)
    device = optimiser.trained[0].device
    mixed = has_bfloat16(device) if mixed is None else mixed
    shared = {"target_embed": of_target["embed"].detach(), "target_output": output_embedding(of_target, target)}
    running = on_device(weights, shared)
    steps, before = 0, 0.0
    losses: list[float] = []  # since the last line of the log
    if done:
        optimiser.adam.load_state_dict(done.adam)
        steps, before = done.steps, done.seconds
    start = saved = time.perf_counter()

    def now() -> Progress:
        return Progress(steps, before + time.perf_counter() - start, optimiser.adam.state_dict())

    def rounds(lesson: Lesson) -> tuple[list[DraftedRows], Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            drafted = draft_rounds(running, config, target, lesson, depth)
            return drafted, total_loss(drafted)

    drafted: list[DraftedRows] = []  # of the newest lesson

    def losses_of_a_step() -> Iterator[Tensor]:
        nonlocal drafted
        for _ in range(accumulate):
            drafted, loss = rounds(next_lesson())
            yield loss

    try:
        while (progress := budget.progress(before + time.perf_counter() - start, steps)) < 1:
            losses.append(optimiser.accumulate(losses_of_a_step(), progress))
            steps += 1
            show(progress)
            if time.perf_counter() - saved > SAVE_SECONDS:
                save(now())
                saved = time.perf_counter()
            if steps % _LOG_EVERY == 0:
                reach, seconds = _reach(drafted[0], config), round(before + time.perf_counter() - start, 1)
                log.write("drafter", step=steps, loss=fmean(losses), **agreement(drafted), reach=reach, seconds=seconds)
                losses = []
            if steps % (_LOG_EVERY * _HELD_OUT_EVERY) == 0 and (figures := _judged(rounds, held_out())):
                log.write("held out", step=steps, **figures)
    finally:
        save(now())


def agreement(drafted: Sequence[DraftedRows]) -> dict[str, list[float]]:
    """The agreement at each depth, greedy and sampled."""
    greedy, sampled = zip(*(rows.agreement() for rows in drafted), strict=True)
    return {"greedy": list(greedy), "sampled": list(sampled)}


@torch.no_grad()
def _judged(
    rounds: Callable[[Lesson], tuple[list[DraftedRows], Tensor]], lessons: Iterable[Lesson]
) -> dict[str, float | list[float]]:
    """Means over lessons of one size of their loss and agreement; empty without lessons. Holds the rows of one."""
    found: dict[str, list[list[float]]] = {}
    for lesson in lessons:
        drafted, loss = rounds(lesson)
        for name, figures in {"loss": [loss.item()], **agreement(drafted)}.items():
            found.setdefault(name, []).append(figures)
    means = {name: [fmean(of) for of in zip(*each, strict=True)] for name, each in found.items()}
    return {name: of[0] if name == "loss" else of for name, of in means.items()}


def _reach(rows: DraftedRows, config: AnyDrafterConfig) -> float:
    """The target's probability of all tokens that the drafter's head can propose: of the centroids it chooses."""
    if not config.centroids or rows.centroid_scores is None or rows.centroid_probs is None:
        return 1.0
    chosen = rows.centroid_scores.topk(config.centroids.active).indices
    return rows.centroid_probs.gather(1, chosen).sum(1).mean().item()


def total_loss(drafted: list[DraftedRows]) -> Tensor:
    """The mean over the steps of a round, a deeper one counting DEPTH_WEIGHT times the one before."""
    factors = [DEPTH_WEIGHT**step for step in range(len(drafted))]
    return torch.stack([f * rows.loss() for f, rows in zip(factors, drafted, strict=True)]).sum() / sum(factors)
