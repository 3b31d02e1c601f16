// F32, F16 and BF16 weights against float32 activations.
//
// A lane has four partial sums, column c going to sum c % 4, added as (s0 + s1) + (s2 + s3): four chains hide the latency
// of fma, and the result is the same in every build and for every number of rows.
#include "matmul-inl.h"

namespace gmtp::GMTP_ISA {
namespace {

// As many lanes as fit a register, so that two rows' partial sums stay in registers on AVX2.
#if defined(GMTP_ISA_avx2)
struct Lanes { __m256 v; };
constexpr int kLanes = 8;
constexpr int kFloatTile = 3;
inline Lanes lanes_zero() { return {_mm256_setzero_ps()}; }
inline Lanes fma(Lanes a, float b, Lanes c) { return {_mm256_fmadd_ps(a.v, _mm256_set1_ps(b), c.v)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.v); }
inline Lanes load_lanes(const float* p) { return {_mm256_loadu_ps(p)}; }
struct Half {
    uint16_t bits;
    static Lanes load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
};
struct Bfloat {
    uint16_t bits;
    static Lanes load(const Bfloat* p) { return {bf16_half(&p->bits)}; }
};
#else
using Lanes = f32x16;
constexpr int kLanes = 16;
constexpr int kFloatTile = 4;
inline Lanes lanes_zero() { return zero(); }
inline Lanes fma(Lanes a, float b, Lanes c) { return GMTP_ISA::fma(a, set1(b), c); }
inline Lanes load_lanes(const float* p) { return load(p); }
struct Half {
    uint16_t bits;
    static Lanes load(const Half* p) { return load_f16(&p->bits); }
};
struct Bfloat {
    uint16_t bits;
    static Lanes load(const Bfloat* p) { return load_bf16(&p->bits); }
};
#endif
struct Single {
    float value;
    static Lanes load(const Single* p) { return load_lanes(&p->value); }
};

// kLanes of the 16 rows of a group; the columns beyond a multiple of four are zero weights, and x is not read there.
template <class Value, int T> void float_tile(const Value* w, int64_t cols, const float* x, int64_t stride, float* out,
                                              int64_t out_stride) {
    Lanes acc[T][4];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 4; i++) acc[t][i] = lanes_zero();
    int64_t c = 0;
    for (; c + 4 <= cols; c += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const Lanes column = Value::load(w + kGroupRows * (c + i));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) acc[t][i] = fma(column, x[t * stride + c + i], acc[t][i]);
        }
    for (; c < cols; c++) {
        const Lanes column = Value::load(w + kGroupRows * c);
        for (int t = 0; t < T; t++) acc[t][c % 4] = fma(column, x[t * stride + c], acc[t][c % 4]);
    }
    for (int t = 0; t < T; t++) store(out + t * out_stride, (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]));
}

template <class Value> void matmul_floats(const Matrix& w, int64_t group0, int64_t group1, const Activations& x, int row0,
                                          int row1, float* out, int64_t out_stride) {
    const int64_t size = (int64_t)group_bytes(w.type, w.cols);
    for (int64_t g = group0; g < group1; g++)
        for (int row = row0, tiles = (row1 - row0 + kFloatTile - 1) / kFloatTile; tiles; tiles--) {
            const int T = (row1 - row + tiles - 1) / tiles;
            for (int lane = 0; lane < kGroupRows; lane += kLanes) {
                const Value* weights = reinterpret_cast<const Value*>(w.data + g * size) + lane;
                const float* a = x.x + row * x.stride;
                float* to = out + row * out_stride + g * kGroupRows + lane;
                switch (T) {
                    case 1: float_tile<Value, 1>(weights, w.cols, a, x.stride, to, out_stride); break;
                    case 2: float_tile<Value, 2>(weights, w.cols, a, x.stride, to, out_stride); break;
                    case 3: float_tile<Value, 3>(weights, w.cols, a, x.stride, to, out_stride); break;
#if !defined(GMTP_ISA_avx2)
                    case 4: float_tile<Value, 4>(weights, w.cols, a, x.stride, to, out_stride); break;
#endif
                }
            }
            row += T;
        }
}

}  // namespace

MatmulFunction matmul_float(WeightType t) {
    switch (t) {
        case WeightType::F32: return matmul_floats<Single>;
        case WeightType::F16: return matmul_floats<Half>;
        case WeightType::BF16: return matmul_floats<Bfloat>;
        default: return nullptr;
    }
}

}  // namespace gmtp::GMTP_ISA
