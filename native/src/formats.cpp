#include "formats.h"

#include <array>
#include <cstring>

#include "gmtp/error.h"

namespace gmtp {
namespace {

// IQ4_NL and IQ4_XS: the 16 values a code stands for.
constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// kFifthBits[byte] has 16 in place i where bit i of `byte` is set: the fifth bits of eight codes at once.
constexpr auto kFifthBits = [] {
    std::array<std::array<uint8_t, 8>, 256> t{};
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0; i < 8; i++) t[byte][i] = (uint8_t)((byte >> i & 1) << 4);
    return t;
}();

uint16_t u16(const uint8_t* p) { return (uint16_t)(p[0] | p[1] << 8); }

// 2 * n nibbles: the low ones are the first n codes, the high ones the next n.
template <int n> void nibbles(const uint8_t* q, uint8_t* codes) {
    for (int i = 0; i < n; i++) codes[i] = q[i] & 15;
    for (int i = 0; i < n; i++) codes[n + i] = q[i] >> 4;
}

void add_fifth_bits(const uint8_t* bits, uint8_t* codes) {
    for (int k = 0; k < 4; k++) {
        uint64_t eight, fifths;
        memcpy(&eight, codes + 8 * k, 8);
        memcpy(&fifths, kFifthBits[bits[k]].data(), 8);
        eight |= fifths;
        memcpy(codes + 8 * k, &eight, 8);
    }
}

// Four 2-bit fields a byte, each field 32 codes: the order of Q2_K and Q3_K.
void crumbs(const uint8_t* q, uint8_t* codes) {
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 32; i++) codes[128 * half + 32 * k + i] = q[32 * half + i] >> 2 * k & 3;
}

// Eight 6-bit scales and eight 6-bit minima in 12 bytes (Q4_K, Q5_K).
void scales_and_mins(const uint8_t* p, BlockScales& s) {
    for (int j = 0; j < 4; j++) {
        s.small[j] = p[j] & 63;
        s.small_min[j] = p[j + 4] & 63;
        s.small[j + 4] = (uint8_t)((p[j + 8] & 15) | p[j] >> 6 << 4);
        s.small_min[j + 4] = (uint8_t)(p[j + 8] >> 4 | p[j + 4] >> 6 << 4);
    }
}

}  // namespace

const Format& format(WeightType t) {
    //                                block bytes bits bias sub  min  scales mins
    static constexpr Format q4_0   = {32,  18,  4, 8,   32, false, 0,  0};
    static constexpr Format q4_1   = {32,  20,  4, 0,   32, true,  0,  0};
    static constexpr Format q5_0   = {32,  22,  5, 16,  32, false, 0,  0};
    static constexpr Format q5_1   = {32,  24,  5, 0,   32, true,  0,  0};
    static constexpr Format q8_0   = {32,  34,  8, 128, 32, false, 0,  0};
    static constexpr Format q8_high = {32, 34,  5, 16,  32, false, 0,  0};
    static constexpr Format q8_low = {32,  34,  3, 0,   32, false, 0,  0};
    static constexpr Format q2_k   = {256, 84,  2, 0,   16, true,  16, 0};
    static constexpr Format q3_k   = {256, 110, 3, 4,   16, false, 16, 0};
    static constexpr Format q4_k   = {256, 144, 4, 0,   32, true,  8,  8};
    static constexpr Format q5_k   = {256, 176, 5, 0,   32, true,  8,  8};
    static constexpr Format q6_k   = {256, 210, 6, 32,  16, false, 16, 0};
    static constexpr Format iq4_nl = {32,  18,  4, 0,   32, false, 0,  0};
    static constexpr Format iq4_xs = {256, 136, 4, 0,   32, false, 8,  0};
    switch (t) {
        case WeightType::Q4_0: return q4_0;
        case WeightType::Q4_1: return q4_1;
        case WeightType::Q5_0: return q5_0;
        case WeightType::Q5_1: return q5_1;
        case WeightType::Q8_0: return q8_0;
        case WeightType::Q8_HIGH: return q8_high;
        case WeightType::Q8_LOW: return q8_low;
        case WeightType::Q2_K: return q2_k;
        case WeightType::Q3_K: return q3_k;
        case WeightType::Q4_K: return q4_k;
        case WeightType::Q5_K: return q5_k;
        case WeightType::Q6_K: return q6_k;
        case WeightType::IQ4_NL: return iq4_nl;
        case WeightType::IQ4_XS: return iq4_xs;
        default: throw InputError("The weight type is not a quantised one.");
    }
}

namespace {

// The codes of one block. A template, so that the loop over blocks is inside the switch over types.
template <WeightType t> void codes_of_block(const uint8_t* b, uint8_t* codes) {
    if constexpr (t == WeightType::Q4_0 || t == WeightType::IQ4_NL) nibbles<16>(b + 2, codes);
    if constexpr (t == WeightType::Q4_1) nibbles<16>(b + 4, codes);
    if constexpr (t == WeightType::Q5_0) nibbles<16>(b + 6, codes), add_fifth_bits(b + 2, codes);
    if constexpr (t == WeightType::Q5_1) nibbles<16>(b + 8, codes), add_fifth_bits(b + 4, codes);
    if constexpr (t == WeightType::Q8_0)
        for (int i = 0; i < 32; i++) codes[i] = b[2 + i] ^ 0x80;
    if constexpr (t == WeightType::Q2_K) crumbs(b + 16, codes);
    if constexpr (t == WeightType::Q3_K) {
        crumbs(b + 32, codes);
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < 32; i++) codes[32 * k + i] |= (b[i] >> k & 1) << 2;
    }
    if constexpr (t == WeightType::Q4_K)
        for (int k = 0; k < 4; k++) nibbles<32>(b + 16 + 32 * k, codes + 64 * k);
    if constexpr (t == WeightType::Q5_K) {
        for (int k = 0; k < 4; k++) nibbles<32>(b + 48 + 32 * k, codes + 64 * k);
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < 32; i++) codes[32 * k + i] |= (b[16 + i] >> k & 1) << 4;
    }
    if constexpr (t == WeightType::Q6_K)
        for (int half = 0; half < 2; half++) {
            nibbles<64>(b + 64 * half, codes + 128 * half);
            for (int k = 0; k < 4; k++)
                for (int i = 0; i < 32; i++) codes[128 * half + 32 * k + i] |= (b[128 + 32 * half + i] >> 2 * k & 3) << 4;
        }
    if constexpr (t == WeightType::IQ4_XS)
        for (int k = 0; k < 8; k++) nibbles<16>(b + 8 + 16 * k, codes + 32 * k);
}

template <WeightType t> void codes_of_blocks(const uint8_t* b, int count, uint8_t* codes) {
    const Format& f = format(t);
    for (; count; count--, b += f.file_bytes, codes += f.block) codes_of_block<t>(b, codes);
}

// A scale and an offset for each `sub` columns of a block, exact; an absent offset is -0, which changes no value.
void affine(WeightType t, const BlockScales& s, float* scale, float* offset) {
    const Format& f = format(t);
    const float d = half_to_float(s.d), min = half_to_float(s.min);
    for (int j = 0; j < f.block / f.sub; j++) {
        if (t == WeightType::Q2_K) {
            scale[j] = d * (float)(s.small[j] & 15);
            offset[j] = -(min * (float)(s.small[j] >> 4));
        } else if (f.small_mins) {
            scale[j] = d * (float)s.small[j];
            offset[j] = -(min * (float)s.small_min[j]);
        } else {
            scale[j] = f.small_scales ? d * (float)(int8_t)s.small[j] : d;
            offset[j] = f.has_min ? min : -0.0f;
        }
    }
}

}  // namespace

void read_codes(WeightType t, const uint8_t* blocks, int count, uint8_t* codes) {
    switch (t) {
        case WeightType::Q4_0: return codes_of_blocks<WeightType::Q4_0>(blocks, count, codes);
        case WeightType::Q4_1: return codes_of_blocks<WeightType::Q4_1>(blocks, count, codes);
        case WeightType::Q5_0: return codes_of_blocks<WeightType::Q5_0>(blocks, count, codes);
        case WeightType::Q5_1: return codes_of_blocks<WeightType::Q5_1>(blocks, count, codes);
        case WeightType::Q8_0: return codes_of_blocks<WeightType::Q8_0>(blocks, count, codes);
        case WeightType::Q2_K: return codes_of_blocks<WeightType::Q2_K>(blocks, count, codes);
        case WeightType::Q3_K: return codes_of_blocks<WeightType::Q3_K>(blocks, count, codes);
        case WeightType::Q4_K: return codes_of_blocks<WeightType::Q4_K>(blocks, count, codes);
        case WeightType::Q5_K: return codes_of_blocks<WeightType::Q5_K>(blocks, count, codes);
        case WeightType::Q6_K: return codes_of_blocks<WeightType::Q6_K>(blocks, count, codes);
        case WeightType::IQ4_NL: return codes_of_blocks<WeightType::IQ4_NL>(blocks, count, codes);
        case WeightType::IQ4_XS: return codes_of_blocks<WeightType::IQ4_XS>(blocks, count, codes);
        default: throw InputError("The weight type is not a quantised one.");
    }
}

BlockScales read_scales(WeightType t, const uint8_t* b) {
    BlockScales s{};
    switch (t) {
        case WeightType::Q4_1:
        case WeightType::Q5_1: s.min = u16(b + 2); [[fallthrough]];
        case WeightType::Q4_0:
        case WeightType::Q5_0:
        case WeightType::Q8_0:
        case WeightType::IQ4_NL: s.d = u16(b); return s;
        case WeightType::Q2_K:  // a scale (low) and a minimum (high) share a byte, here as there
            s.d = u16(b + 80), s.min = u16(b + 82);
            memcpy(s.small, b, 16);
            return s;
        case WeightType::Q3_K:
            s.d = u16(b + 108);
            for (int j = 0; j < 16; j++) {
                int low = b[96 + j % 8] >> 4 * (j / 8) & 15, high = b[104 + j % 4] >> 2 * (j / 4) & 3;
                s.small[j] = (uint8_t)((low | high << 4) - 32);
            }
            return s;
        case WeightType::Q4_K:
        case WeightType::Q5_K:
            s.d = u16(b), s.min = u16(b + 2);
            scales_and_mins(b + 4, s);
            return s;
        case WeightType::Q6_K:
            s.d = u16(b + 208);
            memcpy(s.small, b + 192, 16);
            return s;
        case WeightType::IQ4_XS:
            s.d = u16(b);
            for (int j = 0; j < 8; j++) {
                int low = b[4 + j / 2] >> 4 * (j % 2) & 15, high = u16(b + 2) >> 2 * j & 3;
                s.small[j] = (uint8_t)((low | high << 4) - 32);
            }
            return s;
        default: throw InputError("The weight type is not a quantised one.");
    }
}

void block_values(WeightType t, const uint8_t* codes, const BlockScales& s, float* out) {
    const Format& f = format(t);
    const bool iq4 = t == WeightType::IQ4_NL || t == WeightType::IQ4_XS;
    float scale[16], offset[16];
    affine(t, s, scale, offset);
    for (int j = 0; j < f.block / f.sub; j++, codes += f.sub, out += f.sub) {
        if (iq4)
            for (int c = 0; c < f.sub; c++) out[c] = scale[j] * kIq4[codes[c]];
        else
            for (int c = 0; c < f.sub; c++) out[c] = scale[j] * (float)(codes[c] - f.bias) + offset[j];
    }
}

float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    if (!exponent) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;  // zero or subnormal
    const uint32_t bits = sign | (exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | mantissa << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

}  // namespace gmtp
