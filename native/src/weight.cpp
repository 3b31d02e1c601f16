#include "gmtp/weight.h"

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "gmtp/error.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gmtp {

constexpr size_t kHugePage = 2 << 20;

std::shared_ptr<uint8_t[]> aligned_bytes(size_t bytes) {
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage, size = (bytes + alignment - 1) / alignment * alignment;
    void* p = std::aligned_alloc(alignment, size);
    if (!p) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // Fewer misses of the TLB in a walk over all weights. Advice: that it is not taken is no error.
    if (alignment == kHugePage) madvise(p, size, MADV_HUGEPAGE);
#endif
    return {static_cast<uint8_t*>(p), [](uint8_t* q) { std::free(q); }};
}

namespace {

void check_source(WeightType type, size_t source_bytes, int64_t rows, int64_t cols) {
    if (rows < 1 || cols < 1) throw InputError("a matrix needs at least one row and one column");
    if (cols % type_block(type)) throw InputError("a row of this type must be a multiple of " + std::to_string(type_block(type)) + " columns long");
    if (file_row_bytes(type, cols) * static_cast<size_t>(rows) != source_bytes)
        throw InputError("a tensor's bytes do not match its shape");
}

void check_place(std::span<const uint8_t> data, size_t bytes) {
    if (data.size() != bytes) throw InputError("a packed matrix's bytes do not match its shape");
    if (reinterpret_cast<uintptr_t>(data.data()) % 64) throw InputError("a packed matrix does not start at a multiple of 64 bytes");
}

// Fills the groups of a matrix [rows, cols] of the type `to` slab by slab: fill(first group, last group, memory).
std::shared_ptr<Weight> fill_slabs(WeightType to, size_t source_row_bytes, int64_t rows, int64_t cols, ThreadPool& pool,
                                   const std::function<void(size_t, size_t)>& done,
                                   const std::function<void(int64_t, int64_t, uint8_t*)>& fill) {
    constexpr size_t kSlabBytes = 16 << 20;
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t bytes = static_cast<size_t>(groups) * group_bytes(to, cols);
    auto memory = aligned_bytes(bytes);
    const auto slab = static_cast<int64_t>(std::max<size_t>(1, kSlabBytes / (source_row_bytes * kGroupRows)));
    for (int64_t first = 0; first < groups; first += slab) {
        const int64_t last = std::min(first + slab, groups);
        pool.parallel_for(last - first, 8, [&](int64_t begin, int64_t end) { fill(first + begin, first + end, memory.get()); });
        done(static_cast<size_t>(first * kGroupRows) * source_row_bytes,
             static_cast<size_t>(std::min(last * kGroupRows, rows)) * source_row_bytes);
    }
    return std::make_shared<Weight>(Weight{{to, rows, cols, memory.get()}, memory, bytes});
}

}  // namespace

std::shared_ptr<Weight> Weight::pack(WeightType type, const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                     ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
    check_source(type, source_bytes, rows, cols);
    return fill_slabs(type, file_row_bytes(type, cols), rows, cols, pool, done, [&](int64_t begin, int64_t end, uint8_t* memory) {
        pack_groups(type, source, rows, cols, begin, end, memory);
    });
}

std::shared_ptr<Weight> Weight::convert(WeightType from, WeightType to, const uint8_t* source, size_t source_bytes,
                                        int64_t rows, int64_t cols, ThreadPool& pool,
                                        const std::function<void(size_t, size_t)>& done) {
    if (from == to) return pack(from, source, source_bytes, rows, cols, pool, done);
    check_source(from, source_bytes, rows, cols);
    if (cols % type_block(to)) throw InputError("a row of this type must be a multiple of " + std::to_string(type_block(to)) + " columns long");
    const size_t row_bytes = file_row_bytes(from, cols), group = group_bytes(to, cols);
    return fill_slabs(to, row_bytes, rows, cols, pool, done, [&](int64_t begin, int64_t end, uint8_t* memory) {
        std::vector<float> values(static_cast<size_t>(kGroupRows * cols));
        std::vector<uint8_t> blocks(kGroupRows * file_row_bytes(to, cols));
        for (int64_t g = begin; g < end; g++) {
            const int64_t first = g * kGroupRows, lanes = std::min<int64_t>(kGroupRows, rows - first);
            dequantize(from, source + static_cast<size_t>(first) * row_bytes, lanes * cols, values.data());
            quantize(to, values.data(), lanes * cols, blocks.data());
            pack_groups(to, blocks.data(), lanes, cols, 0, 1, memory + static_cast<size_t>(g) * group);
        }
    });
}

size_t packed_bytes(WeightType type, int64_t rows, int64_t cols) {
    constexpr int64_t kMost = int64_t{1} << 31;  // beyond any matrix, and no product below overflows
    if (rows < 1 || cols < 1 || rows > kMost || cols > kMost / 4) throw InputError("a matrix has a size that no matrix has");
    return static_cast<size_t>((rows + kGroupRows - 1) / kGroupRows) * group_bytes(type, cols);
}

size_t head_bytes(int64_t rows, int64_t cols) {
    if (rows % kGroupRows) throw InputError("an output embedding in two parts needs a multiple of 16 rows");
    const size_t parts = packed_bytes(WeightType::Q8_HIGH, rows, cols) + packed_bytes(WeightType::Q8_LOW, rows, cols);
    return parts + static_cast<size_t>(rows) * (sizeof(float) + static_cast<size_t>(cols / kBlock));  // errors and their shares
}

std::shared_ptr<Weight> Weight::mapped(WeightType type, std::span<const uint8_t> data, int64_t rows, int64_t cols,
                                       std::shared_ptr<const void> owner) {
    check_place(data, packed_bytes(type, rows, cols));
    return std::make_shared<Weight>(Weight{{type, rows, cols, data.data()}, std::move(owner), data.size()});
}

std::shared_ptr<Weight> map_head(std::span<const uint8_t> data, int64_t rows, int64_t cols, std::shared_ptr<const void> owner) {
    check_place(data, head_bytes(rows, cols));
    auto split = SplitHead::mapped(data, rows, cols, std::move(owner));
    return std::make_shared<Weight>(Weight{{WeightType::Q8_0, rows, cols, nullptr}, nullptr, data.size(), split});
}

std::span<const uint8_t> Weight::data() const { return {split ? split->high.data : matrix.data, bytes}; }

void Weight::read(int64_t row, float* out) const {
    if (split) split->unpack_row(row, out);
    else unpack_row(matrix, row, out);
}

void Table::read(int64_t row, float* out) const {
    if (packed) packed->read(row, out);
    else dequantize(type, source + static_cast<size_t>(row) * file_row_bytes(type, cols), cols, out);
}

}  // namespace gmtp
