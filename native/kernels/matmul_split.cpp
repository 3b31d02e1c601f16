// The two parts of a Q8_0 matrix: the high one by itself, both at once, and the low one a row at a time.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

constexpr int kLowBytes = 48;  // of four rows of a block of the low part, 16 a plane

// d * (8 h + 3.5 - 128) = 8 d * (h - 16) + 3.5 d
struct Q8High {
    static constexpr int bits = 5, block = 32, sub = 32, scale_bytes = 32;
    static constexpr bool has_offset = true;
    using Dots = GMTP_ISA::Dots<5, 16>;

    template <int v> static Bytes codes(const uint8_t* planes) { return GMTP_ISA::codes<5, v>(planes); }
    static Affine affine(const uint8_t* scales, int64_t) {
        const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(scales));
        return {d * set1(8.0f), d * set1(3.5f)};
    }
};

// d * (l - 3.5), its scales being those of the high part
struct Q8Low {
    static constexpr bool has_offset = true;
    using Dots = GMTP_ISA::Dots<3, 0>;

    template <int v> static Bytes codes(const uint8_t* planes) { return GMTP_ISA::codes<3, v>(planes); }
    static Affine affine(const uint8_t* scales) {
        const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(scales));
        return {d, d * set1(-3.5f)};
    }
};

// A plane of 16 rows, whose fours are `stride` apart.
#if defined(GMTP_ISA_avx512)
inline Bytes load_fours(const uint8_t* p, int64_t stride) {
    auto four = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * stride)); };
    const __m512i half = _mm512_inserti32x4(_mm512_castsi128_si512(four(0)), four(1), 1);
    return {_mm512_inserti32x4(_mm512_inserti32x4(half, four(2), 2), four(3), 3)};
}
#elif defined(GMTP_ISA_avx2)
inline Bytes load_fours(const uint8_t* p, int64_t stride) {
    auto four = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * stride)); };
    return {_mm256_set_m128i(four(1), four(0)), _mm256_set_m128i(four(3), four(2))};
}
#else
inline Bytes load_fours(const uint8_t* p, int64_t stride) {
    Bytes r;
    for (int i = 0; i < 4; i++) memcpy(r.v + 16 * i, p + i * stride, 16);
    return r;
}
#endif

// One group of both parts, in one walk, so that the memory never waits.
template <int T> void tile_of_both(const Group& high, const uint8_t* low, int64_t blocks, const QuantBlock* a, int64_t stride,
                                   float* out, int64_t out_stride) {
    const uint8_t *planes = high.planes, *scales = high.scales, *ahead = high.ahead;
    const int64_t fours = blocks * kLowBytes;
    alignas(64) uint8_t low_planes[192];
    f32x16 acc[T], low_acc[T], sums[T];
    for (int t = 0; t < T; t++) acc[t] = low_acc[t] = zero();
    for (int64_t b = 0; b < blocks; b++, a++, scales += 32, planes += 320, low += kLowBytes, ahead += bytes_of_block<Q8High>) {
        fetch_block<Q8High>(ahead);
        for (int p = 0; p < 3; p++) store(low_planes + 64 * p, load_fours(low + 16 * p, fours));
        add_dots<Q8High, Span::All32, T>(planes, Q8High::affine(scales, 0), a, stride, sums);
        for (int t = 0; t < T; t++) acc[t] = fma(sums[t], set1(a[t * stride].scale), acc[t]);
        add_dots<Q8Low, Span::All32, T>(low_planes, Q8Low::affine(scales), a, stride, sums);
        for (int t = 0; t < T; t++) low_acc[t] = fma(sums[t], set1(a[t * stride].scale), low_acc[t]);
    }
    for (int t = 0; t < T; t++) store(out + t * out_stride, acc[t] + low_acc[t]);
}

// The sum of code * q over a block of a row.
#if defined(GMTP_ISA_avx512) || defined(GMTP_ISA_avx2)
inline int low_dot(const uint8_t* low, const int8_t* q) {
    uint32_t first, second;
    int32_t third;
    memcpy(&first, low, 4), memcpy(&second, low + 16, 4), memcpy(&third, low + 32, 4);
    const auto two = (long long)(first | (uint64_t)second << 32);
    // Byte i of field k of the two planes of two bits is column 8 k + i, of the plane of single bits column 4 k + i.
    const __m256i twos = _mm256_srlv_epi64(_mm256_set1_epi64x(two), _mm256_setr_epi64x(0, 2, 4, 6));
    const __m256i thirds = _mm256_srlv_epi32(_mm256_set1_epi32(third), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i codes = _mm256_or_si256(_mm256_and_si256(twos, _mm256_set1_epi8(3)),
                                          _mm256_slli_epi16(_mm256_and_si256(thirds, _mm256_set1_epi8(1)), 2));
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_loadu_si256((const __m256i*)q));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}
#else
inline int low_dot(const uint8_t* low, const int8_t* q) {
    int sum = 0;
    for (int c = 0; c < kBlock; c++) {
        const int v = c / 4, i = c % 4;
        sum += ((low[16 * (v % 2) + i] >> 2 * (v / 2) & 3) | (low[32 + i] >> v & 1) << 2) * q[c];
    }
    return sum;
}
#endif

}  // namespace

// For each row, what a lane of Q8Low computes in add_dots and tile_of_both.
float low_part(const uint8_t* low, const uint16_t* scales, const QuantBlock* x, int64_t blocks) {
    float acc = 0;
    for (int64_t b = 0; b < blocks; b++, x++) {
        const float d = f16_to_f32(scales[kGroupRows * b]);
        const float dot = d * (float)low_dot(low + kLowBytes * b, x->q);
        acc = __builtin_fmaf(__builtin_fmaf(d * -3.5f, x->sum, dot), x->scale, acc);
    }
    return acc;
}

void matmul_both(const Matrix& high, const Matrix& low, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                 float* out, int64_t out_stride) {
    const int64_t blocks = high.cols / kBlock, stride = x.stride / kBlock, scales = (blocks * 32 + 63) / 64 * 64;
    const int64_t high_bytes = (int64_t)group_bytes(high.type, high.cols), low_bytes = (int64_t)group_bytes(low.type, low.cols);
    for (int64_t g = group0; g < group1; g++) {
        const uint8_t *of_high = high.data + g * high_bytes, *of_low = low.data + g * low_bytes;
        const Group h{of_high, of_high + scales, of_high + scales + kPrefetchBytes};
        for (int64_t line = 0; line < low_bytes; line += 64) __builtin_prefetch(of_low + low_bytes + line, 0, kSecondLevel);
        for (int row = row0; row < row1; row += 4) {
            const QuantBlock* a = x.q + row * stride;
            float* to = out + row * out_stride + g * kGroupRows;
            switch (row1 - row) {
                case 1: tile_of_both<1>(h, of_low, blocks, a, stride, to, out_stride); break;
                case 2: tile_of_both<2>(h, of_low, blocks, a, stride, to, out_stride); break;
                case 3: tile_of_both<3>(h, of_low, blocks, a, stride, to, out_stride); break;
                default: tile_of_both<4>(h, of_low, blocks, a, stride, to, out_stride);
            }
        }
    }
}

MatmulFunction matmul_split(WeightType t) { return t == WeightType::Q8_HIGH ? matmul<Q8High> : nullptr; }

}  // namespace gmtp::GMTP_ISA
