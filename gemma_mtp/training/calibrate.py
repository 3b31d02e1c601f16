"""What a model's matrices are multiplied with in a text: the second moments that error-compensated rounding needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.checkpoints.rounding import SPAN
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import ModelConfig
from gemma_mtp.errors import CheckpointError
from gemma_mtp.loading import tokenizer_of
from gemma_mtp.models.decoder import decode
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights
from gemma_mtp.training.data import Text, token_stream

Moments = dict[str, list[NDArray[np.float32]]]
"""Of each matrix, for each span of its columns, the sum of x x^T over its inputs x: float32 [span, span]."""


WINDOW, MOST_WINDOWS = 512, 64  # tokens that see each other; how many of the text, evenly spread over it, are run


def calibrate(source: str, texts: Sequence[Text], done: Callable[[float], None] = lambda share: None) -> Moments:
    """The moments of a target's matrices over texts.

    source: what `Model.load` takes. done(share of the work) is called on the way. Raises CheckpointError,
    SettingsError.
    """
    checkpoint = open_checkpoint(resolve(source))
    config = checkpoint.config
    if not isinstance(config, ModelConfig):
        raise CheckpointError(f"{checkpoint.path} is a drafter: only targets can be calibrated, on texts they read.")
    if checkpoint.packed:
        raise CheckpointError(f"{checkpoint.path} is packed: calibrate the checkpoint it was made of.")
    encode = partial(tokenizer_of(checkpoint).encode, bos=False)
    tokens = token_stream(texts, encode, config.eos[0])
    windows = windows_of(tokens, config.bos)
    return input_moments(config, checkpoint.weights, windows, lambda count: done(count / len(windows)))


def windows_of(tokens: NDArray[np.int32], first: int) -> list[list[int]]:
    """At most MOST_WINDOWS pieces of a stream of tokens, evenly spread, each starting with `first` as a prompt does."""
    room = WINDOW - 1
    starts = np.arange(0, max(1, len(tokens) - room + 1), room)
    chosen = starts[np.linspace(0, len(starts) - 1, min(MOST_WINDOWS, len(starts))).astype(int)]
    return [[first, *tokens[start : start + room].tolist()] for start in chosen]


def input_moments(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    windows: Sequence[Sequence[int]],
    done: Callable[[int], None] = lambda count: None,
) -> Moments:
    """Runs windows of tokens in float32, each on its own; experts are left out, as few rows reach each of them.

    done(windows run so far) is called after each. Matrices with the same inputs share their moments.
    """
    weights = TorchWeights(tensors, torch.device("cpu"), torch.float32)
    moments: dict[str, list[Tensor]] = {}
    shared: dict[str, str] = {}
    with torch.inference_mode():
        for count, window in enumerate(windows, 1):
            rows = Pass(window, 0, PassCache(), len(window))
            decode(_Recording(weights, config.eps, rows, moments, shared), config)
            done(count)
    found = {name: [part.numpy() for part in parts] for name, parts in moments.items()}
    return found | {name: found[first] for name, first in shared.items()}


class _Recording(TorchOps):
    """Adds up the second moments of the inputs of products on the way. The head itself is not computed."""

    def __init__(
        self,
        weights: TorchWeights,
        eps: float,
        rows: Pass,
        moments: dict[str, list[Tensor]],
        shared: dict[str, str],
    ):
        super().__init__(weights, eps, rows)
        self._moments, self._shared = moments, shared

    def project(self, x: Tensor, *weights: str) -> list[Tensor]:
        self._record(x, *weights)
        return super().project(x, *weights)

    def gated(self, x: Tensor, gate: str, up: str) -> Tensor:
        self._record(x, gate, up)
        return super().gated(x, gate, up)

    def logits(self, x: Tensor, weight: str) -> Tensor:
        self._record(x, weight)
        return x

    def _record(self, x: Tensor, first: str, *others: str) -> None:
        parts = [part.T @ part for part in x.split(SPAN, 1)]
        if first in self._moments:
            for total, part in zip(self._moments[first], parts, strict=True):
                total += part
        else:
            self._moments[first] = parts
            self._shared.update(dict.fromkeys(others, first))
