"""Error-compensated rounding: ordinary Q4_0 bytes whose products err less on inputs like the calibration's."""

import numpy as np
import pytest

from gemma_mtp import _native
from gemma_mtp.checkpoints.rounding import compensation, quantize_compensated

ROWS, COLS = 48, 128


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """Correlated, as a model's are, and larger in some columns: float64 [2000, COLS]."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2000, COLS)) @ (rng.standard_normal((COLS, COLS)) * np.exp(rng.standard_normal(COLS)))


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((ROWS, COLS)) / 10).astype(np.float32)


def values(data: np.ndarray) -> np.ndarray:
    return _native.dequantize("Q4_0", data, ROWS * COLS).reshape(ROWS, COLS)


def test_products_err_less_than_with_each_weight_rounded_alone(inputs: np.ndarray, weights: np.ndarray) -> None:
    alone = values(_native.quantize_weights("Q4_0", weights))
    together = values(quantize_compensated(weights, [compensation(inputs.T @ inputs)]))
    errors = [np.square(inputs @ (found - weights).T).mean() for found in (together, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_spans_are_rounded_each_on_its_own(inputs: np.ndarray, weights: np.ndarray) -> None:
    moments, half = inputs.T @ inputs, COLS // 2
    factors = [compensation(moments[:half, :half]), compensation(moments[half:, half:])]
    both = quantize_compensated(weights, factors).reshape(ROWS, -1)
    for part, factor in zip(np.hsplit(weights, 2), factors, strict=True):
        alone = quantize_compensated(part, [factor]).reshape(ROWS, -1)
        assert np.array_equal(both[:, : alone.shape[1]], alone)
        both = both[:, alone.shape[1] :]


def test_what_q4_0_holds_exactly_is_kept(inputs: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(-7, 8, (ROWS, COLS))
    codes[:, ::32] = -8  # the largest of each block
    exact = (codes * np.repeat(rng.integers(1, 9, (ROWS, COLS // 32)) / 64, 32, 1)).astype(np.float32)
    assert np.array_equal(values(quantize_compensated(exact, [compensation(inputs.T @ inputs)])), exact)


def test_zeros_and_inputs_that_never_occur_do_no_harm(weights: np.ndarray) -> None:
    assert not values(quantize_compensated(np.zeros_like(weights), [compensation(np.zeros((COLS, COLS)))])).any()
    found = values(quantize_compensated(weights, [compensation(np.zeros((COLS, COLS)))]))
    assert np.abs(found - weights).max() < 0.05


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e9])
def test_values_without_a_finite_scale_are_refused(weights: np.ndarray, value: float) -> None:
    broken = weights.copy()
    broken[3, 5] = value
    with pytest.raises(ValueError, match=r"too large for the scale of Q4_0, or is not finite"):
        quantize_compensated(broken, [compensation(np.eye(COLS))])
