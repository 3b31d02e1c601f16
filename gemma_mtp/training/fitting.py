"""The first matrix of a drafter that starts as its target's last layers (drafter.inherited_layers).

What those layers are given in the target is the work of all layers below. A drafter has instead the newest token's
embedding and the target's last hidden state of the position before; the matrix is fitted, by least squares, to make of
these two what the layers are given. That alone guesses a third of what a Gemma 3 270M says.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gemma_mtp.config import ModelConfig
from gemma_mtp.models.decoder import decode
from gemma_mtp.ops.torch import Pass, PassCache, TorchOps, TorchWeights

_RIDGE = 1e-3  # of the mean square of an input


class _Watching(TorchOps):
    """TorchOps that keep what one layer is given, and make no logits."""

    def __init__(self, weights: TorchWeights, eps: float, rows: Pass, layer: int):
        super().__init__(weights, eps, rows)
        self._watched = f"{layer}.attn_norm"
        self.given: Tensor | None = None

    def norm(self, x: Tensor, weight: str | None, factor: float = 1.0) -> Tensor:
        if weight == self._watched:
            self.given = x
        return super().norm(x, weight, factor)

    def logits(self, x: Tensor, weight: str) -> Tensor:
        return x


@torch.no_grad()
def fit_first_matrix(
    layer: int, target: ModelConfig, of_target: TorchWeights, texts: Iterable[Tensor]
) -> tuple[Tensor, float]:
    """ "pre_projection" [hidden, 2 * hidden], for a drafter whose first layer starts as `layer` of the target.

    texts: int64 [sequences, length] each, to fit on. Also returns the share of the variance that it explains. Ridge
    regression by its normal equations; the first position of a text has no state before it and is left out.
    """
    width = target.hidden
    squares = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    products = torch.zeros(2 * width, width, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for tokens in texts:
        count = len(tokens)
        rows = Pass(tokens.flatten(), 0, PassCache(count), outputs=tokens.numel(), sequences=count)
        ops = _Watching(of_target, target.eps, rows, layer)
        hidden = decode(ops, target).hidden.unflatten(0, tokens.shape)
        assert ops.given is not None, "the target has the layer"
        given = ops.given.unflatten(0, tokens.shape)[:, 1:].flatten(0, 1).double()
        newest = of_target.rows("embed", tokens[:, 1:].flatten()) * target.embedding_scale
        seen = torch.cat([newest, hidden[:, :-1].flatten(0, 1)], 1).double()
        squares += seen.T @ seen
        products += seen.T @ given
        total += given.square().sum()
    ridge = _RIDGE * squares.diagonal().mean() * torch.eye(2 * width, dtype=torch.float64)
    matrix = torch.linalg.solve(squares + ridge, products)
    left = total - 2 * (matrix * products).sum() + (matrix * (squares @ matrix)).sum()
    return matrix.T.float().contiguous(), float(1 - left / total)
