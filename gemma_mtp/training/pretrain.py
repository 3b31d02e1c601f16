"""Trains a target from scratch, through its one definition and the PyTorch executor."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.config import ModelConfig
from gemma_mtp.models.decoder import Decoded, decode
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights
from gemma_mtp.training.data import Windows
from gemma_mtp.training.optimise import Budget, Log, Optimiser, on_device

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
) -> None:
    """Trains `weights` in place to predict the next token of the windows, `sequences` of them a step."""
    optimiser = Optimiser(weights, rate)
    running = on_device(weights)
    start = time.perf_counter()
    steps = tokens = 0
    loss_sum = 0.0
    while (progress := budget.progress(time.perf_counter() - start, steps)) < 1:
        batch = torch.from_numpy(windows.batch(sequences))
        loss = next_token_loss(running, config, batch)
        optimiser.step(loss, progress)
        steps, tokens, loss_sum = steps + 1, tokens + batch.numel(), loss_sum + loss.item()
        if steps % _LOG_EVERY == 0:
            seconds = time.perf_counter() - start
            log.write("target", step=steps, loss=loss_sum / _LOG_EVERY, tokens=tokens, seconds=round(seconds, 1))
            loss_sum = 0.0
    with torch.no_grad():
        losses = [next_token_loss(running, config, torch.from_numpy(held_out.batch(4))) for _ in range(8)]
    log.write("target trained", steps=steps, tokens=tokens, held_out_loss=torch.stack(losses).mean().item())


def next_token_loss(weights: TorchWeights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens after the first, of int64 [sequences, length]."""
    decoded, _ = run_target(weights, config, tokens)
    logits = decoded.logits.unflatten(0, tokens.shape)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
