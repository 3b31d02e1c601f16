// Weight matrices as the kernels read them.
//
// A matrix [rows, cols] is cut into groups of 16 output rows. A group is stored whole, block of 32 columns after block,
// with the 16 rows of a block interleaved four columns at a time, so that one 64-byte vector holds 4 columns of 16 rows.
// The layout keeps the file's values exactly and does not depend on the CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gmtp {

enum class WeightType : uint8_t {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    // In no file: the two parts of Q8_0's codes u = 8 h + l, of values d * (8 h + 3.5 - 128) and d * (l - 3.5); see head.h.
    Q8_HIGH, Q8_LOW
};

constexpr int kGroupRows = 16;   // output rows in a group
constexpr int kBlock = 32;       // columns that share one activation scale

struct Matrix {
    WeightType type;
    int64_t rows, cols;          // outputs, inputs; the last group is padded with zero rows
    const uint8_t* data;         // 64-byte aligned, groups() * group_bytes(type, cols) bytes, not owned
    int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
};

inline bool is_float(WeightType t) { return t == WeightType::F32 || t == WeightType::F16 || t == WeightType::BF16; }

// Columns a row of this type must be a multiple of (32 or 256; 1 for floats), and bytes of a row in a GGUF file.
int64_t type_block(WeightType t);
size_t file_row_bytes(WeightType t, int64_t cols);
// Bytes of one packed group: a multiple of 64.
size_t group_bytes(WeightType t, int64_t cols);
// Packs groups [group0, group1) of a file's tensor `src` (all of it: [rows, cols] in GGUF layout) into dst (group 0's place).
void pack_groups(WeightType t, const uint8_t* src, int64_t rows, int64_t cols, int64_t group0, int64_t group1, uint8_t* dst);
// The same for the two parts of a Q8_0 tensor's group: `high` is a group of Q8_HIGH, `low` of Q8_LOW. That one has no scales, and
// lies four rows after four, so that a few can be read by themselves: of each block the 16 bytes that each plane of three-bit
// codes has of them.
void pack_split_group(const uint8_t* src, int64_t rows, int64_t cols, int64_t group, uint8_t* high, uint8_t* low);
// One row back as float32, the exact values of the file.
void unpack_row(const Matrix& m, int64_t row, float* out);
// `count` values (a multiple of type_block) straight from a GGUF tensor's bytes, without packing.
void dequantize(WeightType t, const uint8_t* src, int64_t count, float* out);
// The other way: finite values as the bytes of a GGUF tensor, for floats, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q6_K.
// Throws InputError on a value that is not finite or that the type cannot hold, and on any other type.
void quantize(WeightType t, const float* x, int64_t count, uint8_t* out);

// 32 columns of an activation row, quantised: x ~ scale * q with q in -127..127. The sums of q let weights stored with an
// offset be used as the unsigned bytes they are. A block with a NaN or an infinity has q = 0 and scale NaN.
struct QuantBlock {
    int8_t q[kBlock];
    float scale;
    float sum;             // of all 32 q; an integer
    int16_t half[2][2];    // over columns 16 h .. 16 h + 15 of the block: those with column % 4 < 2, then the others
    int16_t whole[2];      // half[0] + half[1]
    int32_t bias_8;        // -8 times the sum of all q: what a bias of 8 adds to a dot product
};

// The rows of a pass as a matmul reads them: `cols` floats a row, or the same quantised, in one digit or in two, of which
// the second holds what rounding left over from the first. Row r starts at r * stride of x, and its digit p at
// (r * digits + p) * stride / 32 of q; stride is a multiple of 32.
struct Activations {
    float* x = nullptr;
    QuantBlock* q = nullptr;
    int64_t stride = 0;
    int digits = 1;
};

struct MatmulKernels {
    // out[t * out_stride + 16 * g + lane] for groups g in [group0, group1) and rows t in [row0, row1) of the pass:
    // the product of weight row 16 g + lane with activation row t. Float weights read x.x, quantised ones x.q.
    // A result depends only on its own weight row and activation row: never on how many rows or groups share the call.
    void (*matmul)(const Matrix& w, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                   float* out, int64_t out_stride);
    // The sum of the products of the two parts of a matrix, Q8_HIGH and Q8_LOW. x.digits is 1.
    void (*both)(const Matrix& high, const Matrix& low, int64_t group0, int64_t group1, const Activations& x, int row0, int row1,
                 float* out, int64_t out_stride);
    // What `both` adds for one row of Q8_LOW and one activation row. `low` is where the row's first code is, `scales` its
    // first scale.
    float (*low)(const uint8_t* low, const uint16_t* scales, const QuantBlock* x, int64_t blocks);
    // Fills x.q for columns [col0, col1) (multiples of 32) of one row from x.x.
    void (*quantize)(const Activations& x, int64_t row, int64_t col0, int64_t col1);
};

}  // namespace gmtp
