"""What all training here shares: initial weights, AdamW with warm-up, cosine decay and clipping, and the log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from gemma_mtp.checkpoints.files import written_whole
from gemma_mtp.checkpoints.names import weight_shapes
from gemma_mtp.config import DrafterConfig, ModelConfig
from gemma_mtp.ops.torch import TorchWeights

SAVE_SECONDS = 120.0  # between two times that a training's progress is kept


def initial_weights(
    config: ModelConfig | DrafterConfig, seed: int = 0, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """Random float32 weights by canonical name, for training from scratch; those of some names left out.

    Matrices keep the size of what goes through them. Norms of queries and keys make attention scores of size 1, and the
    norms after a block make the sum of all blocks as large as the embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = 2 * len(config.layers)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        if name in without:
            continue
        kind = name.rpartition(".")[2]
        if kind == "token_ordering":
            weights[name] = torch.arange(config.vocab)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        elif kind in ("q_norm", "k_norm"):
            weights[name] = torch.full(shape, (config.attention_scale * math.sqrt(shape[0])) ** -0.5)
        elif kind in ("post_attn_norm", "post_ffn_norm", "ple_norm"):
            weights[name] = torch.full(shape, blocks**-0.5)
        else:
            weights[name] = torch.ones(shape)
    return weights


def on_device(weights: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None) -> TorchWeights:
    """Weights as TorchOps takes them, without a copy: gradients reach the tensors given."""
    everything = {**weights, **(shared or {})}
    return TorchWeights({}, next(iter(everything.values())).device, torch.float32, everything)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # which no public function tells
        return bool(ask and ask())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Budget:
    """How long to train: until `seconds` have passed or `steps` are done, whichever is set and first."""

    seconds: float | None = None
    steps: int | None = None

    def progress(self, seconds: float, steps: int) -> float:
        """The share of it that is used, from 0 to 1."""
        shares = [seconds / self.seconds if self.seconds else 0.0, steps / self.steps if self.steps else 0.0]
        return min(1.0, max(shares))


@dataclass(frozen=True)
class Progress:
    """Where a training is: what it has used of its budget, and the state of its optimiser."""

    steps: int
    seconds: float
    adam: dict[str, Any]


def save_progress(path: Path, weights: Mapping[str, Tensor], progress: Progress) -> None:
    state = {"weights": weights, "steps": progress.steps, "seconds": progress.seconds, "adam": progress.adam}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as out:
        torch.save(state, out)


def load_progress(path: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The weights and the progress that save_progress kept, if there are any."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state["weights"], Progress(state["steps"], state["seconds"], state["adam"])


class Optimiser:
    """AdamW over the floating-point weights of a dictionary: linear warm-up, cosine decay to a twentieth, clipping.

    Matrices are decayed, vectors are not. Vectors and the scalar of a layer learn at the same rate as matrices.
    """

    WARM_UP = 0.04
    LAST = 0.05

    def __init__(self, weights: Mapping[str, Tensor], rate: float, decay: float = 0.05, clip: float = 1.0):
        self._rate, self._clip = rate, clip
        self.trained = [weight.requires_grad_() for weight in weights.values() if weight.is_floating_point()]
        groups = [
            {"params": [weight for weight in self.trained if weight.ndim > 1], "weight_decay": decay},
            {"params": [weight for weight in self.trained if weight.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def rate(self, progress: float) -> float:
        """The learning rate once a share `progress` of the budget is used."""
        falling = self.LAST + (1 - self.LAST) * (1 + math.cos(math.pi * progress)) / 2
        return self._rate * min(1.0, (progress + 1e-3) / self.WARM_UP) * falling

    def step(self, loss: Tensor, progress: float) -> None:
        self.accumulate((loss,), progress)

    def accumulate(self, losses: Iterable[Tensor], progress: float) -> float:
        """One step along the mean of losses that are computed one after another; returns that mean."""
        self.adam.zero_grad()
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.item())
        for weight in self.trained:
            if weight.grad is not None:
                weight.grad /= len(values)
        torch.nn.utils.clip_grad_norm_(self.trained, self._clip)
        for group in self.adam.param_groups:
            group["lr"] = self.rate(progress)
        self.adam.step()
        return fmean(values)


class Log:
    """A run's figures: every line an object in a JSON lines file, and a short form for `tell`. Use it in `with`."""

    def __init__(self, path: Path, tell: Callable[[str], None] = lambda line: None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by `__exit__`
        self._tell = tell

    def write(self, event: str, **figures: Any) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 1), "event": event, **figures}) + "\n")
        self._file.flush()
        self._tell(f"{event}: " + ", ".join(f"{name} {_short(value)}" for name, value in figures.items()))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " / ".join(map(_short, value))
    return str(value)
