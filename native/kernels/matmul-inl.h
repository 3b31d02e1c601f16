// The matmul of every quantised type: a tile of T activation rows against one group of 16 weight rows.
//
// For each row, lane and digit, in every build and for every tiling, block after block of 32 columns:
//   t   = sum over the block's scales of  scale * float(sum of (code - bias) * q)  [ + offset * float(sum of q) ]
//   acc = fma(t, activation scale, acc)
// and the sums of a row's digits are added. A tile knows a digit as just another row.
#pragma once
#include "dot-inl.h"

namespace gmtp::GMTP_ISA {

// Activation rows that share one read of the weights: as many as the registers hold sums of.
#if defined(GMTP_ISA_avx2)
constexpr int kMaxTile = 6;
#else
constexpr int kMaxTile = 8;
#endif

// Weights are fetched into the second-level cache at least this many bytes ahead of their use: a group's planes are read
// once, in order, and the scales and planes of the next group of the call follow them.
constexpr int kPrefetchBytes = 8192;
constexpr int kSecondLevel = 2;

// The scale and offset of 16 rows.
struct Affine {
    f32x16 scale, offset;
};

template <class W> inline void unpack_block(const uint8_t* planes, uint8_t* bytes) {
    store(bytes, W::template codes<0>(planes)), store(bytes + 256, W::template codes<4>(planes));
    store(bytes + 64, W::template codes<1>(planes)), store(bytes + 320, W::template codes<5>(planes));
    store(bytes + 128, W::template codes<2>(planes)), store(bytes + 384, W::template codes<6>(planes));
    store(bytes + 192, W::template codes<3>(planes)), store(bytes + 448, W::template codes<7>(planes));
}

// Vector v of a block, against T rows. Inlined by force, as what calls it is: otherwise the sums of some types lie in memory.
template <class W, int v, int T> [[gnu::always_inline]] inline void add_vector(const uint8_t* planes, const QuantBlock* a, int64_t stride,
                                                        typename W::Dots* dots) {
    const auto w = W::Dots::prepare(W::template codes<v>(planes));
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) dots[t].add(w, a[t * stride].q + 4 * v);
}

// The vectors of a span, against T rows.
template <class W, Span span, int T> [[gnu::always_inline]] inline void add_vectors(const uint8_t* planes, const QuantBlock* a, int64_t stride,
                                                             typename W::Dots* dots) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) dots[t] = W::Dots::template start<span>(a[t * stride]);
    // Vectors that share a plane follow each other, so that the plane is loaded once.
    if constexpr (span != Span::Last16) {
        add_vector<W, 0, T>(planes, a, stride, dots);
        if constexpr (span == Span::All32) add_vector<W, 4, T>(planes, a, stride, dots);
        add_vector<W, 1, T>(planes, a, stride, dots);
        if constexpr (span == Span::All32) add_vector<W, 5, T>(planes, a, stride, dots);
        add_vector<W, 2, T>(planes, a, stride, dots);
        if constexpr (span == Span::All32) add_vector<W, 6, T>(planes, a, stride, dots);
        add_vector<W, 3, T>(planes, a, stride, dots);
        if constexpr (span == Span::All32) add_vector<W, 7, T>(planes, a, stride, dots);
    } else {
        add_vector<W, 4, T>(planes, a, stride, dots);
        add_vector<W, 5, T>(planes, a, stride, dots);
        add_vector<W, 6, T>(planes, a, stride, dots);
        add_vector<W, 7, T>(planes, a, stride, dots);
    }
}

template <class W, Span span, int T> [[gnu::always_inline]] inline void add_dots(const uint8_t* planes, const Affine& w, const QuantBlock* a,
                                                          int64_t stride, f32x16* sums) {
    typename W::Dots dots[T];
    i32x16 firsts[T];
    if constexpr (span == Span::All32 && !W::Dots::holds_32) {
        add_vectors<W, Span::First16, T>(planes, a, stride, dots);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) firsts[t] = dots[t].total();
        add_vectors<W, Span::Last16, T>(planes, a, stride, dots);
    } else {
        add_vectors<W, span, T>(planes, a, stride, dots);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        i32x16 total = dots[t].total();
        if constexpr (span == Span::All32 && !W::Dots::holds_32) total = firsts[t] + total;
        const f32x16 dot = to_float(total);
        const QuantBlock& block = a[t * stride];
        f32x16 sum = span == Span::Last16 ? fma(w.scale, dot, sums[t]) : w.scale * dot;
        if constexpr (W::has_offset) {
            const int16_t* pair = pair_sums<span>(block);
            const float q_sum = span == Span::All32 ? block.sum : (float)(pair[0] + pair[1]);
            sum = fma(w.offset, set1(q_sum), sum);
        }
        sums[t] = sum;
    }
}

// A group: where its scales and its codes are, and what of the matrix is to be fetched.
struct Group {
    const uint8_t *scales, *planes, *ahead;
};

// What walks of several tiles over the same columns share: the codes, a byte each.
template <class W> struct Bytewise : W {
    static constexpr int bits = 8;
    template <int v> static Bytes codes(const uint8_t* bytes) { return load_bytes(bytes + 64 * v); }
};
template <class W> constexpr bool is_bytewise = false;
template <class W> constexpr bool is_bytewise<Bytewise<W>> = true;

template <class W> constexpr int bytes_of_block = 64 * W::bits + W::scale_bytes * kBlock / W::block;

template <class W> inline void fetch_block([[maybe_unused]] const uint8_t* ahead) {
    if constexpr (!is_bytewise<W>)
#pragma GCC unroll 16
        for (int line = 0; line < bytes_of_block<W>; line += 64) __builtin_prefetch(ahead + line, 0, kSecondLevel);
}

// Blocks [begin, end) of `all` of a group.
struct Walk {
    int64_t begin, end, all;
};

// A walk against T rows. Between the walks that cover a bytewise group in turn, sums wait in `carried`.
template <class W, int T> void tile(const Group& group, const Walk& walk, const QuantBlock* a, int64_t stride, int digits,
                                    f32x16* carried, float* out, int64_t out_stride) {
    constexpr int per = W::block / kBlock;
    const uint8_t *planes = group.planes, *ahead = group.ahead;
    f32x16 acc[T];
    const int64_t begin = is_bytewise<W> ? walk.begin : 0, end = walk.end;
    for (int t = 0; t < T; t++) acc[t] = begin ? carried[t] : zero();
    a += begin;
    for (int64_t b = begin; b < end; b++, planes += 64 * W::bits, a++, ahead += bytes_of_block<W>) {
        fetch_block<W>(ahead);
        const uint8_t* scales = group.scales + b / per * W::scale_bytes;
        f32x16 sums[T];
        if constexpr (W::sub == 32) {
            add_dots<W, Span::All32, T>(planes, W::affine(scales, b % per), a, stride, sums);
        } else {
            add_dots<W, Span::First16, T>(planes, W::affine(scales, 2 * (b % per)), a, stride, sums);
            add_dots<W, Span::Last16, T>(planes, W::affine(scales, 2 * (b % per) + 1), a, stride, sums);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) acc[t] = fma(sums[t], set1(a[t * stride].scale), acc[t]);
    }
    if (is_bytewise<W> && end < walk.all)
        for (int t = 0; t < T; t++) carried[t] = acc[t];
    else if (digits == 1)
        for (int t = 0; t < T; t++) store(out + t * out_stride, acc[t]);
    else
        for (int t = 0; t + 1 < T; t += 2) store(out + t / 2 * out_stride, acc[t] + acc[t + 1]);
}

// A walk with `rows` digits of activation rows, in tiles as equal as can be without parting the digits of a row.
template <class W> void tiles(const Group& group, const Walk& walk, const QuantBlock* a, int64_t stride, int rows, int digits,
                              f32x16* carried, float* out, int64_t out_stride) {
    static_assert(kMaxTile % 2 == 0);
    for (int tiles = (rows + kMaxTile - 1) / kMaxTile; rows; tiles--) {
        const int even_share = (rows + tiles - 1) / tiles, T = (even_share + digits - 1) / digits * digits;
        switch (T) {
#define GMTP_CASE(n) \
    case n: tile<W, n>(group, walk, a, stride, digits, carried, out, out_stride); break;
            GMTP_CASE(1) GMTP_CASE(2) GMTP_CASE(3) GMTP_CASE(4) GMTP_CASE(5) GMTP_CASE(6)
#if !defined(GMTP_ISA_avx2)
            GMTP_CASE(7) GMTP_CASE(8)
#endif
#undef GMTP_CASE
        }
        a += T * stride, out += T / digits * out_stride, rows -= T;
        if (is_bytewise<W>) carried += T;
    }
}

// One group against `rows` digits of activation rows, whose tiles share codes that are unpacked once.
template <class W> void matmul_unpacked(const Group& group, int64_t blocks, const QuantBlock* a, int64_t stride, int rows,
                                        int digits, float* out, int64_t out_stride) {
    constexpr int64_t kBlocks = 64;  // unpacked at a time: 32 KB
    constexpr int kRows = 96;        // that share it
    alignas(64) uint8_t bytes[kBlocks * kBlock * kGroupRows];
    f32x16 carried[kRows];
    for (int count; rows; rows -= count, a += count * stride, out += count / digits * out_stride) {
        count = rows < kRows ? rows : kRows;
        const uint8_t *planes = group.planes, *ahead = group.ahead;
        for (int64_t begin = 0, end; begin < blocks; begin = end) {
            end = begin + kBlocks < blocks ? begin + kBlocks : blocks;
            uint8_t* to = bytes;
            for (int64_t b = begin; b < end; b++, planes += 64 * W::bits, ahead += bytes_of_block<W>, to += kBlock * kGroupRows) {
                fetch_block<W>(ahead);
                unpack_block<W>(planes, to);
            }
            tiles<Bytewise<W>>({group.scales, bytes, nullptr}, {begin, end, blocks}, a, stride, count, digits, carried, out, out_stride);
        }
    }
}

// Whether that is quicker than unpacking them for each tile. With AVX-512 it is not.
#if defined(GMTP_ISA_avx512)
template <class W> constexpr bool unpacks_once = false;
#else
template <class W> constexpr bool unpacks_once = W::bits != 8;
#endif

template <class W> void matmul_group(const Group& group, int64_t blocks, const QuantBlock* a, int64_t stride, int rows,
                                     int digits, float* out, int64_t out_stride) {
    if constexpr (unpacks_once<W>)
        if (rows > (W::bits == 4 ? 2 : 1) * kMaxTile) return matmul_unpacked<W>(group, blocks, a, stride, rows, digits, out, out_stride);
    tiles<W>(group, {0, blocks, blocks}, a, stride, rows, digits, nullptr, out, out_stride);
}

template <class W> void matmul(const Matrix& w, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                               float* out, int64_t out_stride) {
    const int64_t stride = x.stride / kBlock, size = (int64_t)group_bytes(w.type, w.cols);
    const int64_t scales = (w.cols / W::block * W::scale_bytes + 63) / 64 * 64;
    for (int64_t g = group0; g < group1; g++) {
        const uint8_t* data = w.data + g * size;
        matmul_group<W>({data, data + scales, data + scales + kPrefetchBytes}, w.cols / kBlock, x.q + row0 * x.digits * stride, stride, (row1 - row0) * x.digits, x.digits,
                        out + row0 * out_stride + g * kGroupRows, out_stride);
    }
}

using MatmulFunction = decltype(MatmulKernels::matmul);
MatmulFunction matmul_float(WeightType t);
MatmulFunction matmul_small_block(WeightType t);  // the types with a scale per 32 columns
MatmulFunction matmul_super_block(WeightType t);  // the types with blocks of 256 columns
MatmulFunction matmul_split(WeightType t);        // Q8_HIGH
// MatmulKernels::both and low.
void matmul_both(const Matrix& high, const Matrix& low, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                 float* out, int64_t out_stride);
float low_part(const uint8_t* low, const uint16_t* scales, const QuantBlock* x, int64_t blocks);

}  // namespace gmtp::GMTP_ISA
