#include "gmtp/weight.h"

#include <algorithm>
#include <new>
#include <string>

#include "gmtp/error.h"

namespace gmtp {

std::shared_ptr<uint8_t[]> aligned_bytes(size_t bytes) {
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) throw std::bad_alloc();
    return {static_cast<uint8_t*>(p), [](uint8_t* q) { std::free(q); }};
}

std::shared_ptr<Weight> Weight::pack(WeightType type, const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                     ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
    if (rows < 1 || cols < 1) throw InputError("a matrix needs at least one row and one column");
    if (cols % type_block(type)) throw InputError("a row of this type must be a multiple of " + std::to_string(type_block(type)) + " columns long");
    if (file_row_bytes(type, cols) * static_cast<size_t>(rows) != source_bytes)
        throw InputError("a tensor's bytes do not match its shape");
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t bytes = static_cast<size_t>(groups) * group_bytes(type, cols);
    auto memory = aligned_bytes(bytes);
    constexpr size_t kSlabBytes = 16 << 20;
    const size_t row_bytes = file_row_bytes(type, cols);
    const auto slab = static_cast<int64_t>(std::max<size_t>(1, kSlabBytes / (row_bytes * kGroupRows)));
    for (int64_t first = 0; first < groups; first += slab) {
        const int64_t last = std::min(first + slab, groups);
        pool.parallel_for(last - first, 8, [&](int64_t begin, int64_t end) {
            pack_groups(type, source, rows, cols, first + begin, first + end, memory.get());
        });
        done(static_cast<size_t>(first * kGroupRows) * row_bytes, static_cast<size_t>(std::min(last * kGroupRows, rows)) * row_bytes);
    }
    return std::make_shared<Weight>(Weight{{type, rows, cols, memory.get()}, memory, bytes});
}

void Table::read(int64_t row, float* out) const {
    if (packed) unpack_row(packed->matrix, row, out);
    else dequantize(type, source + static_cast<size_t>(row) * file_row_bytes(type, cols), cols, out);
}

}  // namespace gmtp
