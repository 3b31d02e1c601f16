"""float32 weights to GGUF blocks: the plain types as the gguf package makes them, the K-quants by their error."""

import gguf
import numpy as np
import pytest
from gguf.quants import quantize as reference_quantize

from gemma_mtp import _native

PLAIN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_QUANTS = ["Q4_K", "Q6_K"]


def rows_of(kind: str, rows: int = 64, cols: int = 1024, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        values = rng.standard_normal((rows, cols))
    elif kind == "heavy-tailed":
        values = rng.standard_t(4, (rows, cols))
    else:  # rows of very different sizes, some all positive, with zeros, constants and single spikes among them
        values = rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-6, 4, (rows, 1))
        values[1] = np.abs(values[1]) + 1
        values[2] = 0
        values[3] = -0.75
        values[4, 1:] = 0
        values[5, ::7] *= 100
    return (values * 0.02).astype(np.float32)


def error(weight_type: str, x: np.ndarray) -> float:
    """Root mean square of what a type loses, over that of the values."""
    blocks = _native.quantize_weights(weight_type, x)
    back = _native.dequantize(weight_type, blocks, x.size).reshape(x.shape)
    return float(np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)))


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "odd"])
@pytest.mark.parametrize("weight_type", PLAIN)
def test_plain_types_equal_those_of_the_gguf_package(weight_type: str, kind: str) -> None:
    x = rows_of(kind)
    expected = reference_quantize(x, gguf.GGMLQuantizationType[weight_type])
    expected = np.ascontiguousarray(expected).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(_native.quantize_weights(weight_type, x), expected)


@pytest.mark.parametrize("weight_type", ["F16", "BF16"])
def test_every_kind_of_float_is_rounded_to_nearest_even(weight_type: str) -> None:
    """Ties, subnormals, and the last values before infinity."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, np.nextafter(halves, np.float32(9e9))])
    x = np.concatenate([x, -x])[None, :]
    expected = reference_quantize(x, gguf.GGMLQuantizationType[weight_type])
    expected = np.ascontiguousarray(expected).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(_native.quantize_weights(weight_type, x), expected)


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
@pytest.mark.parametrize(("weight_type", "worse"), [("Q4_K", "Q4_0"), ("Q6_K", "Q5_0")])
def test_k_quants_lose_less_than_the_plain_type_of_their_size(weight_type: str, worse: str, kind: str) -> None:
    x = rows_of(kind, rows=128)
    ours, theirs = error(weight_type, x), error(worse, x)
    print(f"\n{kind}: {weight_type} {ours:.5f}, {worse} {theirs:.5f}")
    assert ours < {"Q4_K": 0.87, "Q6_K": 0.42}[weight_type] * theirs


@pytest.mark.parametrize("weight_type", K_QUANTS)
def test_k_quants_of_odd_rows_stay_close(weight_type: str) -> None:
    """Off by at most one step of the codes for the super-block's widest sub-block, whatever the row looks like."""
    x = rows_of("odd")
    back = _native.dequantize(weight_type, _native.quantize_weights(weight_type, x), x.size).reshape(-1, 256)
    blocks = x.reshape(-1, 256)
    width = blocks.max(axis=1, initial=0) - blocks.min(axis=1, initial=0)
    steps, largest = {"Q4_K": (15, 63 * 15), "Q6_K": (31, 128 * 32)}[weight_type]
    bound = width / steps + 2.0**-24 * largest  # what the smallest fp16 scale cannot tell apart
    assert np.all(np.abs(back - blocks).max(axis=1) <= bound)


@pytest.mark.parametrize("weight_type", K_QUANTS)
def test_values_that_a_k_quant_can_hold_come_back(weight_type: str) -> None:
    """Requantising what was quantised loses next to nothing."""
    x = rows_of("gaussian")
    once = _native.dequantize(weight_type, _native.quantize_weights(weight_type, x), x.size).reshape(x.shape)
    assert error(weight_type, once) < 0.2 * error(weight_type, x)


@pytest.mark.parametrize("weight_type", PLAIN + K_QUANTS)
def test_threads_and_neighbouring_rows_change_nothing(weight_type: str) -> None:
    x = rows_of("odd", rows=100, cols=512)
    whole = _native.quantize_weights(weight_type, x)
    np.testing.assert_array_equal(_native.quantize_weights(weight_type, x, _native.ThreadPool(3)), whole)
    one_by_one = [_native.quantize_weights(weight_type, x[i : i + 1]) for i in range(100)]
    np.testing.assert_array_equal(np.concatenate(one_by_one), whole)


@pytest.mark.parametrize("weight_type", PLAIN + K_QUANTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(weight_type: str, bad: float) -> None:
    x = rows_of("gaussian", rows=40)
    x[33, 700] = bad
    for pool in (None, _native.ThreadPool(2)):
        with pytest.raises(_native.InputError, match="a weight is not a finite number"):
            _native.quantize_weights(weight_type, x, pool)


@pytest.mark.parametrize("weight_type", [kind for kind in PLAIN if kind != "F32"] + K_QUANTS)
def test_a_value_beyond_the_range_of_a_type_is_refused(weight_type: str) -> None:
    x = np.full((1, 256), 3.4e38, np.float32)
    with pytest.raises(_native.InputError, match="a weight is too large for the type"):
        _native.quantize_weights(weight_type, x)


def test_other_types_and_widths_are_refused() -> None:
    with pytest.raises(_native.InputError, match="cannot be converted to this type"):
        _native.quantize_weights("IQ4_XS", rows_of("gaussian"))
    with pytest.raises(_native.InputError, match="multiple of 256"):
        _native.quantize_weights("Q4_K", np.zeros((2, 288), np.float32))


@pytest.mark.parametrize(("source", "target"), [("F32", "Q8_0"), ("BF16", "Q4_K"), ("Q6_K", "Q4_0"), ("Q8_0", "Q8_0")])
def test_packing_as_another_type_equals_converting_first(source: str, target: str) -> None:
    x, pool = rows_of("gaussian", rows=37, cols=512), _native.ThreadPool(2)
    data = _native.quantize_weights(source, x)
    values = _native.dequantize(source, data, x.size).reshape(x.shape)
    expected = data if source == target else _native.quantize_weights(target, values)
    done: list[tuple[int, int]] = []
    weight = _native.Weight.convert(source, target, data, 37, 512, pool, lambda *span: done.append(span))
    assert (weight.type, weight.rows, weight.cols) == (target, 37, 512)
    assert done == [(0, data.size)]
    exact = _native.dequantize(target, expected, x.size).reshape(x.shape)
    np.testing.assert_array_equal(weight.unpack_rows(0, 37), exact)
