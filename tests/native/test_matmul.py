"""Weight matrices and matmul kernels: exact values, one result on every build, however the work is cut."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as reference_dequantize

from gemma_mtp import _native

ISAS = _native.isas()
TYPES = list(_native.WEIGHT_TYPES)
FLOATS = ["F32", "F16", "BF16"]
QUANTISED = [t for t in TYPES if t not in FLOATS]
# Where the fp16 scales lie in a file's block, to keep random bytes from being infinities.
SCALE_OFFSETS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def block_sizes(weight_type: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weight_type]]


def columns(weight_type: str) -> int:
    """A width with an odd number of blocks, and for floats one that is no multiple of four."""
    return 77 if weight_type in FLOATS else 3 * 256 if block_sizes(weight_type)[0] == 256 else 256 + 5 * 32


def random_tensor(weight_type: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """The bytes of a GGUF tensor: every code, small scale and small minimum is possible."""
    rng = np.random.default_rng(seed)
    if weight_type == "F32":
        return rng.standard_normal(rows * cols).astype(np.float32).view(np.uint8)
    if weight_type == "F16":
        return rng.standard_normal(rows * cols).astype(np.float16).view(np.uint8)
    if weight_type == "BF16":
        return (
            (rng.standard_normal(rows * cols).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        )
    width, size = block_sizes(weight_type)
    blocks = rng.integers(0, 256, (rows * cols // width, size), dtype=np.uint8)
    for offset in SCALE_OFFSETS[weight_type]:
        scales = (rng.standard_normal(len(blocks)) * 0.05).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def reference(weight_type: str, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    values = reference_dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[weight_type])
    return np.asarray(values, dtype=np.float32).reshape(rows, cols)


def packed(weight_type: str, rows: int = 35, seed: int = 0):
    cols = columns(weight_type)
    return _native.pack(weight_type, random_tensor(weight_type, rows, cols, seed), rows, cols)


def activations(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    """Rows of very different sizes, with an outlier and a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    x[:, 3] *= 100
    x[:, 32:64] = 0
    return x.astype(np.float32)


def bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(np.uint32)


@pytest.mark.parametrize("weight_type", TYPES)
def test_values_equal_those_of_the_gguf_package(weight_type):
    rows, cols = 37, columns(weight_type)
    data = random_tensor(weight_type, rows, cols)
    expected = reference(weight_type, data, rows, cols)
    np.testing.assert_array_equal(_native.dequantize(weight_type, data, rows * cols).reshape(rows, cols), expected)
    matrix = _native.pack(weight_type, data, rows, cols)
    np.testing.assert_array_equal(matrix.unpack_rows(0, rows), expected)


@pytest.mark.parametrize("weight_type", FLOATS)
@pytest.mark.parametrize("cols", [1, 2, 3, 4, 5, 31, 32, 33])
@pytest.mark.parametrize("isa", ISAS)
def test_float_weights_of_any_width(weight_type, cols, isa):
    rows = 17
    data = random_tensor(weight_type, rows, cols)
    w = reference(weight_type, data, rows, cols)
    x = activations(3, max(cols, 4))[:, :cols].copy()
    out = _native.matmul(_native.pack(weight_type, data, rows, cols), x, isa)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    bound = cols * 2.0**-23 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)) + 1e-30
    assert np.all(np.abs(out[:, :rows] - exact) <= bound)
    assert np.all(out[:, rows:] == 0)


@pytest.mark.parametrize("weight_type", QUANTISED)
@pytest.mark.parametrize("isa", ISAS)
def test_quantised_weights_against_float64(weight_type, isa):
    """Integer dots are exact, so only the float steps of a block can err: a few roundings of each block's product."""
    rows, cols = 35, columns(weight_type)
    data = random_tensor(weight_type, rows, cols)
    w = reference(weight_type, data, rows, cols).astype(np.float64)
    x = activations(5, cols)
    q, scale, _ = _native.quantize(x, isa)
    rounded = q.astype(np.float64) * np.repeat(scale, 32, axis=1)
    out = _native.matmul(_native.pack(weight_type, data, rows, cols), x, isa)
    # Codes are used unsigned, so terms are as large as the block's largest weight, counted from either end.
    largest = np.repeat(np.abs(w).reshape(rows, -1, 32).max(axis=2), 32, axis=1)
    bound = (cols // 32 + 8) * 2.0**-23 * 4 * (np.abs(rounded) @ largest.T) + 1e-30
    assert np.all(np.abs(out[:, :rows] - rounded @ w.T) <= bound)
    assert np.all(out[:, rows:] == 0)


@pytest.mark.parametrize("weight_type", QUANTISED)
@pytest.mark.parametrize("isa", ISAS)
def test_a_second_digit_keeps_what_rounding_leaves_over(weight_type, isa):
    """What is then left is at most half a step of the second digit, 1 / 508 of the first's, for every activation."""
    rows, cols = 35, columns(weight_type)
    data = random_tensor(weight_type, rows, cols)
    w = reference(weight_type, data, rows, cols).astype(np.float64)
    x = activations(5, cols)
    _, scale, _ = _native.quantize(x, isa)
    out = _native.matmul(_native.pack(weight_type, data, rows, cols), x, isa, digits=2)
    left_over = np.repeat(scale.astype(np.float64), 32, axis=1) / 508 @ np.abs(w).T
    largest = np.repeat(np.abs(w).reshape(rows, -1, 32).max(axis=2), 32, axis=1)
    steps = (cols // 32 + 8) * 2.0**-23 * 4 * (np.abs(x).astype(np.float64) @ largest.T) + 1e-30
    assert np.all(np.abs(out[:, :rows] - x.astype(np.float64) @ w.T) <= 1.01 * left_over + steps)


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("digits", [1, 2])
def test_every_build_gives_the_same_bits(weight_type, digits):
    matrix = packed(weight_type)
    x = activations(17, matrix.cols)
    expected = bits(_native.matmul(matrix, x, "portable", digits=digits))
    for isa in ISAS:
        np.testing.assert_array_equal(bits(_native.matmul(matrix, x, isa, digits=digits)), expected, err_msg=isa)


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("digits", [1, 2])
def test_a_row_does_not_depend_on_its_batch(weight_type, isa, digits):
    matrix = packed(weight_type)
    x = activations(17, matrix.cols)
    alone = np.concatenate([_native.matmul(matrix, x[t : t + 1].copy(), isa, digits=digits) for t in range(17)])
    for rows in range(2, 18):
        out = _native.matmul(matrix, x[:rows].copy(), isa, digits=digits)
        np.testing.assert_array_equal(bits(out), bits(alone[:rows]))


@pytest.mark.parametrize("weight_type", QUANTISED)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("digits", [1, 2])
def test_nor_on_a_batch_so_long_and_rows_so_wide_that_codes_are_unpacked_in_parts(weight_type, isa, digits):
    rows, cols = 16, 4352
    matrix = _native.pack(weight_type, random_tensor(weight_type, rows, cols), rows, cols)
    x = activations(101, cols)
    together = _native.matmul(matrix, x, isa, digits=digits)
    for t in (0, 1, 47, 48, 95, 96, 100):
        alone = _native.matmul(matrix, x[t : t + 1].copy(), isa, digits=digits)
        np.testing.assert_array_equal(bits(together[t : t + 1]), bits(alone))


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_groups_can_be_cut_anyhow(weight_type, isa):
    matrix = packed(weight_type, rows=80)
    x = activations(3, matrix.cols)
    whole = _native.matmul(matrix, x, isa)
    for begin, end in [(0, 1), (1, 3), (4, 5), (2, 2), (0, 5)]:
        part = _native.matmul(matrix, x, isa, begin, end)
        np.testing.assert_array_equal(bits(part[:, 16 * begin : 16 * end]), bits(whole[:, 16 * begin : 16 * end]))


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("digits", [1, 2])
def test_rows_can_be_cut_anyhow(weight_type, isa, digits):
    matrix = packed(weight_type)
    x = activations(11, matrix.cols)
    whole = _native.matmul(matrix, x, isa, digits=digits)
    for begin, end in [(0, 1), (1, 8), (2, 11), (10, 11), (4, 4)]:
        part = _native.matmul(matrix, x, isa, row0=begin, row1=end, digits=digits)
        expected = np.zeros_like(whole)
        expected[begin:end] = whole[begin:end]
        np.testing.assert_array_equal(bits(part), bits(expected))


@pytest.mark.parametrize("weight_type", QUANTISED)
def test_extreme_codes_and_activations_do_not_saturate(weight_type):
    """All codes at either end against all activations at +-127: the largest integer sums there are."""
    cols = columns(weight_type)
    width, size = block_sizes(weight_type)
    x = np.ones((4, cols), dtype=np.float32)
    x[1] = -1
    x[2, ::2] = -1
    x[3, (np.arange(cols) // 2) % 2 == 0] = -1
    for fill in (0x00, 0xFF, 0x80, 0x7F, 0x88, 0xF0):
        blocks = np.full((16 * cols // width, size), fill, dtype=np.uint8)
        for offset in SCALE_OFFSETS[weight_type]:
            blocks[:, offset : offset + 2] = np.array([1.0], dtype=np.float16).view(np.uint8)
        w = reference(weight_type, blocks.reshape(-1), 16, cols).astype(np.float64)
        matrix = _native.pack(weight_type, blocks.reshape(-1), 16, cols)
        for isa in ISAS:
            out = _native.matmul(matrix, x, isa)
            np.testing.assert_allclose(out, x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-4 * np.abs(w).max() * cols)


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_rounds_to_nearest_even_within_127(isa):
    x = activations(9, 96)
    q, scale, sums = _native.quantize(x, isa)
    largest = np.abs(x).reshape(9, 3, 32).max(axis=2)
    np.testing.assert_array_equal(scale, largest / np.float32(127))
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    np.testing.assert_array_equal(q, np.rint(x * np.repeat(inverse, 32, axis=1)))
    np.testing.assert_array_equal(sums, q.reshape(9, 3, 32).sum(axis=2))
    assert np.abs(q).max() == 127


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_spoils_its_row_only(isa, bad):
    matrix = packed("Q4_K")
    x = activations(3, matrix.cols)
    good = _native.matmul(matrix, x, isa)
    x[1, 40] = bad
    out = _native.matmul(matrix, x, isa)
    assert np.isnan(out[1, : matrix.rows]).all()
    np.testing.assert_array_equal(bits(out[[0, 2]]), bits(good[[0, 2]]))


@pytest.mark.parametrize("isa", ISAS)
def test_the_smallest_activations_count_as_zero(isa):
    q, scale, sums = _native.quantize(np.full((1, 32), 1e-42, dtype=np.float32), isa)
    assert not np.concatenate([q, scale, sums], axis=1).any()


@pytest.mark.parametrize("weight_type", ["Q4_0", "Q6_K"])
def test_a_width_that_is_no_multiple_of_the_block_is_an_error(weight_type):
    with pytest.raises(RuntimeError, match="multiple of"):
        _native.pack(weight_type, np.zeros(100, dtype=np.uint8), 1, 33)


def test_an_unknown_build_is_an_error():
    with pytest.raises(RuntimeError, match="choose one of auto"):
        _native.quantize(np.zeros((1, 32), dtype=np.float32), "abacus")
