// A weight in memory: packed for the kernels, or rows of a mapped file read one at a time.
#pragma once
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>

#include "gmtp/head.h"
#include "gmtp/matrix.h"
#include "gmtp/threads.h"

namespace gmtp {

// 64-byte aligned memory that is freed with its last user.
std::shared_ptr<uint8_t[]> aligned_bytes(size_t bytes);

// A matrix packed for the kernels, with the memory it lies in.
struct Weight {
    Matrix matrix;
    std::shared_ptr<const void> owner;
    size_t bytes;
    std::shared_ptr<const SplitHead> split = nullptr;  // then matrix.data is null, and only logits and `read` can use it

    // One row, the exact values of the file.
    void read(int64_t row, float* out) const;

    // From a GGUF tensor [rows, cols]; all of `source` (source_bytes long) must be the tensor. `done(begin, end)` is told
    // which of its bytes are not needed any more, every few megabytes, so that a mapped file can be let go as it is read.
    // Throws InputError.
    static std::shared_ptr<Weight> pack(WeightType type, const uint8_t* source, size_t source_bytes, int64_t rows,
                                        int64_t cols, ThreadPool& pool, const std::function<void(size_t, size_t)>& done);
    // The same, packed as another type: each group's rows go through float32 on their own.
    static std::shared_ptr<Weight> convert(WeightType from, WeightType to, const uint8_t* source, size_t source_bytes,
                                           int64_t rows, int64_t cols, ThreadPool& pool,
                                           const std::function<void(size_t, size_t)>& done);
    // One that lies packed in memory that `owner` holds, all of `data`, 64-byte aligned: it is used where it is. Throws
    // InputError.
    static std::shared_ptr<Weight> mapped(WeightType type, std::span<const uint8_t> data, int64_t rows, int64_t cols,
                                          std::shared_ptr<const void> owner);
    // Its packed bytes: the groups, or of an output embedding in two parts those of the high part, of the low part, the
    // errors and their shares.
    std::span<const uint8_t> data() const;
};

// The same for an output embedding of Q8_0, in two parts.
std::shared_ptr<Weight> pack_head(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols, ThreadPool& pool,
                                  const std::function<void(size_t, size_t)>& done);
std::shared_ptr<Weight> map_head(std::span<const uint8_t> data, int64_t rows, int64_t cols, std::shared_ptr<const void> owner);
// How many bytes a matrix takes packed, whole or in two parts. Throws InputError.
size_t packed_bytes(WeightType type, int64_t rows, int64_t cols);
size_t head_bytes(int64_t rows, int64_t cols);

// Rows looked up one at a time (an embedding): a packed weight, or a tensor left where it is in its mapped file.
struct Table {
    WeightType type;
    int64_t rows, cols;
    const uint8_t* source = nullptr;        // the tensor in its file, or null
    std::shared_ptr<const Weight> packed;   // otherwise
    void read(int64_t row, float* out) const;
};

}  // namespace gmtp
