// The ops a plan can record, each with its fields in the open; plan.cpp fills them in.
#pragma once
#include <algorithm>

#include "op.h"

namespace gmtp {

struct EmbedOp : Op {
    std::shared_ptr<const Table> table;
    float factor;
    Buffer* out;
    const char* name() const override { return "embed"; }
    void run(const Run& r) const override;
};

struct RopeOp : Op {  // out: [pairs] cosines, then [pairs] sines
    std::vector<float> frequencies;
    Buffer* out;
    const char* name() const override { return "rope"; }
    void run(const Run& r) const override;
};

struct NormOp : Op {
    std::vector<float> weight;
    float eps;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "norm"; }
    void run(const Run& r) const override;
};

struct HeadsOp : Op {
    int64_t dim;
    std::vector<float> weight;
    float eps;
    Buffer* x;
    const Buffer* rope;  // or null
    const char* name() const override { return "heads"; }
    void run(const Run& r) const override;
};

struct ProjectOp : Op {
    const Buffer* x;
    std::vector<std::shared_ptr<const Weight>> weights;
    std::vector<Buffer*> outs;
    const char* label;
    const char* name() const override { return label; }
    void run(const Run& r) const override;
};

struct GatedOp : Op {
    const Buffer* x;
    std::shared_ptr<const Weight> gate, up;
    Buffer* out;
    const char* name() const override { return "gated"; }
    void run(const Run& r) const override;
};

struct GeluTimesOp : Op {
    const Buffer *gate, *x;
    int64_t column;
    Buffer* out;
    const char* name() const override { return "gelu_times"; }
    void run(const Run& r) const override;
};

struct AddOp : Op {  // with norm: x = (x + norm(y)) * factor
    Buffer* x;
    const Buffer* y;
    float factor;
    bool norm;
    std::vector<float> weight;
    float eps;
    const char* name() const override { return "add"; }
    void run(const Run& r) const override;
};

struct ScaleOp : Op {
    Buffer* x;
    float factor;
    const char* name() const override { return "scale"; }
    void run(const Run& r) const override;
};

struct RememberOp : Op {
    int layer;
    const Buffer *k, *v;
    const char* name() const override { return "remember"; }
    void run(const Run& r) const override;
};

// What attention over single chunks gives, until it is merged; one for all attend ops of a plan.
struct AttendParts {
    std::vector<Partial> partials;  // [row][head][chunk]
    std::vector<float> results;     // the same, [dim] each
};

// One row's queries against a cached layer, cut into chunks at fixed positions. With few rows each chunk is a piece of
// its own and MergeOp folds them; with many, a piece folds its chunks itself. Either way the same steps in the same order.
struct AttendOp : Op {
    const Buffer* q;
    Buffer* out;
    int layer;
    KvLayer shape;
    int64_t heads;
    float factor;
    int64_t behind;

    struct Tile { const Segment* segment; int row, rows; };        // consecutive rows of one segment
    struct Unit {                                                  // of its rows, heads [head, head + n), of a KV head's group
        Tile tile;
        int64_t kv_head, head, n;
        int queries() const { return tile.rows * static_cast<int>(n); }
        int64_t row_of(int query) const { return tile.row + query / n; }
        int64_t head_of(int query) const { return head + query % n; }
    };
    std::shared_ptr<AttendParts> parts;
    mutable std::vector<Tile> tiles;
    mutable int64_t first_chunk = 0, chunks = 0;                    // that any row sees
    mutable bool split = false;
    struct Scratch { std::vector<float> q, weights, out; };
    mutable std::vector<Scratch> scratch;                           // [thread]

    const char* name() const override { return "attend"; }
    void prepare(const Pass& pass) override;
    void run(const Run& r) const override;

    int64_t group() const { return heads / shape.kv_heads; }        // query heads that share a KV head
    int64_t first_seen(int64_t position) const {
        return shape.window && position + 1 > shape.window ? position + 1 - shape.window : 0;
    }
    int64_t past_seen(int64_t position) const { return position + 1 - behind; }
    size_t place(int64_t row, int64_t head, int64_t chunk) const { return (row * heads + head) * chunks + chunk - first_chunk; }
    int64_t step() const { return std::min<int64_t>(group(), kMaxQueries); }       // heads of a unit
    int64_t slices() const { return (group() + step() - 1) / step(); }             // of a group
    int64_t units() const { return static_cast<int64_t>(tiles.size()) * shape.kv_heads * slices(); }
    Unit unit(int64_t i) const;  // those that read the same keys and values follow one another
    KvChunk chunk(const Pass& pass, const Unit& u, int64_t index) const;
    void attend(const Run& r, const Unit& u, int64_t index, const KvChunk& chunk, Partial* partial, float* result) const;
};

struct MergeOp : Op {
    const AttendOp* attend;
    const char* name() const override { return "merge"; }
    void run(const Run& r) const override;
};

struct CopyOp : Op {
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "copy"; }
    void run(const Run& r) const override;
};

struct ConcatOp : Op {
    const Buffer *a, *b;
    Buffer* out;
    const char* name() const override { return "concat"; }
    void run(const Run& r) const override;
};

struct OutputsOp : Op {
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "outputs"; }
    void run(const Run& r) const override;
};

struct SoftcapOp : Op {
    Buffer* x;
    float cap;
    const char* name() const override { return "softcap"; }
    void run(const Run& r) const override;
};

// Weight bytes in a piece of work: small enough to balance, large enough that handing it out costs nothing.
constexpr size_t kPieceBytes = 32 * 1024;

inline int64_t piece_groups(const Matrix& m) {
    return std::max<int64_t>(1, static_cast<int64_t>(kPieceBytes / group_bytes(m.type, m.cols)));
}

// gelu(gate x) * up x for `groups` (at most two) groups of gate from g0 and of up from u0, for rows [row0, row1) of x,
// into the columns of `out` from `column` (a multiple of 32) on.
void gated_groups(const Run& r, const Matrix& gate, int64_t g0, const Matrix& up, int64_t u0, int64_t groups, const Buffer& x,
                  int row0, int row1, const Buffer& out, int64_t column);

}  // namespace gmtp
