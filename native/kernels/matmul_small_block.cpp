// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: blocks of 32 columns with an fp16 scale, and an fp16 minimum in the _1 types.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

template <int bits_, int bias, bool has_min> struct SmallBlock {
    static constexpr int bits = bits_, block = 32, sub = 32, scale_bytes = has_min ? 64 : 32;
    static constexpr bool has_offset = has_min, is_low_part = false;
    using Dots = GMTP_ISA::Dots<bits, bias>;

    template <int v> static Bytes codes(const uint8_t* planes) { return GMTP_ISA::codes<bits, v>(planes); }
    static Affine affine(const uint8_t* scales, int64_t) {
        const uint16_t* d = reinterpret_cast<const uint16_t*>(scales);
        const f32x16 scale = load_f16(d);
        if constexpr (!has_min) return {scale, zero()};
        // min + scale * code = (min + scale * bias) + scale * (code - bias)
        else return {scale, fma(scale, set1((float)bias), load_f16(d + kGroupRows))};
    }
};

struct Iq4Nl : SmallBlock<4, 0, false> {
    using Dots = GMTP_ISA::Dots<8, 128>;
    template <int v> static Bytes codes(const uint8_t* planes) { return look_up(kIq4Plus128, GMTP_ISA::codes<4, v>(planes)); }
};

// The two parts of Q8_0. Groups of the low one are read here and there, so their reader fetches them ahead.
struct Q8High : SmallBlock<6, 32, false> {
    static constexpr bool has_offset = true;
    static Affine affine(const uint8_t* scales, int64_t) {
        const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(scales));
        return {d * set1(4.0f), d * set1(1.5f)};  // d * (4 h + 1.5 - 128) = 4 d * (h - 32) + 1.5 d
    }
};

struct Q8Low : SmallBlock<2, 0, false> {
    static constexpr bool has_offset = true, is_low_part = true;
    static Affine affine(const uint8_t* scales, int64_t) {
        const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(scales));
        return {d, d * set1(-1.5f)};
    }
};

// One group of both parts, the very sums that each gives by itself: in one walk, so that the memory never waits.
template <int T> void tile_of_both(const Group& high, const Group& low, int64_t blocks, const QuantBlock* a, int64_t stride,
                                   float* out, int64_t out_stride) {
    const uint8_t *planes = high.planes, *low_planes = low.planes, *scales = high.scales, *ahead = high.ahead, *low_ahead = low.ahead;
    f32x16 acc[T], low_acc[T], sums[T];
    for (int t = 0; t < T; t++) acc[t] = low_acc[t] = zero();
    for (int64_t b = 0; b < blocks; b++, a++, scales += 32, planes += 384, low_planes += 128, ahead += 416, low_ahead += 128) {
#pragma GCC unroll 8
        for (int line = 0; line < 416; line += 64) __builtin_prefetch(ahead + line, 0, kSecondLevel);
        __builtin_prefetch(low_ahead, 0, kSecondLevel), __builtin_prefetch(low_ahead + 64, 0, kSecondLevel);
        add_dots<Q8High, Span::All32, T>(planes, Q8High::affine(scales, 0), a, stride, sums);
        for (int t = 0; t < T; t++) acc[t] = fma(sums[t], set1(a[t * stride].scale), acc[t]);
        add_dots<Q8Low, Span::All32, T>(low_planes, Q8Low::affine(scales, 0), a, stride, sums);
        for (int t = 0; t < T; t++) low_acc[t] = fma(sums[t], set1(a[t * stride].scale), low_acc[t]);
    }
    for (int t = 0; t < T; t++) store(out + t * out_stride, acc[t] + low_acc[t]);
}

}  // namespace

void matmul_both(const Matrix& high, const Matrix& low, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                 float* out, int64_t out_stride) {
    const int64_t blocks = high.cols / kBlock, stride = x.stride / kBlock, scales = (blocks * 32 + 63) / 64 * 64;
    const int64_t high_bytes = (int64_t)group_bytes(high.type, high.cols), low_bytes = (int64_t)group_bytes(low.type, low.cols);
    for (int64_t g = group0; g < group1; g++) {
        const uint8_t *of_high = high.data + g * high_bytes, *of_low = low.data + g * low_bytes;
        const Group h{of_high, of_high + scales, of_high + scales + kPrefetchBytes}, l{of_high, of_low, of_low + low_bytes};
        for (int row = row0; row < row1; row += 4) {
            const QuantBlock* a = x.q + row * stride;
            float* to = out + row * out_stride + g * kGroupRows;
            switch (row1 - row) {
                case 1: tile_of_both<1>(h, l, blocks, a, stride, to, out_stride); break;
                case 2: tile_of_both<2>(h, l, blocks, a, stride, to, out_stride); break;
                case 3: tile_of_both<3>(h, l, blocks, a, stride, to, out_stride); break;
                default: tile_of_both<4>(h, l, blocks, a, stride, to, out_stride);
            }
        }
    }
}

MatmulFunction matmul_small_block(WeightType t) {
    switch (t) {
        case WeightType::Q4_0: return matmul<SmallBlock<4, 8, false>>;
        case WeightType::Q4_1: return matmul<SmallBlock<4, 0, true>>;
        case WeightType::Q5_0: return matmul<SmallBlock<5, 16, false>>;
        case WeightType::Q5_1: return matmul<SmallBlock<5, 16, true>>;
        case WeightType::Q8_HIGH: return matmul<Q8High>;
        case WeightType::Q8_LOW: return matmul<Q8Low>;
        case WeightType::Q8_0: return matmul<SmallBlock<8, 128, false>>;
        case WeightType::IQ4_NL: return matmul<Iq4Nl>;
        default: return nullptr;
    }
}

}  // namespace gmtp::GMTP_ISA
