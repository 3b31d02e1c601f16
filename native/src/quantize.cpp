// float32 weights as the blocks of a GGUF tensor.
//
// The types with blocks of 32 follow the plain rule of the format: the block's largest value sets the scale, and codes
// are rounded. Q4_K and Q6_K have scales of their own that are rounded too, so they are searched for: each sub-block's
// scale (and minimum) by trying several ranges with a least-squares fit of each, then, for the super-block as a whole,
// the small scales' neighbours and the large scales' own fit in turn, for as long as the error gets less. The error
// that counts is squared and weighted by sigma + |x|, sigma being the super-block's root mean square: large weights
// matter more.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "formats.h"
#include "gmtp/error.h"
#include "gmtp/matrix.h"

namespace gmtp {
namespace {

constexpr int kSuper = 256;

uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// Rounded to nearest even; infinite beyond the range.
uint16_t nearest_half(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7FFFFFFF;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000)  // a multiple of 2^-24, the last bit of 0.5
        return (uint16_t)(sign | (bits_of(std::fabs(x) + 0.5f) - 0x3F000000));
    return (uint16_t)(sign | (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

[[noreturn]] void too_large(const char* type) {
    throw InputError(std::string("a weight is too large for the type ") + type);
}

// A scale or a value as fp16, which must stay finite.
uint16_t half(float x) {
    const uint16_t h = nearest_half(x);
    if ((h & 0x7FFF) == 0x7C00) too_large("F16, or for the scale of a quantised type");
    return h;
}

uint16_t bfloat(float x) {
    const uint32_t bits = bits_of(x), rounded = bits + 0x7FFF + (bits >> 16 & 1);
    if ((rounded & 0x7F800000) == 0x7F800000) too_large("BF16");
    return (uint16_t)(rounded >> 16);
}

void put16(uint8_t* p, uint16_t value) { p[0] = (uint8_t)value, p[1] = (uint8_t)(value >> 8); }

float inverse(float d) { return d == 0 || std::isinf(1 / d) ? 0 : 1 / d; }

// Types with one scale a block: all codes' fifth bits, then bytes with the low four bits of code i and code i + 16.
void put_codes(const uint8_t* codes, int bits, uint8_t* out) {
    if (bits == 5) {
        uint32_t fifths = 0;
        for (int i = 0; i < 32; i++) fifths |= (uint32_t)(codes[i] >> 4) << i;
        memcpy(out, &fifths, 4), out += 4;
    }
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)((codes[i] & 15) | codes[i + 16] << 4);
}

// x ~ d * (code - 2^(bits - 1)): the value farthest from zero gets the code 0.
void symmetric_block(const float* x, int bits, uint8_t* out) {
    float extreme = x[0];
    for (int i = 1; i < 32; i++)
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    const int bias = 1 << (bits - 1);
    const float d = extreme / (float)-bias, id = inverse(d);
    uint8_t codes[32];
    put16(out, half(d));
    for (int i = 0; i < 32; i++)
        codes[i] = (uint8_t)std::clamp((int)(x[i] * id + ((float)bias + 0.5f)), 0, 2 * bias - 1);
    put_codes(codes, bits, out + 2);
}

// x ~ d * code + least value.
void affine_block(const float* x, int bits, uint8_t* out) {
    const auto [least, most] = std::minmax_element(x, x + 32);
    const int top = (1 << bits) - 1;
    const float d = (*most - *least) / (float)top, id = inverse(d), low = *least;
    uint8_t codes[32];
    put16(out, half(d)), put16(out + 2, half(low));
    for (int i = 0; i < 32; i++) codes[i] = (uint8_t)std::clamp((int)((x[i] - low) * id + 0.5f), 0, top);
    put_codes(codes, bits, out + 4);
}

void q8_0_block(const float* x, uint8_t* out) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(x[i]));
    const float d = largest / 127, id = inverse(d);
    put16(out, half(d));
    for (int i = 0; i < 32; i++) {  // halves away from zero
        const float scaled = x[i] * id, whole = (float)(int)scaled, rest = scaled - whole;
        out[2 + i] = (uint8_t)(int8_t)(whole + (float)(rest >= 0.5f) - (float)(rest <= -0.5f));
    }
}

// Four values at once: the searches below spend their time here, and compilers do not find this by themselves.
using Four = float __attribute__((vector_size(16)));

Four load(const float* p) {
    Four v;
    memcpy(&v, p, sizeof v);
    return v;
}

float sum(Four v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// The whole number nearest to x within low..high, for bounds below 2^22.
template <class Value> Value nearest(Value x, float low, float high) {
    const Value lowest = Value{} + low, highest = Value{} + high;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    return (x + 12582912.0f) - 12582912.0f;
}

// The weight of each value's error.
std::array<float, kSuper> importance(const float* x) {
    double squares = 0;
    for (int i = 0; i < kSuper; i++) {
        if (std::fabs(x[i]) > 65504.0f * 63 * 15) too_large("Q4_K or Q6_K");
        squares += (double)x[i] * x[i];
    }
    const float sigma = (float)std::sqrt(squares / kSuper);
    std::array<float, kSuper> w;
    for (int i = 0; i < kSuper; i++) w[i] = sigma + std::fabs(x[i]);
    return w;
}

// Of n values under x ~ scale * code - low, with the best codes in first..last.
template <int n> float error(const float* x, const float* w, float scale, float low, float first, float last) {
    const float inv = inverse(scale);
    Four total{};
    for (int i = 0; i < n; i += 4) {
        const Four value = load(x + i) + low, miss = scale * nearest(value * inv, first, last) - value;
        total += load(w + i) * miss * miss;
    }
    return sum(total);
}

// Q4_K: x ~ d * scale * code - dmin * low in each sub-block of 32, codes of 4 bits, scale and low of 6.
struct Range {
    float scale = 0, low = 0;
};

// The scale and low >= 0 that fit the codes which `start` gives to 32 values best.
Range refit(const float* x, const float* w, Range start) {
    const float inv = inverse(start.scale);
    Four totals[5] = {};
    for (int i = 0; i < 32; i += 4) {
        const Four value = load(x + i), weight = load(w + i);
        const Four q = nearest((value + start.low) * inv, 0, 15), wq = weight * q;
        totals[0] += weight, totals[1] += wq, totals[2] += wq * q, totals[3] += weight * value, totals[4] += wq * value;
    }
    const float sw = sum(totals[0]), sq = sum(totals[1]), sqq = sum(totals[2]);
    const float sx = sum(totals[3]), sqx = sum(totals[4]);
    const float det = sw * sqq - sq * sq;
    if (!(det > 0)) return start;
    Range fit;
    fit.scale = (sw * sqx - sq * sx) / det;
    fit.low = (fit.scale * sq - sx) / sw;
    if (fit.low < 0) fit = {sqx / sqq, 0};
    return fit.scale > 0 ? fit : start;
}

Range best_range(const float* x, const float* w) {
    const auto [least, most] = std::minmax_element(x, x + 32);
    const float low = std::max(-*least, 0.0f), width = *most + low;
    if (!(width > 0)) return {0, low};
    Range best;
    float least_error = INFINITY;
    for (int step = -2; step <= 6; step++) {  // the range in 14 to 18 steps of the code: a little wider, or cut off
        Range range = {width / (15 + 0.5f * (float)step), low};
        for (int again = 0; again < 2; again++) range = refit(x, w, range);
        const float e = error<32>(x, w, range.scale, range.low, 0, 15);
        if (e < least_error) least_error = e, best = range;
    }
    return best;
}

struct Q4K {
    uint16_t d = 0, dmin = 0;
    int scale[8] = {}, low[8] = {};
    float step(int j) const { return half_to_float(d) * (float)scale[j]; }
    float offset(int j) const { return half_to_float(dmin) * (float)low[j]; }
};

float error_of(const float* x, const float* w, const Q4K& q) {
    float total = 0;
    for (int j = 0; j < 8; j++) total += error<32>(x + 32 * j, w + 32 * j, q.step(j), q.offset(j), 0, 15);
    return total;
}

// Moves each sub-block's scale and low by at most one, to where they err least.
void move_small_scales(const float* x, const float* w, Q4K& q) {
    const float d = half_to_float(q.d), dmin = half_to_float(q.dmin);
    for (int j = 0; j < 8; j++) {
        const int scale = q.scale[j], low = q.low[j];
        float least = INFINITY;
        for (int s = std::max(scale - 1, 0); s <= std::min(scale + 1, 63); s++)
            for (int l = std::max(low - 1, 0); l <= std::min(low + 1, 63); l++) {
                const float e = error<32>(x + 32 * j, w + 32 * j, d * (float)s, dmin * (float)l, 0, 15);
                if (e < least) least = e, q.scale[j] = s, q.low[j] = l;
            }
    }
}

// The large scales that fit all codes best, if there are such.
bool refit_large_scales(const float* x, const float* w, Q4K& q) {
    double uu = 0, uv = 0, vv = 0, xu = 0, xv = 0;  // x ~ d * u - dmin * v
    for (int i = 0; i < kSuper; i++) {
        const int j = i / 32;
        const float code = nearest((x[i] + q.offset(j)) * inverse(q.step(j)), 0, 15);
        const double u = (double)q.scale[j] * code, v = q.low[j], weight = w[i];
        uu += weight * u * u, uv += weight * u * v, vv += weight * v * v;
        xu += weight * x[i] * u, xv += weight * x[i] * v;
    }
    const double det = uu * vv - uv * uv;
    if (!(uu > 0) || (vv > 0 && !(det > 0))) return false;
    const double d = vv > 0 ? (xu * vv - xv * uv) / det : xu / uu, dmin = vv > 0 ? (xu * uv - xv * uu) / det : 0;
    if (!(d > 0) || !(dmin >= 0)) return false;
    q.d = half((float)d), q.dmin = half((float)dmin);
    return true;
}

// Alternates moves and fits while the error gets less, a few times at most.
template <class Scales> void refine(const float* x, const float* w, Scales& best) {
    float least = error_of(x, w, best);
    for (int round = 0; round < 4; round++) {
        Scales next = best;
        if (round > 0 && !refit_large_scales(x, w, next)) return;
        move_small_scales(x, w, next);
        const float e = error_of(x, w, next);
        if (!(e < least) && round > 0) return;
        if (e < least) least = e, best = next;
    }
}

void q4_k_block(const float* x, uint8_t* out) {
    const auto w = importance(x);
    Range ranges[8], largest;
    for (int j = 0; j < 8; j++) {
        ranges[j] = best_range(x + 32 * j, w.data() + 32 * j);
        largest = {std::max(largest.scale, ranges[j].scale), std::max(largest.low, ranges[j].low)};
    }
    Q4K q;
    q.d = half(largest.scale / 63), q.dmin = half(largest.low / 63);
    const float id = inverse(half_to_float(q.d)), idmin = inverse(half_to_float(q.dmin));
    for (int j = 0; j < 8; j++) {
        q.scale[j] = (int)nearest(ranges[j].scale * id, 0, 63);
        q.low[j] = (int)nearest(ranges[j].low * idmin, 0, 63);
    }
    refine(x, w.data(), q);
    put16(out, q.d), put16(out + 2, q.dmin);
    uint8_t* small = out + 4;
    for (int j = 0; j < 4; j++) {
        small[j] = (uint8_t)(q.scale[j] | q.scale[j + 4] >> 4 << 6);
        small[j + 4] = (uint8_t)(q.low[j] | q.low[j + 4] >> 4 << 6);
        small[j + 8] = (uint8_t)((q.scale[j + 4] & 15) | (q.low[j + 4] & 15) << 4);
    }
    uint8_t codes[kSuper];
    for (int i = 0; i < kSuper; i++)
        codes[i] = (uint8_t)nearest((x[i] + q.offset(i / 32)) * inverse(q.step(i / 32)), 0, 15);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 32; i++) out[16 + 32 * k + i] = (uint8_t)(codes[64 * k + i] | codes[64 * k + 32 + i] << 4);
}

// Q6_K: x ~ d * scale * (code - 32) in each sub-block of 16, codes of 6 bits, scale a signed byte.
struct Q6K {
    uint16_t d = 0;
    int scale[16] = {};
    float step(int j) const { return half_to_float(d) * (float)scale[j]; }
};

float best_scale(const float* x, const float* w) {
    float extreme = 0;
    for (int i = 0; i < 16; i++)
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    if (extreme == 0) return 0;
    float best = 0, least = INFINITY;
    for (int step = -3; step <= 3; step++) {
        float scale = -extreme / (32 + 0.5f * (float)step);
        const float inv = inverse(scale);
        Four xq{}, qq{};
        for (int i = 0; i < 16; i += 4) {
            const Four q = nearest(load(x + i) * inv, -32, 31), wq = load(w + i) * q;
            xq += wq * load(x + i), qq += wq * q;
        }
        if (!(sum(qq) > 0)) continue;
        scale = sum(xq) / sum(qq);
        if (const float e = error<16>(x, w, scale, 0, -32, 31); e < least) least = e, best = scale;
    }
    return best;
}

float error_of(const float* x, const float* w, const Q6K& q) {
    float total = 0;
    for (int j = 0; j < 16; j++) total += error<16>(x + 16 * j, w + 16 * j, q.step(j), 0, -32, 31);
    return total;
}

void move_small_scales(const float* x, const float* w, Q6K& q) {
    const float d = half_to_float(q.d);
    for (int j = 0; j < 16; j++) {
        const int scale = q.scale[j];
        float least = INFINITY;
        for (int s = std::max(scale - 1, -128); s <= std::min(scale + 1, 127); s++) {
            const float e = error<16>(x + 16 * j, w + 16 * j, d * (float)s, 0, -32, 31);
            if (e < least) least = e, q.scale[j] = s;
        }
    }
}

bool refit_large_scales(const float* x, const float* w, Q6K& q) {
    double uu = 0, xu = 0;  // x ~ d * u
    for (int i = 0; i < kSuper; i++) {
        const int j = i / 16;
        const double u = (double)q.scale[j] * nearest(x[i] * inverse(q.step(j)), -32, 31);
        uu += w[i] * u * u, xu += w[i] * x[i] * u;
    }
    if (!(uu > 0)) return false;
    q.d = half((float)(xu / uu));
    return true;
}

void q6_k_block(const float* x, uint8_t* out) {
    const auto w = importance(x);
    float scales[16], largest = 0;
    for (int j = 0; j < 16; j++) {
        scales[j] = best_scale(x + 16 * j, w.data() + 16 * j);
        if (std::fabs(scales[j]) > std::fabs(largest)) largest = scales[j];
    }
    Q6K q;
    q.d = half(largest / -128);
    const float id = inverse(half_to_float(q.d));
    for (int j = 0; j < 16; j++) q.scale[j] = (int)nearest(scales[j] * id, -128, 127);
    refine(x, w.data(), q);
    uint8_t codes[kSuper];
    for (int i = 0; i < kSuper; i++) codes[i] = (uint8_t)(nearest(x[i] * inverse(q.step(i / 16)), -32, 31) + 32);
    memset(out, 0, 192);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 64; i++) {
            const uint8_t* c = codes + 128 * h + i;
            out[64 * h + i] = (uint8_t)((c[0] & 15) | (c[64] & 15) << 4);
            out[128 + 32 * h + i % 32] |= (uint8_t)((c[0] >> 4) << 2 * (i / 32) | (c[64] >> 4) << 2 * (2 + i / 32));
        }
    for (int j = 0; j < 16; j++) out[192 + j] = (uint8_t)(int8_t)q.scale[j];
    put16(out + 208, q.d);
}

void quantize_block(WeightType t, const float* x, uint8_t* out) {
    switch (t) {
        case WeightType::Q4_0: return symmetric_block(x, 4, out);
        case WeightType::Q4_1: return affine_block(x, 4, out);
        case WeightType::Q5_0: return symmetric_block(x, 5, out);
        case WeightType::Q5_1: return affine_block(x, 5, out);
        case WeightType::Q8_0: return q8_0_block(x, out);
        case WeightType::Q4_K: return q4_k_block(x, out);
        case WeightType::Q6_K: return q6_k_block(x, out);
        default: throw InputError("weights cannot be converted to this type");
    }
}

}  // namespace

void quantize(WeightType t, const float* x, int64_t count, uint8_t* out) {
    if (count % type_block(t)) throw InputError("a count of values to quantise must be a multiple of the type's block");
    for (int64_t i = 0; i < count; i++)
        if (!std::isfinite(x[i])) throw InputError("a weight is not a finite number");
    if (t == WeightType::F32) {
        memcpy(out, x, (size_t)count * 4);
    } else if (is_float(t)) {
        for (int64_t i = 0; i < count; i++) put16(out + 2 * i, t == WeightType::F16 ? half(x[i]) : bfloat(x[i]));
    } else {
        const Format& f = format(t);
        for (int64_t i = 0; i < count; i += f.block, out += f.file_bytes) quantize_block(t, x + i, out);
    }
}

}  // namespace gmtp
