"""Trains a target from scratch, through its one definition and the PyTorch executor."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import ModelConfig
from gemma_mtp.models.decoder import Decoded, decode
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights
from gemma_mtp.training.data import Windows
from gemma_mtp.training.optimise import SAVE_SECONDS, Budget, Log, Optimiser, Progress, has_bfloat16, on_device

_LOG_EVERY = 20  # steps


def run_target(weights: TorchWeights, config: ModelConfig, tokens: Tensor) -> tuple[Decoded[Tensor], PassCache]:
    """Logits and hidden states [sequences * length, ...] of whole sequences [sequences, length], and their cache."""
    sequences = len(tokens)
    cache = PassCache(sequences)
    rows = Pass(tokens.flatten(), 0, cache, outputs=tokens.numel(), sequences=sequences)
    return decode(TorchOps(weights, config.eps, rows), config), cache


def pretrain(
    config: ModelConfig,
    weights: dict[str, Tensor],
    windows: Windows,
    held_out: Windows,
    budget: Budget,
    log: Log,
    *,
    sequences: int = 2,
    rate: float = 3e-3,
    done: Progress | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Trains `weights` in place to predict the next token of the windows, `sequences` of them a step.

    Matrices are multiplied in bfloat16 where that is faster. done: where an earlier run that `save` kept stopped, to go
    on from (with that run's weights). save: called every SAVE_SECONDS and at the end, however that comes.
    """
    optimiser = Optimiser(weights, rate)
    running = on_device(weights)
    device = weights["embed"].device
    steps, before = 0, 0.0
    losses: list[float] = []  # since the last line of the log
    if done:
        optimiser.adam.load_state_dict(done.adam)
        steps, before = done.steps, done.seconds
    start = saved = time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - start

    try:
        while (progress := budget.progress(seconds(), steps)) < 1:
            batch = torch.from_numpy(windows.batch(sequences)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                loss = next_token_loss(running, config, batch)
            optimiser.step(loss, progress)
            steps += 1
            losses.append(loss.item())
            if time.perf_counter() - saved > SAVE_SECONDS:
                save(Progress(steps, seconds(), optimiser.adam.state_dict()))
                saved = time.perf_counter()
            if steps % _LOG_EVERY == 0:
                log.write("target", step=steps, loss=fmean(losses), seconds=round(seconds(), 1))
                losses = []
    finally:
        save(Progress(steps, seconds(), optimiser.adam.state_dict()))
    with torch.no_grad():
        unseen = [next_token_loss(running, config, torch.from_numpy(held_out.batch(4)).to(device)) for _ in range(8)]
    log.write("target trained", steps=steps, held_out_loss=torch.stack(unseen).mean().item())


def next_token_loss(weights: TorchWeights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens after the first, of int64 [sequences, length]."""
    decoded, _ = run_target(weights, config, tokens)
    logits = decoded.logits.unflatten(0, tokens.shape)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
