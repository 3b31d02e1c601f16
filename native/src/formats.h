// The quantised GGUF types as facts: how a file's block maps to unsigned codes, scales and offsets, and which bit planes
// and scale bytes the packed layout keeps of them. Every value is scale * (code - bias) + offset.
#pragma once
#include <cstddef>
#include <cstdint>

#include "gmtp/matrix.h"

namespace gmtp {

struct Format {
    int block;         // columns of a file block
    int file_bytes;    // bytes of a file block
    int bits;          // of a code
    int bias;
    int sub;           // columns that share a scale: 32 or 16
    bool has_min;      // a second fp16 (minimum) beside the scale
    int small_scales;  // bytes of small scales a block: 0 for the types with one scale per 32
    int small_mins;    // bytes of small minima

    // Packed bytes of the scales of 16 rows of a block, and of the codes of 16 rows x 32 columns.
    size_t scale_bytes() const { return (size_t)kGroupRows * (2 + 2 * has_min + small_scales + small_mins); }
    size_t code_bytes() const { return (size_t)kGroupRows * kBlock * bits / 8; }
};

// The scales of one block of one row, as in the file.
struct BlockScales {
    uint16_t d, min;
    uint8_t small[16], small_min[16];
};

const Format& format(WeightType t);  // quantised types only
void read_codes(WeightType t, const uint8_t* blocks, int count, uint8_t* codes);
BlockScales read_scales(WeightType t, const uint8_t* block);
// The float32 values of a block, exact, from its codes and scales.
void block_values(WeightType t, const uint8_t* codes, const BlockScales& s, float* out);

float half_to_float(uint16_t h);

}  // namespace gmtp
