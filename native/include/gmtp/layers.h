// Float kernels between the matrix products. All work on one row (or one head) at a time, in a fixed order.
#pragma once
#include <cstdint>

namespace gmtp {

// Storage type of cached keys and values. Q8_0: int8 codes, and an fp16 scale for each 32 elements of a head.
enum class KvType : uint8_t { F16, F32, Q8_0 };

constexpr int kKvBlock = 32;  // elements of a head that share a scale in Q8_0

constexpr int kPagePositions = 64;    // positions in a page of the cache
constexpr int kChunkPositions = 256;  // attention is computed in chunks of this many positions, from position 0 on
constexpr int kMaxQueries = 8;        // queries (rows x heads of one group) that share a read of the keys

// One chunk of a sequence's keys and values for one KV head. Pages wholly outside [begin, end) are not read.
struct KvChunk {
    static constexpr int kPages = kChunkPositions / kPagePositions;
    const void *keys[kPages], *values[kPages];
    const void* ahead[kPages];  // key pages that are read next, to be fetched meanwhile; null for none
    int begin, end;             // positions within the chunk that some query sees
};

// Part of an attention result: exp(score - peak) summed, and the values weighted by it.
struct Partial {
    float peak;   // largest score; -inf if nothing was visible
    float total;
};

struct LayerKernels {
    // out = x / sqrt(mean(x^2) + eps) * weight; weight may be null (all ones). n is a multiple of 16; out may be x.
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
    // out = (out + y) * scale
    void (*add_scaled)(const float* y, float scale, int64_t n, float* out);
    // out = gelu_tanh(gate) * up
    void (*gated_gelu)(const float* gate, const float* up, int64_t n, float* out);
    // x = cap * tanh(x / cap)
    void (*softcap)(float* x, int64_t n, float cap);
    // x *= scale
    void (*scale)(float* x, int64_t n, float scale);
    // out += x * scale
    void (*add_product)(const float* x, float scale, int64_t n, float* out);
    // Turns pairs (i, i + dim/2), i < pairs, of one head by angles given as cosines and sines. pairs is a multiple of 16.
    void (*rotate)(float* head, int64_t dim, int64_t pairs, const float* cos, const float* sin);
    // Softmax over n values (any n) in place, in float32.
    void (*softmax)(float* x, int64_t n);

    // With scores known to be within error * norm of x: lower[lane] = the largest of the lower bounds of [16 i + lane], and
    // the largest of all lower and of all upper bounds. n is a multiple of 16.
    void (*bounds)(const float* x, const float* error, float norm, int64_t n, float* lower, float* largest_lower,
                   float* largest_upper);
    // reaches[i]: for which lanes, a bit each, x[16 i + lane] + error[16 i + lane] * norm is at least `threshold`.
    void (*reaching)(const float* x, const float* error, float norm, float threshold, int64_t n, uint16_t* reaches);
    // upper[lane] = x[lane] + error[lane] * the sum over blocks b of shares[b][lane] * norms[b].
    void (*upper_by_blocks)(const float* x, const float* error, const uint8_t* shares, const float* norms, int64_t blocks,
                            float* upper);

    // Writes one position's key into its place in a page, keys being stored in blocks of 16 positions, transposed:
    // element (position, d) at ((position / 16) * dim + d) * 16 + position % 16. dim is a multiple of 32.
    void (*store_key)(KvType type, const float* key, int64_t dim, int position, void* page);
    // Writes one position's value: element (position, d) at position * dim + d.
    // In Q8_0 the codes lie like that, and after a page's codes its scales: that of (position, d) at
    // d / kKvBlock * kPagePositions + position.
    void (*store_value)(KvType type, const float* value, int64_t dim, int position, void* page);

    // Attention of `queries` queries over one chunk of a sequence's keys and values, of which query i sees
    // [first[i], last[i]). q: [dim][queries] (already scaled); out: [queries][dim]; scratch: queries * kChunkPositions floats.
    void (*attend_chunk)(KvType type, const float* q, int queries, int64_t dim, const KvChunk& chunk, const int* first,
                         const int* last, float* scratch, Partial* partial, float* out);
    // Folds a chunk's result (next, x) into the running one (total, out): the same steps whichever thread made them.
    void (*merge)(Partial* running, float* out, const Partial* next, const float* x, int64_t dim);
};

}  // namespace gmtp
