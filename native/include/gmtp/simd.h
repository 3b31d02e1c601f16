// Sixteen float lanes, written once for every instruction set: one 512-bit register, two 256-bit ones, or an array.
//
// Everything here rounds the same way in every build (fma is always fused, contraction is off, reductions have one fixed
// order), so kernels written with it give the same bits on every CPU. Include it from kernels/*.cpp only: each of those
// is compiled once per instruction set inside namespace gmtp::GMTP_ISA, and must not instantiate templates of the
// standard library, whose code the linker would share between instruction sets.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(GMTP_ISA_avx2) || defined(GMTP_ISA_avx512)
#include <immintrin.h>
#endif

namespace gmtp::GMTP_ISA {

#if defined(GMTP_ISA_avx512)

struct i32x16 { __m512i v; };
struct f32x16 { __m512 v; };

inline f32x16 zero() { return {_mm512_setzero_ps()}; }
inline f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline f32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_f16(uint16_t* p, f32x16 a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline f32x16 load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a*b + c
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline f32x16 round(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// where a < b: x, elsewhere y
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline uint16_t greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }  // a bit a lane

inline i32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline i32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline i32x16 operator*(i32x16 a, i32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline i32x16 operator&(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline i32x16 operator|(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline i32x16 operator^(i32x16 a, i32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n> inline i32x16 shl(i32x16 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> inline i32x16 shr(i32x16 a) { return {_mm512_srli_epi32(a.v, n)}; }  // logical
inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
inline f32x16 as_float(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline i32x16 as_int(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
// Each lane of a (within -128..127) as a byte.
inline void store_bytes(int8_t* p, i32x16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
inline i32x16 load_bytes(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }

#elif defined(GMTP_ISA_avx2)

struct i32x16 { __m256i lo, hi; };
struct f32x16 { __m256 lo, hi; };

inline f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline f32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_f16(uint16_t* p, f32x16 a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256 bf16_half(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline f32x16 load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline f32x16 abs(f32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline f32x16 round(f32x16 a) {
    return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline uint16_t greater(f32x16 a, f32x16 b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
    return (uint16_t)(lo | _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)) << 8);
}

inline i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline i32x16 load(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline void store(int32_t* p, i32x16 a) {
    _mm256_storeu_si256((__m256i*)p, a.lo), _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline i32x16 operator-(i32x16 a, i32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline i32x16 operator*(i32x16 a, i32x16 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
inline i32x16 operator&(i32x16 a, i32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline i32x16 operator|(i32x16 a, i32x16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline i32x16 operator^(i32x16 a, i32x16 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
template <int n> inline i32x16 shl(i32x16 a) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
template <int n> inline i32x16 shr(i32x16 a) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
inline f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline i32x16 to_int(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline f32x16 as_float(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline i32x16 as_int(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline i32x16 load_bytes(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void store_bytes(int8_t* p, i32x16 a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#else  // portable: plain loops, for every other CPU and as the twin the others are tested against

struct i32x16 { int32_t v[16]; };
struct f32x16 { float v[16]; };

inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FF, bits;
    if (exponent == 31) bits = sign | 0x7F800000 | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {  // zero or subnormal: mantissa * 2^-24 is exact in a float
        float f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4), bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t f32_to_f16(float f) {  // to nearest even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00 | ((rest >> 13) & 0x3FF));  // a quiet NaN
    if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00);            // overflows to infinity
    if (rest < 0x38800000) {                                            // subnormal in half precision
        float scaled, magic = 0.5f;  // adding 0.5 rounds at 2^-24, half's smallest step
        memcpy(&scaled, &rest, 4);
        scaled += magic;
        uint32_t r;
        memcpy(&r, &scaled, 4);
        return (uint16_t)(sign | (r - 0x3F000000));
    }
    rest += 0xFFF + ((rest >> 13) & 1);
    return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}

#define GMTP_LANES for (int i = 0; i < 16; i++)
inline f32x16 set1(float x) { f32x16 r; GMTP_LANES r.v[i] = x; return r; }
inline f32x16 zero() { return set1(0.0f); }
inline f32x16 load(const float* p) { f32x16 r; memcpy(r.v, p, 64); return r; }
inline void store(float* p, f32x16 a) { memcpy(p, a.v, 64); }
inline f32x16 load_f16(const uint16_t* p) { f32x16 r; GMTP_LANES r.v[i] = f16_to_f32(p[i]); return r; }
inline void store_f16(uint16_t* p, f32x16 a) { GMTP_LANES p[i] = f32_to_f16(a.v[i]); }
inline f32x16 load_bf16(const uint16_t* p) {
    f32x16 r;
    GMTP_LANES { uint32_t bits = (uint32_t)p[i] << 16; memcpy(&r.v[i], &bits, 4); }
    return r;
}
inline f32x16 operator+(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] += b.v[i]; return a; }
inline f32x16 operator-(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] -= b.v[i]; return a; }
inline f32x16 operator*(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] *= b.v[i]; return a; }
inline f32x16 operator/(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] /= b.v[i]; return a; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { GMTP_LANES a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return a; }
inline f32x16 max(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline f32x16 min(f32x16 a, f32x16 b) { GMTP_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline f32x16 abs(f32x16 a) { GMTP_LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
inline f32x16 round(f32x16 a) { GMTP_LANES a.v[i] = __builtin_rintf(a.v[i]); return a; }
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) { GMTP_LANES y.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i]; return y; }
inline uint16_t greater(f32x16 a, f32x16 b) { unsigned bits = 0; GMTP_LANES bits |= (unsigned)(a.v[i] > b.v[i]) << i; return (uint16_t)bits; }

inline i32x16 set1(int32_t x) { i32x16 r; GMTP_LANES r.v[i] = x; return r; }
inline i32x16 load(const int32_t* p) { i32x16 r; memcpy(r.v, p, 64); return r; }
inline void store(int32_t* p, i32x16 a) { memcpy(p, a.v, 64); }
inline i32x16 operator+(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i]); return a; }
inline i32x16 operator-(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i]); return a; }
inline i32x16 operator*(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] * (uint32_t)b.v[i]); return a; }
inline i32x16 operator&(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] &= b.v[i]; return a; }
inline i32x16 operator|(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] |= b.v[i]; return a; }
inline i32x16 operator^(i32x16 a, i32x16 b) { GMTP_LANES a.v[i] ^= b.v[i]; return a; }
template <int n> inline i32x16 shl(i32x16 a) { GMTP_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] << n); return a; }
template <int n> inline i32x16 shr(i32x16 a) { GMTP_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] >> n); return a; }
inline f32x16 to_float(i32x16 a) { f32x16 r; GMTP_LANES r.v[i] = (float)a.v[i]; return r; }
inline i32x16 to_int(f32x16 a) { i32x16 r; GMTP_LANES r.v[i] = (int32_t)__builtin_rintf(a.v[i]); return r; }
inline f32x16 as_float(i32x16 a) { f32x16 r; memcpy(r.v, a.v, 64); return r; }
inline i32x16 as_int(f32x16 a) { i32x16 r; memcpy(r.v, a.v, 64); return r; }
inline void store_bytes(int8_t* p, i32x16 a) { GMTP_LANES p[i] = (int8_t)a.v[i]; }
inline i32x16 load_bytes(const int8_t* p) { i32x16 r; GMTP_LANES r.v[i] = p[i]; return r; }
#undef GMTP_LANES

#endif

// Sum and maximum over the lanes, halving 16 -> 8 -> 4 -> 2 -> 1: the same tree in every build.
#if defined(GMTP_ISA_avx2) || defined(GMTP_ISA_avx512)
#if defined(GMTP_ISA_avx2)
inline __m256 low_half(f32x16 a) { return a.lo; }
inline __m256 high_half(f32x16 a) { return a.hi; }
#else
inline __m256 low_half(f32x16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(f32x16 a) { return _mm512_extractf32x8_ps(a.v, 1); }
#endif
inline float sum(f32x16 a) {
    const __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lane(f32x16 a) {
    const __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float max_lane(f32x16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
#endif

inline bool any_greater(f32x16 a, f32x16 b) { return greater(a, b) != 0; }

// e^x to 2 ulp. Cody-Waite reduction to |r| <= ln2/2, then the Taylor polynomial of degree 7; 0 below -87, clamped at 88.
inline f32x16 exp(f32x16 x) {
    f32x16 y = min(max(x, set1(-87.0f)), set1(88.0f));
    f32x16 n = round(y * set1(1.44269504088896341f));
    f32x16 r = fma(n, set1(-0.693359375f), y);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    f32x16 scaled = as_float(as_int(p) + shl<23>(to_int(n)));
    return where_less(x, set1(-87.0f), zero(), scaled);
}

// Natural logarithm of a positive normal x, to 2 ulp: x = m * 2^e with m in [sqrt(1/2), sqrt(2)), then
// log m = 2 atanh(s) with s = (m - 1) / (m + 1), by its series to s^11.
inline f32x16 log(f32x16 x) {
    i32x16 bits = as_int(x) - set1((int32_t)0x3F3504F3);       // sqrt(1/2)
    i32x16 e = shr<23>(bits + set1((int32_t)0x40000000)) - set1((int32_t)128);  // arithmetic shift of the exponent field
    f32x16 m = as_float(as_int(x) - shl<23>(e));
    f32x16 s = (m - set1(1.0f)) / (m + set1(1.0f)), s2 = s * s;
    f32x16 p = set1(2.0f / 11);
    p = fma(p, s2, set1(2.0f / 9));
    p = fma(p, s2, set1(2.0f / 7));
    p = fma(p, s2, set1(2.0f / 5));
    p = fma(p, s2, set1(2.0f / 3));
    p = fma(p * s2, s, s + s);
    f32x16 ef = to_float(e);
    return fma(ef, set1(0.693359375f), fma(ef, set1(-2.12194440e-4f), p));
}

// tanh x = 1 - 2 / (e^2x + 1), accurate to about 1e-7 absolute.
inline f32x16 tanh(f32x16 x) {
    f32x16 e = exp(x + x);
    return set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
}

// The tanh form of GELU (Hendrycks & Gimpel 2016): x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).
inline f32x16 gelu(f32x16 x) {
    f32x16 inner = fma(x * x * x, set1(0.044715f), x) * set1(0.797884560802865f);
    return x * (set1(1.0f) - set1(1.0f) / (exp(inner + inner) + set1(1.0f)));
}

}  // namespace gmtp::GMTP_ISA
