// Q2_K to Q6_K and IQ4_XS: blocks of 256 columns with fp16 scales and, in bytes, a scale for each 32 or 16 columns.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

template <int bits_, int sub_, int scale_bytes_, bool has_min> struct SuperBlock {
    static constexpr int bits = bits_, block = 256, sub = sub_, scale_bytes = scale_bytes_;
    static constexpr bool has_offset = has_min;
    template <int v> static Bytes codes(const uint8_t* planes) { return GMTP_ISA::codes<bits, v>(planes); }
};

inline const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

// d[16], then signed scales.
template <int bits, int sub, int scale_bytes, int bias> struct Symmetric : SuperBlock<bits, sub, scale_bytes, false> {
    using Dots = GMTP_ISA::Dots<bits, bias>;
    static Affine affine(const uint8_t* scales, int64_t j) {
        return {load_f16(halves(scales)) * to_float(load_i8(scales + 32 + 16 * j)), zero()};
    }
};

// d[16], min[16], then a scale and a minimum for each 32 columns.
template <int bits, int bias> struct WithMinimum : SuperBlock<bits, 32, 320, true> {
    using Dots = GMTP_ISA::Dots<bits, bias>;
    static Affine affine(const uint8_t* scales, int64_t j) {
        const f32x16 scale = load_f16(halves(scales)) * to_float(load_u8(scales + 64 + 32 * j));
        const f32x16 min = load_f16(halves(scales + 32)) * to_float(load_u8(scales + 80 + 32 * j));
        // scale * code - min = scale * (code - bias) + (scale * bias - min)
        return {scale, fma(scale, set1((float)bias), zero() - min)};
    }
};

// d[16], min[16], then for each 16 columns a byte of scale (low nibble) and minimum (high).
struct Q2K : SuperBlock<2, 16, 320, true> {
    using Dots = GMTP_ISA::Dots<2, 0>;
    static Affine affine(const uint8_t* scales, int64_t j) {
        const i32x16 both = load_u8(scales + 64 + 16 * j);
        const f32x16 min = load_f16(halves(scales + 32)) * to_float(shr<4>(both));
        return {load_f16(halves(scales)) * to_float(both & set1((int32_t)15)), zero() - min};
    }
};

struct Iq4Xs : Symmetric<4, 32, 160, 0> {
    using Dots = GMTP_ISA::Dots<8, 128>;
    template <int v> static Bytes codes(const uint8_t* planes) { return look_up(kIq4Plus128, GMTP_ISA::codes<4, v>(planes)); }
};

}  // namespace

MatmulFunction matmul_super_block(WeightType t) {
    switch (t) {
        case WeightType::Q2_K: return matmul<Q2K>;
        case WeightType::Q3_K: return matmul<Symmetric<3, 16, 288, 4>>;
        case WeightType::Q4_K: return matmul<WithMinimum<4, 0>>;
        case WeightType::Q5_K: return matmul<WithMinimum<5, 16>>;
        case WeightType::Q6_K: return matmul<Symmetric<6, 16, 288, 32>>;
        case WeightType::IQ4_XS: return matmul<Iq4Xs>;
        default: return nullptr;
    }
}

}  // namespace gmtp::GMTP_ISA
