// Sixteen integer dot products at once: the bytes of a packed block against the int8 activations of one row.
//
// `Bytes` is one 64-byte vector of codes (4 columns of 16 rows). A `Dots` accumulates code * activation for 16 rows over
// 32 columns (or 16), less bias * activation; `total` gives the exact int32 sums, the same in every build.
//   avx512:   vpdpbusd, the activations broadcast from memory.
//   avx2:     codes of up to 6 bits: vpmaddubsw pair sums in wrapping int16 lanes. A lane's final value is a sum over 16
//             columns (8 for 6-bit codes, which have a scale per 16 columns) of |code - bias| * 127 and fits:
//             4-bit 15 * 127 * 16 = 30480, 5-bit 16 * 127 * 16 = 32512, 6-bit 32 * 127 * 8 = 32512.
//             8-bit codes: |w| * (sign(w) a), whose pair sums are at most 128 * 127 * 2 = 32512, widened at once.
//   portable: plain loops.
#pragma once
#include "gmtp/matrix.h"
#include "gmtp/simd.h"

namespace gmtp::GMTP_ISA {

// What an IQ4 code stands for, plus 128.
alignas(16) constexpr uint8_t kIq4Plus128[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                 129, 141, 153, 166, 181, 197, 217, 241};

// Which sums of q in a QuantBlock a Dots covers.
enum class Span { First16, Last16, All32 };

template <Span span> inline const int16_t* pair_sums(const QuantBlock& a) {
    return span == Span::All32 ? a.whole : a.half[span == Span::Last16];
}

// Fills in the sums of a block's q.
#if defined(GMTP_ISA_avx512) || defined(GMTP_ISA_avx2)
// Of 16 q as they were stored, for a load across two stores would wait: the sums of neighbours, of those four apart, and of
// all such, so that every 32 bits hold the sum of columns with column % 4 < 2 and that of the others.
inline __m128i sum_pairs(const int8_t* q) {
    __m128i s = _mm_maddubs_epi16(_mm_set1_epi8(1), _mm_loadu_si128((const __m128i*)q));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xB1));
}
inline void sum_block(QuantBlock& b) {
    const __m128i first = sum_pairs(b.q), last = sum_pairs(b.q + 16), whole = _mm_add_epi16(first, last);
    _mm_storel_epi64((__m128i*)b.half, _mm_unpacklo_epi32(first, last));
    _mm_storeu_si32(b.whole, whole);
    const int sum = _mm_cvtsi128_si32(_mm_madd_epi16(whole, _mm_set1_epi16(1)));
    b.sum = (float)sum, b.bias_8 = -8 * sum;
}
#else
inline void sum_block(QuantBlock& b) {
    int sums[2][2] = {};
    for (int c = 0; c < kBlock; c++) sums[c / 16][c / 2 % 2] += b.q[c];
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++) b.half[h][i] = (int16_t)sums[h][i];
    for (int i = 0; i < 2; i++) b.whole[i] = (int16_t)(sums[0][i] + sums[1][i]);
    const int sum = b.whole[0] + b.whole[1];
    b.sum = (float)sum, b.bias_8 = -8 * sum;
}
#endif

#if defined(GMTP_ISA_avx512)

struct Bytes { __m512i v; };

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes operator&(Bytes a, uint8_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8((char)mask))}; }
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n> inline Bytes shift_right(Bytes a) { return {_mm512_srli_epi16(a.v, n)}; }  // bits cross bytes: mask after
template <int n> inline Bytes shift_left(Bytes a) { return {_mm512_slli_epi16(a.v, n)}; }
inline Bytes look_up(const uint8_t* table16, Bytes index) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table16)), index.v)};
}

template <int bits, int bias> struct Dots {
    using Weights = Bytes;
    static constexpr bool holds_32 = true;  // columns
    __m512i sum;

    static Weights prepare(Bytes w) { return w; }
    template <Span span> static Dots start(const QuantBlock& a) {
        if (!bias) return {_mm512_setzero_si512()};
        if constexpr (span == Span::All32 && bias >= 8) {
            const __m512i eight = _mm512_set1_epi32(a.bias_8);
            if constexpr (bias == 8) return {eight};
            return {_mm512_slli_epi32(eight, __builtin_ctz(bias / 8))};
        }
        int32_t pair;
        memcpy(&pair, pair_sums<span>(a), 4);
        return {_mm512_dpwssd_epi32(_mm512_setzero_si512(), _mm512_set1_epi16(-bias), _mm512_set1_epi32(pair))};
    }
    void add(Weights w, const int8_t* q) {
        int32_t four;
        memcpy(&four, q, 4);
        sum = _mm512_dpbusd_epi32(sum, w.v, _mm512_set1_epi32(four));
    }
    i32x16 total() const { return {sum}; }
};

inline i32x16 load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline i32x16 load_i8(const uint8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }

#elif defined(GMTP_ISA_avx2)

struct Bytes { __m256i lo, hi; };

inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store(uint8_t* p, Bytes a) { _mm256_storeu_si256((__m256i*)p, a.lo), _mm256_storeu_si256((__m256i*)(p + 32), a.hi); }
inline Bytes operator&(Bytes a, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int n> inline Bytes shift_right(Bytes a) { return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)}; }
template <int n> inline Bytes shift_left(Bytes a) { return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)}; }
inline Bytes look_up(const uint8_t* table16, Bytes index) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table16));
    return {_mm256_shuffle_epi8(table, index.lo), _mm256_shuffle_epi8(table, index.hi)};
}
inline __m256i broadcast4(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// GCC would sum the products of many vectors in a tree, and spill them all: this keeps each addition where it is written.
inline void in_order(__m256i& a, __m256i& b) { asm("" : "+x"(a), "+x"(b)); }

template <int bits, int bias> struct Dots {
    using Weights = Bytes;
    static constexpr bool holds_32 = bits != 6;
    __m256i lo, hi;  // int16

    static Weights prepare(Bytes w) { return w; }
    template <Span span> static Dots start(const QuantBlock& a) {
        if (!bias) return {_mm256_setzero_si256(), _mm256_setzero_si256()};
        __m256i s = _mm256_mullo_epi16(broadcast4(pair_sums<span>(a)), _mm256_set1_epi16(-bias));
        return {s, s};
    }
    void add(Weights w, const int8_t* q) {
        const __m256i a = broadcast4(q);
        lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(w.lo, a));
        hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(w.hi, a));
        in_order(lo, hi);
    }
    i32x16 total() const {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(lo, ones), _mm256_madd_epi16(hi, ones)};
    }
};

template <> struct Dots<8, 128> {
    struct Weights { Bytes sign, size; };
    static constexpr bool holds_32 = true;
    __m256i lo, hi;  // int32

    static Weights prepare(Bytes w) {
        const __m256i flip = _mm256_set1_epi8((char)0x80);
        const Bytes s{_mm256_xor_si256(w.lo, flip), _mm256_xor_si256(w.hi, flip)};
        return {s, {_mm256_abs_epi8(s.lo), _mm256_abs_epi8(s.hi)}};
    }
    template <Span> static Dots start(const QuantBlock&) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    void add(Weights w, const int8_t* q) {
        const __m256i a = broadcast4(q), ones = _mm256_set1_epi16(1);
        const __m256i l = _mm256_maddubs_epi16(w.size.lo, _mm256_sign_epi8(a, w.sign.lo));
        const __m256i h = _mm256_maddubs_epi16(w.size.hi, _mm256_sign_epi8(a, w.sign.hi));
        lo = _mm256_add_epi32(lo, _mm256_madd_epi16(l, ones));
        hi = _mm256_add_epi32(hi, _mm256_madd_epi16(h, ones));
        in_order(lo, hi);
    }
    i32x16 total() const { return {lo, hi}; }
};

inline i32x16 load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline i32x16 load_i8(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}

#else

struct Bytes { uint8_t v[64]; };

#define GMTP_BYTES for (int i = 0; i < 64; i++)
inline Bytes load_bytes(const uint8_t* p) { Bytes r; memcpy(r.v, p, 64); return r; }
inline void store(uint8_t* p, const Bytes& a) { memcpy(p, a.v, 64); }
inline Bytes operator&(Bytes a, uint8_t mask) { GMTP_BYTES a.v[i] &= mask; return a; }
inline Bytes operator|(Bytes a, Bytes b) { GMTP_BYTES a.v[i] |= b.v[i]; return a; }
template <int n> inline Bytes shift_right(Bytes a) { GMTP_BYTES a.v[i] = (uint8_t)(a.v[i] >> n); return a; }
template <int n> inline Bytes shift_left(Bytes a) { GMTP_BYTES a.v[i] = (uint8_t)(a.v[i] << n); return a; }
inline Bytes look_up(const uint8_t* table16, Bytes index) { GMTP_BYTES index.v[i] = table16[index.v[i]]; return index; }
#undef GMTP_BYTES

template <int bits, int bias> struct Dots {
    using Weights = Bytes;
    static constexpr bool holds_32 = true;
    i32x16 sum;

    static Weights prepare(Bytes w) { return w; }
    template <Span span> static Dots start(const QuantBlock& a) {
        const int16_t* pair = pair_sums<span>(a);
        return {set1((int32_t)(-bias * (pair[0] + pair[1])))};
    }
    void add(const Weights& w, const int8_t* q) {
        for (int r = 0; r < kGroupRows; r++)
            for (int i = 0; i < 4; i++) sum.v[r] += w.v[4 * r + i] * q[i];
    }
    i32x16 total() const { return sum; }
};

inline i32x16 load_u8(const uint8_t* p) { i32x16 r; for (int i = 0; i < 16; i++) r.v[i] = p[i]; return r; }
inline i32x16 load_i8(const uint8_t* p) { i32x16 r; for (int i = 0; i < 16; i++) r.v[i] = (int8_t)p[i]; return r; }

#endif

// Field v / n of plane v % n, moved to bit `to` of each byte; the rest of the byte is 0.
template <int n, int v, int to> inline Bytes field(const uint8_t* planes) {
    constexpr int from = n * (v / n);
    constexpr uint8_t mask = (uint8_t)(((1 << n) - 1) << to);
    const Bytes x = load_bytes(planes + 64 * (v % n));
    if constexpr (n == 8) return x;
    else if constexpr (from > to) return shift_right<from - to>(x) & mask;
    else if constexpr (from < to) return shift_left<to - from>(x) & mask;
    else return x & mask;
}

// Vector v of a block's codes.
template <int bits, int v> inline Bytes codes(const uint8_t* planes) {
    constexpr int low = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
    const Bytes l = field<low, v, 0>(planes);
    if constexpr (bits > low) return l | field<bits - low, v, low>(planes + 64 * low);
    else return l;
}

}  // namespace gmtp::GMTP_ISA
