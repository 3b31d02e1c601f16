// The vector part of sampling: maxima, selection, softmax weights, Gumbel noise.
#include "gmtp/sampler.h"
#include "gmtp/simd.h"

namespace gmtp::GMTP_ISA {
namespace {

// Sixteen logits from i, those past the end -inf.
inline f32x16 load_logits(const float* logits, int64_t i, int64_t n) {
    if (i + 16 <= n) return load(logits + i);
    float lanes[16];
    for (int lane = 0; lane < 16; lane++) lanes[lane] = i + lane < n ? logits[i + lane] : -__builtin_inff();
    return load(lanes);
}

// Sixteen token ids from i: those listed, or without a list i itself.
inline i32x16 load_ids(const int32_t* ids, int64_t i, int64_t n) {
    alignas(64) static constexpr int32_t lane_ids[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (!ids) return load(lane_ids) + set1((int32_t)i);
    if (i + 16 <= n) return load(ids + i);
    int32_t lanes[16] = {};
    memcpy(lanes, ids + i, (size_t)(n - i) * 4);
    return load(lanes);
}

// The next float below x, so that "greater than below(x)" is "at least x". x is not NaN.
inline float below(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x == -__builtin_inff()) return x;
    bits = x == 0 ? 0x80000001u : x > 0 ? bits - 1 : bits + 1;
    memcpy(&x, &bits, 4);
    return x;
}

void lane_maxima(const float* logits, int64_t n, float* maxima, float* block_maxima) {
    for (int64_t block = 0; block < n; block += kSampleBlock) {
        int64_t end = block + kSampleBlock < n ? block + kSampleBlock : n;
        f32x16 best = set1(-__builtin_inff());
        for (int64_t i = block; i < end; i += 16) best = max(load_logits(logits, i, n), best);
        store(maxima + block / kSampleBlock * 16, best);
        block_maxima[block / kSampleBlock] = max_lane(best);
    }
}

int64_t collect(const float* logits, int64_t begin, int64_t end, float floor, float* values, int32_t* ids) {
    int64_t count = 0;
    const f32x16 bar = set1(below(floor));
    for (int64_t i = begin; i < end; i += 16) {
        if (!any_greater(load_logits(logits, i, end), bar)) continue;
        for (int64_t j = i; j < i + 16 && j < end; j++)
            if (logits[j] >= floor) {
                values[count] = logits[j];
                ids[count++] = (int32_t)j;
            }
    }
    return count;
}

void weights(const float* logits, int64_t n, float shift, float scale, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 w = exp((load_logits(logits, i, n) - set1(shift)) * set1(scale));
        if (i + 16 <= n) {
            store(out + i, w);
        } else {
            float lanes[16];
            store(lanes, w);
            memcpy(out + i, lanes, (size_t)(n - i) * 4);
        }
    }
}

double total_weight(const float* logits, int64_t n, float shift, float scale) {
    double total = 0;
    for (int64_t block = 0; block < n; block += kSampleBlock) {
        int64_t end = block + kSampleBlock < n ? block + kSampleBlock : n;
        f32x16 part = zero();
        for (int64_t i = block; i < end; i += 16)
            part = part + exp((load_logits(logits, i, n) - set1(shift)) * set1(scale));
        total += sum(part);
    }
    return total;
}

// The finaliser of MurmurHash3 (Austin Appleby, public domain): every input bit flips each output bit about half the time.
inline i32x16 mix(i32x16 x) {
    x = (x ^ shr<16>(x)) * set1((int32_t)0x85EBCA6B);
    x = (x ^ shr<13>(x)) * set1((int32_t)0xC2B2AE35);
    return x ^ shr<16>(x);
}

// A uniform v in (0, 1], 31 random bits with the fine grain at 0, where the large noise comes from.
inline f32x16 uniform(i32x16 ids, NoiseKey key) {
    i32x16 bits = shr<1>(mix(mix(ids ^ set1((int32_t)key.a)) + set1((int32_t)key.b)));
    return (to_float(bits) + set1(0.5f)) * set1(0x1p-31f);
}

// -log(-log(1 - v)). The inner logarithm is log1p(-v) = log(w) v / (1 - w) for w = 1 - v rounded (Kahan), v where w is 1.
inline f32x16 gumbel_of(f32x16 v) {
    const f32x16 one = set1(1.0f);
    f32x16 w = max(one - v, set1(0x1p-25f));
    f32x16 exponential = where_less(w, one, (zero() - log(w)) * v / (one - w), v);
    return zero() - log(exponential);
}

// Since -log(1 - v) >= v, the noise is at most -log v <= k ln 2 with 2^-k <= v; a little more covers the rounding.
constexpr float kLn2 = 0.69314718f, kSlack = 1e-3f;
static_assert(kLargestNoise > 33 * kLn2);
inline f32x16 gumbel_bound(f32x16 v) {
    f32x16 k = set1(127.0f) - to_float(shr<23>(as_int(v)));
    return fma(k, set1(kLn2), set1(kSlack));
}

// Logarithms are taken only for lanes that could still win: a few dozen of a vocabulary.
Winner noisy_argmax(const float* logits, const int32_t* ids, int64_t n, float shift, float scale, NoiseKey key,
                    Winner best) {
    f32x16 bar = set1(below(best.score));
    const f32x16 largest = set1(kLargestNoise);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 score = (load_logits(logits, i, n) - set1(shift)) * set1(scale);
        if (!any_greater(score + largest, bar)) continue;
        i32x16 id = load_ids(ids, i, n);
        f32x16 v = uniform(id, key);
        if (!any_greater(score + gumbel_bound(v), bar)) continue;
        float scores[16];
        int32_t tokens[16];
        store(scores, score + gumbel_of(v));
        store(tokens, id);
        for (int lane = 0; lane < 16 && i + lane < n; lane++)
            if (scores[lane] > best.score || (scores[lane] == best.score && tokens[lane] < best.token))
                best = {scores[lane], tokens[lane]};
        bar = set1(below(best.score));
    }
    return best;
}

void gumbel(NoiseKey key, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
        float lanes[16];
        store(lanes, gumbel_of(uniform(load_ids(nullptr, i, n), key)));
        memcpy(out + i, lanes, (size_t)(n - i < 16 ? n - i : 16) * 4);
    }
}

float noisy_lower(const float* x, const float* error, float norm, int64_t first, int64_t n, float temperature, NoiseKey key,
                  float best) {
    const f32x16 minus = set1(-norm), t = set1(temperature), largest = set1(temperature * kLargestNoise);
    f32x16 bar = set1(best);
    for (int64_t i = 0; i < n; i += 16) {
        const f32x16 lower = fma(load(error + i), minus, load(x + i));
        if (!any_greater(lower + largest, bar)) continue;
        const f32x16 v = uniform(load_ids(nullptr, first + i, first + n), key);
        if (!any_greater(fma(gumbel_bound(v), t, lower), bar)) continue;
        best = __builtin_fmaxf(best, max_lane(fma(gumbel_of(v), t, lower)));
        bar = set1(best);
    }
    return best;
}

void noisy_reaching(const float* x, const float* error, float norm, int64_t first, int64_t n, float temperature, NoiseKey key,
                    float threshold, uint16_t* reaches) {
    const f32x16 factor = set1(norm), t = set1(temperature), largest = set1(temperature * kLargestNoise);
    const f32x16 bar = set1(below(threshold));
    for (int64_t i = 0; i < n; i += 16) {
        const f32x16 upper = fma(load(error + i), factor, load(x + i));
        if (!any_greater(upper + largest, bar)) continue;
        const f32x16 v = uniform(load_ids(nullptr, first + i, first + n), key);
        reaches[i / 16] |= greater(fma(gumbel_bound(v), t, upper), bar);
    }
}

float log_of(float x) {
    float lanes[16];
    store(lanes, log(set1(x)));
    return lanes[0];
}

}  // namespace

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {lane_maxima, collect, weights, total_weight, noisy_argmax, gumbel, log_of,
                                          noisy_lower, noisy_reaching};

}  // namespace gmtp::GMTP_ISA
