// Norms, activations, rotations: everything between the matrix products but attention.
#include "gmtp/layers.h"

#include "attention.h"
#include "dot-inl.h"
#include "gmtp/simd.h"

namespace gmtp::GMTP_ISA {
namespace {

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    f32x16 squares = zero();
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load(x + i);
        squares = fma(v, v, squares);
    }
    f32x16 factor = set1(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load(x + i) * factor;
        store(out + i, weight ? v * load(weight + i) : v);
    }
}

void add_scaled(const float* y, float scale, int64_t n, float* out) {
    f32x16 s = set1(scale);
    for (int64_t i = 0; i < n; i += 16) store(out + i, (load(out + i) + load(y + i)) * s);
}

void gated_gelu(const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) store(out + i, gelu(load(gate + i)) * load(up + i));
}

void softcap(float* x, int64_t n, float cap) {
    f32x16 c = set1(cap), inverse = set1(1.0f / cap);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load(x + i);
        store(x + i, c * tanh(v * inverse) + (v - v));  // what is no number stays none, and is found out
    }
}

void scale(float* x, int64_t n, float factor) {
    f32x16 s = set1(factor);
    for (int64_t i = 0; i < n; i += 16) store(x + i, load(x + i) * s);
}

void add_product(const float* x, float factor, int64_t n, float* out) {
    f32x16 s = set1(factor);
    for (int64_t i = 0; i < n; i += 16) store(out + i, fma(load(x + i), s, load(out + i)));
}

void rotate(float* head, int64_t dim, int64_t pairs, const float* cos, const float* sin) {
    float* other = head + dim / 2;
    for (int64_t i = 0; i < pairs; i += 16) {
        f32x16 a = load(head + i), b = load(other + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(other + i, b * c + a * s);
    }
}

void softmax(float* x, int64_t n) {
    float peak = x[0];
    for (int64_t i = 1; i < n; i++) peak = x[i] > peak ? x[i] : peak;
    float total = 0;
    for (int64_t i = 0; i < n; i += 16) {
        float lanes[16];
        int64_t count = n - i < 16 ? n - i : 16;
        for (int64_t j = 0; j < count; j++) lanes[j] = x[i + j];
        for (int64_t j = count; j < 16; j++) lanes[j] = peak;
        store(lanes, exp(load(lanes) - set1(peak)));
        for (int64_t j = 0; j < count; j++) x[i + j] = lanes[j], total += lanes[j];
    }
    for (int64_t i = 0; i < n; i++) x[i] /= total;
}

void bounds(const float* x, const float* error, float norm, int64_t n, float* lower, float* largest_lower,
            float* largest_upper) {
    const f32x16 factor = set1(norm), minus = set1(-norm);
    f32x16 low = set1(-__builtin_inff()), high = low;
    for (int64_t i = 0; i < n; i += 16) {
        const f32x16 e = load(error + i), at = load(x + i);
        low = max(low, fma(e, minus, at)), high = max(high, fma(e, factor, at));
    }
    store(lower, low);
    *largest_lower = max_lane(low), *largest_upper = max_lane(high);
}

void reaching(const float* x, const float* error, float norm, float threshold, int64_t n, uint16_t* reaches) {
    f32x16 factor = set1(norm), below = set1(__builtin_nextafterf(threshold, -__builtin_inff()));
    for (int64_t i = 0; i < n; i += 16) reaches[i / 16] = greater(fma(load(error + i), factor, load(x + i)), below);
}

void upper_by_blocks(const float* x, const float* error, const uint8_t* shares, const float* norms, int64_t blocks, float* upper) {
    f32x16 even = zero(), odd = zero();
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
        even = fma(to_float(load_u8(shares + 16 * b)), set1(norms[b]), even);
        odd = fma(to_float(load_u8(shares + 16 * b + 16)), set1(norms[b + 1]), odd);
    }
    if (b < blocks) even = fma(to_float(load_u8(shares + 16 * b)), set1(norms[b]), even);
    store(upper, fma(load(error), even + odd, load(x)));
}

}  // namespace

extern const LayerKernels layer_kernels;
const LayerKernels layer_kernels = {
    .rms_norm = rms_norm,
    .add_scaled = add_scaled,
    .gated_gelu = gated_gelu,
    .softcap = softcap,
    .scale = scale,
    .add_product = add_product,
    .rotate = rotate,
    .softmax = softmax,
    .bounds = bounds,
    .reaching = reaching,
    .upper_by_blocks = upper_by_blocks,
    .store_key = store_key,
    .store_value = store_value,
    .attend_chunk = attend_chunk,
    .merge = merge,
};

}  // namespace gmtp::GMTP_ISA
