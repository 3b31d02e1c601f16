#include "gmtp/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "formats.h"
#include "gmtp/error.h"
#include "gmtp/weight.h"

namespace gmtp {
namespace {

// A product is a sum over blocks of columns, with 6 roundings a block at most, every one relative to a partial sum that
// |row| |x| bounds: this much of |row| |x| covers the rounding of both products, of their sum and of the bounds themselves.
float rounding(int64_t cols) { return 16.0f * static_cast<float>(cols / kBlock) * 0x1p-24f; }

// SplitHead::error of a row of Q8_0, and its shares, 16 bytes apart.
float error_of(const uint8_t* row, int64_t cols, uint8_t* shares) {
    const int64_t blocks = cols / kBlock;
    const double rounded = rounding(cols) * std::sqrt(kBlock) * 128;  // of a block's norm, for a scale of 1, at most
    double squared_errors = 0;
    std::vector<double> errors(blocks);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = row + b * 34;
        int squares = 0;  // of 2 (l - 3.5)
        for (int i = 0; i < kBlock; i++) {
            const int twice = 2 * (block[2 + i] & 7) - 7;
            squares += twice * twice;
        }
        const double d = half_to_float(static_cast<uint16_t>(block[0] | block[1] << 8));
        errors[b] = std::abs(d) * (std::sqrt(0.25 * squares) * 1.000001 + rounded);
        squared_errors += errors[b] * errors[b];
    }
    const auto error = static_cast<float>(std::sqrt(squared_errors) * 1.000001);
    for (int64_t b = 0; b < blocks && std::isfinite(error); b++)
        shares[b * kGroupRows] = static_cast<uint8_t>(errors[b] ? std::ceil(errors[b] / error * SplitHead::kShares) : 0);
    return error;
}

}  // namespace

std::shared_ptr<const SplitHead> SplitHead::pack(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                                 ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
    if (rows < 1 || rows % kGroupRows || cols < 1 || cols % kBlock)
        throw InputError("an output embedding in two parts needs a multiple of 16 rows of a multiple of 32 columns");
    const size_t row_bytes = file_row_bytes(WeightType::Q8_0, cols);
    if (row_bytes * static_cast<size_t>(rows) != source_bytes) throw InputError("a tensor's bytes do not match its shape");
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t high_group = group_bytes(WeightType::Q8_HIGH, cols), low_group = group_bytes(WeightType::Q8_LOW, cols);
    const size_t high_bytes = groups * high_group, low_bytes = groups * low_group, error_bytes = groups * kGroupRows * sizeof(float);
    const int64_t blocks = cols / kBlock;
    const size_t bytes = head_bytes(rows, cols);
    auto memory = aligned_bytes(bytes);
    uint8_t *high = memory.get(), *low = high + high_bytes;
    auto* error = reinterpret_cast<float*>(low + low_bytes);
    uint8_t* shares = low + low_bytes + error_bytes;

    constexpr int64_t kSlabGroups = 1024;
    for (int64_t first = 0; first < groups; first += kSlabGroups) {
        const int64_t last = std::min(first + kSlabGroups, groups);
        pool.parallel_for(last - first, 8, [&](int64_t begin, int64_t end) {
            for (int64_t g = first + begin; g < first + end; g++)
                pack_split_group(source, rows, cols, g, high + g * high_group, low + g * low_group);
            for (int64_t i = (first + begin) * kGroupRows; i < (first + end) * kGroupRows; i++) {
                error[i] = error_of(source + i * row_bytes, cols, shares + i / kGroupRows * kGroupRows * blocks + i % kGroupRows);
                if (!std::isfinite(error[i])) throw InputError("a weight is not finite");
            }
        });
        done(static_cast<size_t>(first * kGroupRows) * row_bytes, static_cast<size_t>(std::min(last * kGroupRows, rows)) * row_bytes);
    }
    return std::make_shared<SplitHead>(SplitHead{
        {WeightType::Q8_HIGH, rows, cols, high}, {WeightType::Q8_LOW, rows, cols, low}, error, shares, bytes, memory});
}

std::shared_ptr<const SplitHead> SplitHead::mapped(std::span<const uint8_t> data, int64_t rows, int64_t cols,
                                                   std::shared_ptr<const void> owner) {
    const uint8_t *high = data.data(), *low = high + packed_bytes(WeightType::Q8_HIGH, rows, cols);
    const auto* error = reinterpret_cast<const float*>(low + packed_bytes(WeightType::Q8_LOW, rows, cols));
    for (int64_t i = 0; i < rows; i++)
        if (!(error[i] >= 0 && std::isfinite(error[i]))) throw InputError("a packed output embedding has an error that is no number");
    return std::make_shared<SplitHead>(SplitHead{
        {WeightType::Q8_HIGH, rows, cols, high}, {WeightType::Q8_LOW, rows, cols, low}, error, reinterpret_cast<const uint8_t*>(error + rows),
        data.size(), std::move(owner)});
}

std::shared_ptr<Weight> pack_head(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols, ThreadPool& pool,
                                  const std::function<void(size_t, size_t)>& done) {
    auto split = SplitHead::pack(source, source_bytes, rows, cols, pool, done);
    return std::make_shared<Weight>(Weight{{WeightType::Q8_0, rows, cols, nullptr}, nullptr, split->bytes, split});
}

void SplitHead::unpack_row(int64_t row, float* out) const {
    const int64_t group = row / kGroupRows, lane = row % kGroupRows, blocks = high.cols / kBlock;
    const uint8_t* scales = high.data + group * group_bytes(high.type, high.cols);
    const uint8_t* planes = scales + (blocks * 32 + 63) / 64 * 64;
    const uint8_t* rest = low.data + group * group_bytes(low.type, low.cols) + lane / 4 * 48 * blocks;
    for (int64_t b = 0; b < blocks; b++, planes += 320, rest += 48) {
        const float d = half_to_float(static_cast<uint16_t>(scales[32 * b + 2 * lane] | scales[32 * b + 2 * lane + 1] << 8));
        for (int64_t c = 0; c < kBlock; c++) {
            const int64_t v = c / 4, at = 4 * lane + c % 4;  // vector, and byte of it
            const int four = planes[64 * (v % 4) + at] >> 4 * (v / 4) & 15;
            const int fifth = planes[256 + at] >> v & 1;
            const int64_t of_four = 4 * (lane % 4) + c % 4;
            const int two = rest[16 * (v % 2) + of_four] >> 2 * (v / 2) & 3;
            const int third = rest[32 + of_four] >> v & 1;
            *out++ = d * static_cast<float>(((four | fifth << 4) << 3 | two | third << 2) - 128);
        }
    }
}

}  // namespace gmtp
