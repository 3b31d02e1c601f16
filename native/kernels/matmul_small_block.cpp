// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: blocks of 32 columns with an fp16 scale, and an fp16 minimum in the _1 types.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

template <int bits_, int bias, bool has_min> struct SmallBlock {
    static constexpr int bits = bits_, block = 32, sub = 32, scale_bytes = has_min ? 64 : 32;
    static constexpr bool has_offset = has_min;
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

// The high six bits of Q8_0, the low two being taken for 1.5. In two halves, as the integer sums of AVX2 need with 6 bits.
struct Q8High {
    static constexpr int bits = 6, block = 32, sub = 16, scale_bytes = 32;
    static constexpr bool has_offset = true;
    using Dots = GMTP_ISA::Dots<6, 32>;

    template <int v> static Bytes codes(const uint8_t* planes) { return GMTP_ISA::codes<6, v>(planes); }
    static Affine affine(const uint8_t* scales, int64_t) {
        const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(scales));
        return {d * set1(4.0f), d * set1(1.5f)};  // d * (4 h + 1.5 - 128) = 4 d * (h - 32) + 1.5 d
    }
};

template <int v> void join_vector(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
    store_bytes(codes + 64 * v, shift_left<2>(GMTP_ISA::codes<6, v>(high)) | field<2, v, 0>(low));
}

}  // namespace

void join(const uint8_t* high, const uint8_t* low, int64_t cols, uint8_t* group) {
    const int64_t blocks = cols / kBlock, scales = (blocks * Q8High::scale_bytes + 63) / 64 * 64;
    memcpy(group, high, scales);
    high += scales, group += scales;
    for (int64_t b = 0; b < blocks; b++, high += 384, low += 128, group += 512) {
        join_vector<0>(high, low, group), join_vector<1>(high, low, group);
        join_vector<2>(high, low, group), join_vector<3>(high, low, group);
        join_vector<4>(high, low, group), join_vector<5>(high, low, group);
        join_vector<6>(high, low, group), join_vector<7>(high, low, group);
    }
}

MatmulFunction matmul_small_block(WeightType t) {
    switch (t) {
        case WeightType::Q4_0: return matmul<SmallBlock<4, 8, false>>;
        case WeightType::Q4_1: return matmul<SmallBlock<4, 0, true>>;
        case WeightType::Q5_0: return matmul<SmallBlock<5, 16, false>>;
        case WeightType::Q5_1: return matmul<SmallBlock<5, 16, true>>;
        case WeightType::Q8_HIGH: return matmul<Q8High>;
        case WeightType::Q8_0: return matmul<SmallBlock<8, 128, false>>;
        case WeightType::IQ4_NL: return matmul<Iq4Nl>;
        default: return nullptr;
    }
}

}  // namespace gmtp::GMTP_ISA
