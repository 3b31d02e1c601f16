// An output embedding whose 8-bit codes are read in two parts, so that finding the best tokens takes a third less reading.
//
// A code u = c + 128 of Q8_0 is 8 h + l. The high part h, five bits, gives every token a score as if l were 3.5, and that is
// off from the exact score by at most |sum of d (l - 3.5) x| <= |d (l - 3.5)| |x|, the norms being those of a row's scaled
// remainders and of the activations (Cauchy-Schwarz). The tokens with the best lower bounds get their exact logits, by
// what the low part adds to their scores; of the others those whose score could still reach that far, by that bound and by
// the sum of those of single blocks of columns. So a logit is the sum of two products, of the high and of the low part,
// wherever it is wanted exactly.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "gmtp/matrix.h"
#include "gmtp/threads.h"

namespace gmtp {

struct SplitHead {
    Matrix high, low;              // of the types Q8_HIGH and Q8_LOW
    const float* error;            // [rows]: how far a row's score is off, for activations of norm 1
    static constexpr int kShares = 250;
    const uint8_t* shares;         // [groups][blocks][16]: 250ths of that, for activations that are 0 but for one block
    size_t bytes;
    std::shared_ptr<const void> owner;

    // From a tensor [rows, cols] of Q8_0; see Weight::pack.
    static std::shared_ptr<const SplitHead> pack(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                                 ThreadPool& pool, const std::function<void(size_t, size_t)>& done);
    // From what `pack` made: the groups of the high part, those of the low part, errors, shares. See Weight::mapped.
    static std::shared_ptr<const SplitHead> mapped(std::span<const uint8_t> data, int64_t rows, int64_t cols,
                                                   std::shared_ptr<const void> owner);
    // One row, the exact values of the file.
    void unpack_row(int64_t row, float* out) const;
};

}  // namespace gmtp
