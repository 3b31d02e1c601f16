// Packing of GGUF tensors into the layout of matrix.h, and back.
//
// A group of a quantised type is first the scales of its file blocks, then the codes of its 32-column blocks:
//   scales of a block: d[16] fp16, min[16] fp16 if the type has one, then for each small scale its 16 bytes, followed by
//   the 16 bytes of its minimum if there is one; the scales of the whole group are padded to 64 bytes;
//   codes of 16 rows x 32 columns: eight vectors of 64 bytes, byte 4 r + i of vector v being row r, column 4 v + i, cut
//   into planes of n = 8, 4, 2 or 1 bits: n vectors a plane set, in which vector v is field v / n of plane v % n.
//   5-bit codes are a 4-bit set and a 1-bit set, 6-bit ones 4 and 2, 3-bit ones 2 and 1: low bits first.
// A group of a float type is its columns, 16 values each, padded with zero columns to a multiple of four.
#include "gmtp/matrix.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "formats.h"
#include "gmtp/error.h"

namespace gmtp {
namespace {

constexpr int kVectors = 8;
constexpr int kVectorBytes = 64;
using Vectors = uint8_t[kVectors][kVectorBytes];

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int float_bytes(WeightType t) { return t == WeightType::F32 ? 4 : 2; }

size_t scales_of_group(const Format& f, int64_t cols) {
    return (size_t)round_up(cols / f.block * (int64_t)f.scale_bytes(), kVectorBytes);
}

void check_columns(WeightType t, int64_t cols) {
    if (cols <= 0 || cols % type_block(t))
        throw InputError("A weight matrix has " + std::to_string(cols) + " columns, but its type needs a positive multiple of " +
                         std::to_string(type_block(t)) + ".");
}

// The low and high plane sets of a code of `bits` bits.
constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

// The n bits of each code from bit `shift`.
template <int n, int shift> void put_planes(const Vectors& v, uint8_t* planes) {
    constexpr uint8_t mask = (1 << n) - 1;
    for (int p = 0; p < n; p++)
        for (int i = 0; i < kVectorBytes; i++) {
            uint8_t byte = 0;
            for (int field = 0; field < 8 / n; field++)
                byte |= (uint8_t)((uint8_t)(v[p + n * field][i] >> shift & mask) << n * field);
            planes[kVectorBytes * p + i] = byte;
        }
}

template <int bits> void put_codes(const Vectors& v, uint8_t* planes) {
    constexpr int low = low_bits(bits);
    put_planes<low, 0>(v, planes);
    if constexpr (bits > low) put_planes<bits - low, low>(v, planes + kVectorBytes * low);
}

void put_codes(int bits, const Vectors& v, uint8_t* planes) {
    switch (bits) {
        case 2: return put_codes<2>(v, planes);
        case 3: return put_codes<3>(v, planes);
        case 4: return put_codes<4>(v, planes);
        case 5: return put_codes<5>(v, planes);
        case 6: return put_codes<6>(v, planes);
        case 8: return put_codes<8>(v, planes);
    }
}

// Adds the n-bit fields of row `lane`, 32 columns, to codes, at bit `shift`.
void get_planes(int n, const uint8_t* planes, int lane, int shift, uint8_t* codes) {
    for (int v = 0; v < kVectors; v++)
        for (int i = 0; i < 4; i++) {
            const int byte = planes[kVectorBytes * (v % n) + 4 * lane + i];
            codes[4 * v + i] |= (uint8_t)((byte >> n * (v / n) & ((1 << n) - 1)) << shift);
        }
}

void put_scales(const Format& f, const BlockScales& s, int lane, uint8_t* unit) {
    memcpy(unit + 2 * lane, &s.d, 2);
    unit += 2 * kGroupRows;
    if (f.has_min) memcpy(unit + 2 * lane, &s.min, 2), unit += 2 * kGroupRows;
    for (int j = 0; j < f.small_scales; j++) {
        unit[lane] = s.small[j], unit += kGroupRows;
        if (f.small_mins) unit[lane] = s.small_min[j], unit += kGroupRows;
    }
}

BlockScales get_scales(const Format& f, int lane, const uint8_t* unit) {
    BlockScales s{};
    memcpy(&s.d, unit + 2 * lane, 2);
    unit += 2 * kGroupRows;
    if (f.has_min) memcpy(&s.min, unit + 2 * lane, 2), unit += 2 * kGroupRows;
    for (int j = 0; j < std::min(f.small_scales, 16); j++) {
        s.small[j] = unit[lane], unit += kGroupRows;
        if (f.small_mins) s.small_min[j] = unit[lane], unit += kGroupRows;
    }
    return s;
}

void pack_quantised(WeightType t, const uint8_t* src, int lanes, int64_t cols, uint8_t* dst) {
    constexpr int chunk = 256;  // columns at a time
    const Format& f = format(t);
    const size_t row_bytes = file_row_bytes(t, cols);
    uint8_t* codes_out = dst + scales_of_group(f, cols);
    memset(dst, 0, (size_t)(codes_out - dst));
    uint8_t codes[kGroupRows][chunk] = {};
    for (int64_t c = 0; c < cols; c += chunk) {
        const int width = (int)std::min<int64_t>(chunk, cols - c), blocks = width / f.block;
        for (int lane = 0; lane < lanes; lane++) {
            const uint8_t* block = src + lane * row_bytes + c / f.block * f.file_bytes;
            read_codes(t, block, blocks, codes[lane]);
            uint8_t* unit = dst + c / f.block * f.scale_bytes();
            for (int b = 0; b < blocks; b++, block += f.file_bytes, unit += f.scale_bytes()) {
                if (f.small_scales) {
                    put_scales(f, read_scales(t, block), lane, unit);
                } else {  // the block starts with its scale and minimum
                    memcpy(unit + 2 * lane, block, 2);
                    if (f.has_min) memcpy(unit + 2 * (kGroupRows + lane), block + 2, 2);
                }
            }
        }
        for (int k = 0; k < width / kBlock; k++, codes_out += f.code_bytes()) {
            alignas(kVectorBytes) Vectors v;
            for (int lane = 0; lane < kGroupRows; lane++)
                for (int i = 0; i < kVectors; i++) memcpy(&v[i][4 * lane], &codes[lane][kBlock * k + 4 * i], 4);
            put_codes(f.bits, v, codes_out);
        }
    }
}

template <class Value> void pack_float(const uint8_t* src, int lanes, int64_t cols, uint8_t* dst) {
    Value* out = reinterpret_cast<Value*>(dst);
    memset(dst, 0, sizeof(Value) * kGroupRows * round_up(cols, 4));
    for (int64_t c0 = 0; c0 < cols; c0 += 16)
        for (int lane = 0; lane < lanes; lane++)
            for (int64_t c = c0; c < std::min(c0 + 16, cols); c++)
                memcpy(&out[kGroupRows * c + lane], src + sizeof(Value) * (lane * cols + c), sizeof(Value));
}

float load_value(WeightType t, const uint8_t* p) {
    uint32_t bits = 0;
    memcpy(&bits, p, float_bytes(t));
    if (t == WeightType::F16) return half_to_float((uint16_t)bits);
    if (t == WeightType::BF16) bits <<= 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

}  // namespace

int64_t type_block(WeightType t) { return is_float(t) ? 1 : format(t).block; }

size_t file_row_bytes(WeightType t, int64_t cols) {
    check_columns(t, cols);
    return is_float(t) ? (size_t)(cols * float_bytes(t)) : (size_t)(cols / format(t).block * format(t).file_bytes);
}

size_t group_bytes(WeightType t, int64_t cols) {
    check_columns(t, cols);
    if (is_float(t)) return (size_t)(round_up(cols, 4) * kGroupRows * float_bytes(t));
    const Format& f = format(t);
    const size_t scales = t == WeightType::Q8_LOW ? 0 : scales_of_group(f, cols);
    return scales + cols / kBlock * f.code_bytes();
}

void pack_groups(WeightType t, const uint8_t* src, int64_t rows, int64_t cols, int64_t group0, int64_t group1, uint8_t* dst) {
    const size_t row_bytes = file_row_bytes(t, cols), size = group_bytes(t, cols);
    for (int64_t g = group0; g < group1; g++) {
        const uint8_t* from = src + g * kGroupRows * row_bytes;
        uint8_t* to = dst + g * size;
        const int lanes = (int)std::min<int64_t>(kGroupRows, rows - g * kGroupRows);
        if (t == WeightType::F32) pack_float<uint32_t>(from, lanes, cols, to);
        else if (is_float(t)) pack_float<uint16_t>(from, lanes, cols, to);
        else pack_quantised(t, from, lanes, cols, to);
    }
}

void pack_split_group(const uint8_t* src, int64_t rows, int64_t cols, int64_t group, uint8_t* high, uint8_t* low) {
    const Format& f = format(WeightType::Q8_0);
    const size_t row_bytes = file_row_bytes(WeightType::Q8_0, cols);
    const int lanes = (int)std::min<int64_t>(kGroupRows, rows - group * kGroupRows);
    const uint8_t* from = src + group * kGroupRows * row_bytes;
    const Format& high_format = format(WeightType::Q8_HIGH);
    uint8_t* planes = high + scales_of_group(high_format, cols);
    memset(high, 0, (size_t)(planes - high));
    uint8_t codes[kGroupRows][kBlock] = {};
    const int64_t blocks = cols / kBlock;
    for (int64_t b = 0; b < blocks; b++, planes += high_format.code_bytes()) {
        for (int lane = 0; lane < lanes; lane++) {
            const uint8_t* block = from + lane * row_bytes + b * f.file_bytes;
            read_codes(WeightType::Q8_0, block, 1, codes[lane]);
            memcpy(high + b * high_format.scale_bytes() + 2 * lane, block, 2);
        }
        alignas(kVectorBytes) Vectors highs, lows;
        for (int lane = 0; lane < kGroupRows; lane++)
            for (int i = 0; i < kVectors; i++) memcpy(&lows[i][4 * lane], &codes[lane][4 * i], 4);
        for (int i = 0; i < kVectors; i++)
            for (int j = 0; j < kVectorBytes; j++) highs[i][j] = lows[i][j] >> 3, lows[i][j] &= 7;
        put_codes<5>(highs, planes);
        uint8_t low_planes[3 * kVectorBytes];
        put_codes<3>(lows, low_planes);
        for (int four = 0; four < 4; four++)
            for (int p = 0; p < 3; p++) memcpy(low + 48 * (four * blocks + b) + 16 * p, low_planes + kVectorBytes * p + 16 * four, 16);
    }
}

void unpack_row(const Matrix& m, int64_t row, float* out) {
    const int lane = (int)(row % kGroupRows);
    const uint8_t* group = m.data + row / kGroupRows * group_bytes(m.type, m.cols);
    if (is_float(m.type)) {
        const int size = float_bytes(m.type);
        for (int64_t c = 0; c < m.cols; c++) out[c] = load_value(m.type, group + (c * kGroupRows + lane) * size);
        return;
    }
    const Format& f = format(m.type);
    const int low = low_bits(f.bits), high = f.bits - low;
    const uint8_t* planes = group + scales_of_group(f, m.cols);
    for (int64_t b = 0; b < m.cols / f.block; b++, out += f.block) {
        uint8_t codes[256] = {};
        for (int c = 0; c < f.block; c += kBlock, planes += f.code_bytes()) {
            get_planes(low, planes, lane, 0, codes + c);
            if (high) get_planes(high, planes + kVectorBytes * low, lane, low, codes + c);
        }
        block_values(m.type, codes, get_scales(f, lane, group + b * f.scale_bytes()), out);
    }
}

void dequantize(WeightType t, const uint8_t* src, int64_t count, float* out) {
    if (is_float(t)) {
        for (int64_t i = 0; i < count; i++) out[i] = load_value(t, src + i * float_bytes(t));
        return;
    }
    const Format& f = format(t);
    if (count % f.block) throw InputError("A count of values to dequantise must be a multiple of the type's block.");
    uint8_t codes[256];
    for (; count; count -= f.block, src += f.file_bytes, out += f.block) {
        read_codes(t, src, 1, codes);
        block_values(t, codes, read_scales(t, src), out);
    }
}

}  // namespace gmtp
