// The matmul table of a build: picks the kernel of a weight type, and quantises activations.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

void matmul_any(const Matrix& w, int64_t group0, int64_t group1, const Activations& x, int row0, int row1, float* out,
                int64_t out_stride) {
    MatmulFunction f = matmul_float(w.type);
    if (!f) f = matmul_small_block(w.type);
    if (!f) f = matmul_super_block(w.type);
    if (!f) f = matmul_split(w.type);
    f(w, group0, group1, x, row0, row1, out, out_stride);
}

// Rounds x0, x1 to multiples of scale, as whole numbers of at most 127.
void round_block(f32x16 x0, f32x16 x1, float inverse, float scale, QuantBlock& out) {
    store_bytes(out.q, to_int(x0 * set1(inverse)));
    store_bytes(out.q + 16, to_int(x1 * set1(inverse)));
    out.scale = scale;
    sum_block(out);
}

// What is left of 16 values once their multiples of scale are taken away.
f32x16 remainder(f32x16 x, const int8_t* q, float scale) { return fma(to_float(load_i8((const uint8_t*)q)), set1(-scale), x); }

// Quantises 32 values into out and, if there is a second digit, what that leaves over into `rest`.
void quantize_block(const float* x, QuantBlock& out, QuantBlock* rest) {
    const f32x16 x0 = load(x), x1 = load(x + 16);
    const f32x16 a0 = abs(x0), a1 = abs(x1), infinity = set1(__builtin_inff()), one = set1(1.0f);
    const bool finite = !any_greater(where_less(a0, infinity, zero(), one) + where_less(a1, infinity, zero(), one), zero());
    const float largest = max_lane(max(a0, a1));
    memset(&out, 0, sizeof out);
    if (rest) memset(rest, 0, sizeof *rest);
    if (!finite) {
        out.scale = __builtin_nanf("");
        return;
    }
    if (largest < 0x1p-100f) return;  // zero, or so small that 127 / largest might overflow
    const float scale = largest / 127.0f;
    round_block(x0, x1, 127.0f / largest, scale, out);
    if (!rest) return;
    // A remainder is at most scale / 2, so 254 steps to a scale use the whole of int8.
    round_block(remainder(x0, out.q, scale), remainder(x1, out.q + 16, scale), 254.0f / scale, scale / 254.0f, *rest);
}

void quantize(const Activations& x, int64_t row, int64_t col0, int64_t col1) {
    const float* from = x.x + row * x.stride;
    const int64_t blocks = x.stride / kBlock;
    QuantBlock* to = x.q + row * x.digits * blocks;
    for (int64_t b = col0 / kBlock; b < col1 / kBlock; b++)
        quantize_block(from + b * kBlock, to[b], x.digits == 2 ? to + blocks + b : nullptr);
}

}  // namespace

extern const MatmulKernels matmul_kernels = {matmul_any, matmul_both, low_part, quantize};

}  // namespace gmtp::GMTP_ISA
