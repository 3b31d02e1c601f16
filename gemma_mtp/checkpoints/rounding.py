"""Q4_0 with error compensation: each column is rounded so that later ones make up for what it got wrong.

What is kept small is the error of a layer's outputs, |(W - Q) x|^2 over the inputs x of a calibration text, and not
that of its weights. The method is GPTQ (Frantar et al., arXiv 2210.17323), with a search for each block's scale under
the error that compensation leaves. The result is an ordinary Q4_0 tensor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPAN = 2048
"""Columns that make up for each other: wider matrices are rounded in spans of as many, whose moments fit in memory."""

BLOCK = 32
ROWS_AT_ONCE = 4096
"""How many rows `quantize_compensated` should be given at a time: it works on a few copies of them."""

DAMPING = 0.01  # of the mean square of the inputs, added to every column's
_LARGEST = 6 * 65504.0  # of a weight: the scale stays a finite fp16 in whatever range it is fitted
_SHRINK = np.linspace(0.7, 1.05, 8, dtype=np.float32)  # of the scale that just reaches the largest value

Floats = NDArray[np.float32]


def compensation(moments: NDArray[np.floating], damping: float = DAMPING) -> NDArray[np.float64]:
    """The upper factor U [columns, columns] of the inverse of the inputs' second moments, inv(H) = U^T U.

    Rounding column j by an error e is best made up for by subtracting e U[j, k] / U[j, j] from each later column k.
    """
    moments = moments.astype(np.float64)
    mean = float(np.mean(np.diag(moments))) or 1.0
    inverse = np.linalg.inv(moments + damping * mean * np.eye(len(moments)))
    return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)


def quantize_compensated(values: Floats, factors: list[NDArray[np.float64]]) -> NDArray[np.uint8]:
    """The bytes of a Q4_0 tensor [rows, columns]; factors: `compensation` of each span of its columns.

    Raises ValueError for a value whose scale is no finite fp16.
    """
    parts, column = [], 0
    for factor in factors:
        parts.append(rounded(values[:, column : column + len(factor)], factor))
        column += len(factor)
    scales, codes = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
    return _q4_0(scales, codes)


def rounded(values: Floats, factor: NDArray[np.float64], block: int = BLOCK) -> tuple[NDArray[np.float16], Floats]:
    """Scales [rows, columns / block] and codes [rows, columns], -8 to 7, of which the value is scale times code."""
    left, upper = values.astype(np.float32), factor.astype(np.float32)
    weight = np.diag(upper) ** np.float32(-2)
    scales = np.empty((len(values), left.shape[1] // block), np.float16)
    codes = np.empty_like(left)
    for begin in range(0, left.shape[1], block):
        end = begin + block
        errors = np.empty((len(left), block), np.float32)
        scale = _best_scales(left[:, begin:end], weight[begin:end])
        scales[:, begin // block] = scale
        for j in range(begin, end):
            codes[:, j] = _codes(left[:, j], scale)
            errors[:, j - begin] = (left[:, j] - scale * codes[:, j]) / upper[j, j]
            left[:, j + 1 : end] -= np.outer(errors[:, j - begin], upper[j, j + 1 : end])
        left[:, end:] -= errors @ upper[begin:end, end:]
    return scales, codes


def _best_scales(x: Floats, weight: Floats) -> Floats:
    """The fp16 scale of each row of x that errs least, with the columns' errors squared and weighted."""
    at = np.abs(x).argmax(1)
    extreme = x[np.arange(len(x)), at]
    if not (np.abs(extreme) < _LARGEST).all():
        raise ValueError("a weight is too large for the scale of Q4_0, or is not finite")
    best, least = np.zeros(len(x), np.float32), np.full(len(x), np.inf, np.float32)
    for bound in (-8, 7):
        for shrink in _SHRINK:
            codes = _codes(x, (shrink / np.float32(bound) * extreme)[:, None])
            weighted = codes * weight
            squares = np.einsum("ij,ij->i", weighted, codes)
            fit = np.einsum("ij,ij->i", weighted, x) / np.where(squares > 0, squares, 1)
            fit = fit.astype(np.float16).astype(np.float32)
            miss = x - fit[:, None] * codes
            error = np.einsum("ij,ij,j->i", miss, miss, weight)
            better = error < least
            best[better], least[better] = fit[better], error[better]
    return best


def _codes(x: Floats, scale: Floats) -> Floats:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    return np.clip(np.rint(x * inverse), -8, 7)


def _q4_0(scales: NDArray[np.float16], codes: Floats) -> NDArray[np.uint8]:
    """Blocks of an fp16 scale, then of bytes with the codes + 8 of columns i and i + 16."""
    nibbles = (codes + 8).astype(np.uint8).reshape(*scales.shape, 2, BLOCK // 2)
    low_and_high = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return np.concatenate([scales[..., None].view(np.uint8), low_and_high], -1).reshape(-1)
