// Attention over a paged cache. Lanes run over positions while scoring and over the head's elements while summing
// values, so no sum ever crosses lanes and a query's result cannot depend on the queries beside it. Scoring fetches the values
// of the same positions, weighing values the keys of what comes next, so that memory is never idle: pages are too short for
// the CPU to foresee them.
#include "attention.h"

#include <cfloat>

#include "gmtp/simd.h"

namespace gmtp::GMTP_ISA {
namespace {

inline f32x16 load_as(const float* p) { return load(p); }
inline f32x16 load_as(const uint16_t* p) { return load_f16(p); }
inline f32x16 load_as(const int8_t* p) { return to_float(load_bytes(p)); }
// Saturates rather than become infinite: 0 times what a query does not see must be 0.
inline void store_as(float* p, f32x16 v) { store(p, min(max(v, set1(-FLT_MAX)), set1(FLT_MAX))); }
inline void store_as(uint16_t* p, f32x16 v) {  // half precision ends at 65504
    store_f16(p, min(max(v, set1(-65504.0f)), set1(65504.0f)));
}

template <class T> void put_key(const float* key, int64_t dim, int position, T* page) {
    T* column = page + (position / 16) * dim * 16 + position % 16;
    for (int64_t d = 0; d < dim; d += 16) {
        T lanes[16];
        store_as(lanes, load(key + d));
        for (int i = 0; i < 16; i++) column[(d + i) * 16] = lanes[i];
    }
}

template <class T> void put_value(const float* value, int64_t dim, int position, T* page) {
    for (int64_t d = 0; d < dim; d += 16) store_as(page + position * dim + d, load(value + d));
}

// Q8_0: codes at p, p + stride, ..., the scale returned as fp16.
inline uint16_t put_block(const float* x, int8_t* p, int64_t stride) {
    const float peak = max_lane(max(abs(load(x)), abs(load(x + 16))));
    uint16_t halves[16];
    float lanes[16];
    store_as(halves, set1(peak / 127.0f));
    store(lanes, load_f16(halves));  // what the scale is once stored
    const f32x16 inverse = set1(lanes[0] > 0 ? 1.0f / lanes[0] : 0.0f);
    int8_t codes[kKvBlock];
    for (int i = 0; i < kKvBlock; i += 16)
        store_bytes(codes + i, to_int(min(max(load(x + i) * inverse, set1(-127.0f)), set1(127.0f))));
    for (int i = 0; i < kKvBlock; i++) p[i * stride] = codes[i];
    return halves[0];
}

inline const uint16_t* scales_of(const int8_t* page, int64_t dim) { return (const uint16_t*)(page + dim * kPagePositions); }

void put_key(const float* key, int64_t dim, int position, int8_t* page) {
    int8_t* column = page + (position / 16) * dim * 16 + position % 16;
    uint16_t* scales = (uint16_t*)scales_of(page, dim) + position;
    for (int64_t d = 0; d < dim; d += kKvBlock) scales[d / kKvBlock * kPagePositions] = put_block(key + d, column + d * 16, 16);
}

void put_value(const float* value, int64_t dim, int position, int8_t* page) {
    uint16_t* scales = (uint16_t*)scales_of(page, dim) + position;
    for (int64_t d = 0; d < dim; d += kKvBlock)
        scales[d / kKvBlock * kPagePositions] = put_block(value + d, page + position * dim + d, 1);
}

// Scores of Q queries at block `block` of a page, 16 positions: scores[query * kChunkPositions + position].
template <int Q>
void score_block(const float* q, int64_t dim, const int8_t* page, int block, const int8_t* ahead, const int8_t* values, float* scores) {
    const int8_t* keys = page + block * dim * 16;
    const uint16_t* scale = scales_of(page, dim) + block * 16;
    f32x16 acc[Q];
    for (int i = 0; i < Q; i++) acc[i] = zero();
    for (int64_t d = 0; d < dim; d += kKvBlock, scale += kPagePositions) {
        f32x16 part[Q];
        for (int i = 0; i < Q; i++) part[i] = zero();
        for (int64_t e = d; e < d + kKvBlock; e++) {
            if (e % 4 == 0) {
                __builtin_prefetch(ahead + e * 16, 0, 2);
                __builtin_prefetch(values + e * 16, 0, 2);
            }
            f32x16 k = load_as(keys + e * 16);
            for (int i = 0; i < Q; i++) part[i] = fma(set1(q[e * Q + i]), k, part[i]);
        }
        f32x16 s = load_f16(scale);
        for (int i = 0; i < Q; i++) acc[i] = fma(part[i], s, acc[i]);
    }
    for (int i = 0; i < Q; i++) store(scores + i * kChunkPositions, acc[i]);
}

template <int Q, class T>
void score_block(const float* q, int64_t dim, const T* page, int block, const T* ahead, const T* values, float* scores) {
    const T* keys = page + block * dim * 16;
    f32x16 acc[Q];
    for (int i = 0; i < Q; i++) acc[i] = zero();
    for (int64_t d = 0; d < dim; d++) {
        if (d % (4 / sizeof(T)) == 0) {
            __builtin_prefetch(ahead + d * 16, 0, 2);
            __builtin_prefetch(values + d * 16, 0, 2);
        }
        f32x16 k = load_as(keys + d * 16);
        for (int i = 0; i < Q; i++) acc[i] = fma(set1(q[d * Q + i]), k, acc[i]);
    }
    for (int i = 0; i < Q; i++) store(scores + i * kChunkPositions, acc[i]);
}

// Turns one query's scores in blocks [block0, block1) into exp(score - peak), 0 where it does not see.
inline Partial exponentials(float* scores, int block0, int block1, int first, int last) {
    const float lowest = -__builtin_inff();
    for (int p = block0 * 16; p < first; p++) scores[p] = lowest;
    for (int p = last; p < block1 * 16; p++) scores[p] = lowest;
    f32x16 peaks = set1(lowest), total = zero();
    for (int b = block0; b < block1; b++) peaks = max(peaks, load(scores + b * 16));
    const float peak = max_lane(peaks);
    for (int b = block0; b < block1; b++) {
        f32x16 e = exp(load(scores + b * 16) - set1(peak));
        store(scores + b * 16, e);
        total = total + e;
    }
    return {peak, sum(total)};
}

// Adds the values of positions [begin, end) of one page, weighted, to 16 * V elements of Q outputs. A query's weights lie
// `stride` apart from the next one's. As much of `ahead` is fetched as is read.
template <int Q, int V, class T>
void weigh_values(const float* weights, int stride, const T* values, int64_t dim, int begin, int end, const T* ahead, float* out) {
    constexpr int kBytes = 16 * V * sizeof(T), kPositionsOfLine = kBytes < 64 ? 64 / kBytes : 1;
    f32x16 acc[Q][V];
    for (int i = 0; i < Q; i++)
        for (int j = 0; j < V; j++) acc[i][j] = load(out + i * dim + j * 16);
    for (int p = begin; p < end; p++) {
        if (p % kPositionsOfLine == 0) __builtin_prefetch(ahead + p * 16 * V, 0, 2);
        f32x16 v[V];
        for (int j = 0; j < V; j++) v[j] = load_as(values + p * dim + j * 16);
        for (int i = 0; i < Q; i++) {
            f32x16 w = set1(weights[i * stride + p]);
            for (int j = 0; j < V; j++) acc[i][j] = fma(w, v[j], acc[i][j]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int j = 0; j < V; j++) store(out + i * dim + j * 16, acc[i][j]);
}

// The same for all elements of the outputs.
template <int Q, class T>
void weigh_page(const float* weights, const T* page, int64_t dim, int begin, int end, const T* ahead, float* out) {
    constexpr int V = Q <= 4 ? 2 : 1;
    for (int64_t d = 0; d < dim; d += 16 * V)
        weigh_values<Q, V>(weights, kChunkPositions, page + d, dim, begin, end, ahead + d * kPagePositions, out + d);
}

template <int Q>
void weigh_page(const float* weights, const int8_t* page, int64_t dim, int begin, int end, const int8_t* ahead, float* out) {
    constexpr int V = Q <= 4 ? 2 : 1;
    const uint16_t* scales = scales_of(page, dim);
    float scaled[Q * kPagePositions];
    for (int64_t d = 0; d < dim; d += kKvBlock, scales += kPagePositions) {
        for (int p = begin / 16 * 16; p < end; p += 16) {
            f32x16 s = load_f16(scales + p);
            for (int i = 0; i < Q; i++) store(scaled + i * kPagePositions + p, load(weights + i * kChunkPositions + p) * s);
        }
        for (int64_t e = d; e < d + kKvBlock; e += 16 * V)
            weigh_values<Q, V>(scaled, kPagePositions, page + e, dim, begin, end, ahead + e * kPagePositions, out + e);
    }
}

template <int Q, class T>
void attend(const float* q, int64_t dim, const KvChunk& chunk, const int* first, const int* last, float* weights, Partial* partial,
            float* out) {
    const int block0 = chunk.begin / 16, block1 = (chunk.end + 15) / 16;
    constexpr int kPageBlocks = kPagePositions / 16;
    const auto block_of = [dim](const void* const* pages, int b) {
        return (const T*)pages[b / kPageBlocks] + b % kPageBlocks * dim * 16;
    };
    for (int b = block0; b < block1; b++)
        score_block<Q>(q, dim, (const T*)chunk.keys[b / kPageBlocks], b % kPageBlocks,
                       block_of(chunk.keys, b + 1 < block1 ? b + 1 : b), block_of(chunk.values, b), weights + b * 16);
    for (int i = 0; i < Q; i++)
        partial[i] = exponentials(weights + i * kChunkPositions, block0, block1, first[i], last[i]);

    for (int64_t i = 0; i < Q * dim; i += 16) store(out + i, zero());
    for (int page = chunk.begin / kPagePositions; page * kPagePositions < chunk.end; page++) {
        int from = chunk.begin - page * kPagePositions, to = chunk.end - page * kPagePositions;
        from = from < 0 ? 0 : from, to = to > kPagePositions ? kPagePositions : to;
        const auto *values = (const T*)chunk.values[page], *ahead = chunk.ahead[page] ? (const T*)chunk.ahead[page] : values;
        weigh_page<Q>(weights + page * kPagePositions, values, dim, from, to, ahead, out);
    }
}

template <int Q>
void attend_typed(KvType type, const float* q, int64_t dim, const KvChunk& chunk, const int* first, const int* last, float* weights,
                  Partial* partial, float* out) {
    if (type == KvType::F16) attend<Q, uint16_t>(q, dim, chunk, first, last, weights, partial, out);
    else if (type == KvType::Q8_0) attend<Q, int8_t>(q, dim, chunk, first, last, weights, partial, out);
    else attend<Q, float>(q, dim, chunk, first, last, weights, partial, out);
}

}  // namespace

void store_key(KvType type, const float* key, int64_t dim, int position, void* page) {
    if (type == KvType::F16) put_key(key, dim, position, (uint16_t*)page);
    else if (type == KvType::Q8_0) put_key(key, dim, position, (int8_t*)page);
    else put_key(key, dim, position, (float*)page);
}

void store_value(KvType type, const float* value, int64_t dim, int position, void* page) {
    if (type == KvType::F16) put_value(value, dim, position, (uint16_t*)page);
    else if (type == KvType::Q8_0) put_value(value, dim, position, (int8_t*)page);
    else put_value(value, dim, position, (float*)page);
}

void attend_chunk(KvType type, const float* q, int queries, int64_t dim, const KvChunk& chunk, const int* first, const int* last,
                  float* scratch, Partial* partial, float* out) {
    switch (queries) {
#define GMTP_CASE(n) \
    case n: attend_typed<n>(type, q, dim, chunk, first, last, scratch, partial, out); break;
        GMTP_CASE(1) GMTP_CASE(2) GMTP_CASE(3) GMTP_CASE(4) GMTP_CASE(5) GMTP_CASE(6) GMTP_CASE(7) GMTP_CASE(8)
#undef GMTP_CASE
    }
}

void merge(Partial* running, float* out, const Partial* next, const float* x, int64_t dim) {
    float peak = running->peak > next->peak ? running->peak : next->peak;
    float lanes[16] = {running->peak - peak, next->peak - peak};
    store(lanes, exp(load(lanes)));  // a first fold starts from a peak of -inf, whose factor is 0
    f32x16 keep = set1(lanes[0]), add = set1(lanes[1]);
    for (int64_t d = 0; d < dim; d += 16) store(out + d, fma(load(x + d), add, load(out + d) * keep));
    *running = {peak, running->total * lanes[0] + next->total * lanes[1]};
}

}  // namespace gmtp::GMTP_ISA
