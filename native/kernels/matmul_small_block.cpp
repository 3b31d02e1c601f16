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

}  // namespace

MatmulFunction matmul_small_block(WeightType t) {
    switch (t) {
        case WeightType::Q4_0: return matmul<SmallBlock<4, 8, false>>;
        case WeightType::Q4_1: return matmul<SmallBlock<4, 0, true>>;
        case WeightType::Q5_0: return matmul<SmallBlock<5, 16, false>>;
        case WeightType::Q5_1: return matmul<SmallBlock<5, 16, true>>;
        case WeightType::Q8_0: return matmul<SmallBlock<8, 128, false>>;
        case WeightType::IQ4_NL: return matmul<Iq4Nl>;
        default: return nullptr;
    }
}

}  // namespace gmtp::GMTP_ISA
