// A model recorded once as a flat list of ops, run over any number of rows.
//
// A row is one (sequence, position). Buffers hold one vector a row; ops read and write whole buffers. A buffer knows in
// which forms its readers want it, so whoever writes a row also quantises it. Threads run the list side by side and meet
// at a barrier only where an op touches what another thread may have written or still reads.
#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gmtp/kernels.h"
#include "gmtp/kvcache.h"
#include "gmtp/layers.h"
#include "gmtp/threads.h"
#include "gmtp/weight.h"

namespace gmtp {

// A run of rows of a pass: consecutive positions of one sequence.
struct Segment {
    int sequence;
    int64_t start;  // position of its first row
    int row;        // its first row in the pass
    int count;
};

// What one run of a plan works on.
struct Pass {
    KvCache* cache = nullptr;
    int rows = 0;
    const int32_t* tokens = nullptr;     // [rows]
    std::vector<Segment> segments;
    std::vector<int64_t> positions;      // [rows]
    std::vector<int> outputs;            // rows whose result is wanted
    // [output]: which logits must be exact. Of the others it holds that they are not among the largest, nor become so by
    // the noise. Meant for outputs of logits with a split head; others are exact anyway.
    std::vector<Wanted> wanted;
    int64_t experts_read = 0;  // by the run, in all layers together
};

enum class Rows : uint8_t { Pass, Outputs };  // a buffer has one vector for every row, or for every wanted row

struct Buffer {
    int64_t width;
    Rows rows;
    Activations data;
    bool quantised = false;  // some reader wants the int8 form
    bool input = false;      // filled by the caller before a run
    bool kept = false;       // read by the caller after a run
    int per_row = 1;         // vectors a row: more for the experts that work on it
};

using BufferId = int;

class Op;
struct AttendParts;
struct ChooseCentroidsOp;

class Plan {
public:
    Plan(std::shared_ptr<ThreadPool> pool, const Kernels& kernels, int max_rows, int max_outputs);
    ~Plan();

    // Recording. Each returns the buffer it writes; widths must fit or InputError is thrown.
    BufferId input(int64_t width);                                            // filled by the caller before a run
    BufferId embed(std::shared_ptr<const Table> table, float scale);          // the rows' tokens
    BufferId rope(int64_t pairs, std::vector<float> frequencies);             // cosines, then sines, of each row's position
    BufferId norm(BufferId x, std::vector<float> weight, float eps);
    // RMS norm of each head of x (weight may be empty: ones; eps < 0: no norm), then rotation by `rope` (or -1), in place.
    void heads(BufferId x, int64_t dim, std::vector<float> weight, float eps, BufferId rope);
    // Against quantised weights, project rounds x to int8 in two digits; gated and logits, which most bytes go to, in one.
    std::vector<BufferId> project(BufferId x, std::vector<std::shared_ptr<const Weight>> weights);
    BufferId logits(BufferId x, std::shared_ptr<const Weight> weight);
    BufferId gated(BufferId x, std::shared_ptr<const Weight> gate, std::shared_ptr<const Weight> up);  // gelu(gate x) * up x
    BufferId gelu_times(BufferId gate, BufferId x, int64_t column);           // gelu(gate) * x[column : column + width]
    void add(BufferId x, BufferId y, float scale);                            // x = (x + y) * scale
    void scale(BufferId x, float factor);
    void add_norm(BufferId x, BufferId y, std::vector<float> weight, float eps, float scale);  // x = (x + norm(y)) * scale
    void remember(int layer, BufferId k, BufferId v);                         // into the cache, at the rows' positions
    // Attention of q's heads over a cache layer. `behind`: positions nearer than this are not seen (0: a row sees itself).
    BufferId attend(BufferId q, int layer, const KvLayer& shape, float scale, int64_t behind);
    BufferId copy(BufferId x);
    BufferId concat(BufferId a, BufferId b);
    // A mixture of experts: the `active` with the largest scores (of scales.size()) work on each row of x. gate_up is
    // [experts * 2 * width, inputs], the gate's rows before the others', down [experts * outputs, width].
    BufferId experts(BufferId x, BufferId scores, std::shared_ptr<const Weight> gate_up, std::shared_ptr<const Weight> down,
                     std::vector<float> scales, int active);
    BufferId outputs(BufferId x);                                             // the wanted rows of x
    void softcap(BufferId x, float cap);
    // Scores of the tokens of the `active` of `count` centroids with the largest of `scores`. weight: each centroid's rows one after
    // another, a multiple of 16 for each; tokens: the token of each row, -1 for a row that only fills up.
    BufferId centroid_logits(BufferId x, BufferId scores, std::shared_ptr<const Weight> weight, std::vector<int32_t> tokens,
                             int64_t count, int active);

    // Ends the recording: buffers that are never in use together share memory. Those in `kept` hold their values after a run.
    void finish(std::span<const BufferId> kept);

    // Runs all ops of a finished plan. The caller has reserved the rows' positions in the cache.
    void run(Pass& pass);

    // An input or a kept buffer of a finished plan.
    const Buffer& buffer(BufferId id) const;
    // The token of each score of a buffer of centroid_logits, for one of its rows; null for any other buffer, where the
    // score of token t is at t.
    const int32_t* candidates(BufferId id, int row) const;
    int max_rows() const { return max_rows_; }
    int max_outputs() const { return max_outputs_; }
    ThreadPool& pool() { return *pool_; }
    const Kernels& kernels() const { return kernels_; }
    int barriers() const;
    size_t arena_bytes() const { return arena_bytes_; }
    // Seconds spent by thread 0 in each kind of op since the last call, when profiling is on.
    std::vector<std::pair<std::string, double>> profile();
    void set_profiling(bool on) { profiling_ = on; }

private:
    friend class Op;
    BufferId make(int64_t width, Rows rows);
    Buffer& get(BufferId id);
    void read_by(const Matrix& reader, BufferId id, int digits);
    BufferId split_logits(BufferId x, std::shared_ptr<const SplitHead> head);
    std::vector<BufferId> multiply(BufferId x, std::vector<std::shared_ptr<const Weight>> weights, int digits, const char* label);
    void append(std::unique_ptr<Op> op);
    size_t bytes(const Buffer& b) const { return float_bytes(b) + quantised_bytes(b); }
    size_t float_bytes(const Buffer& b) const;
    size_t quantised_bytes(const Buffer& b) const;

    std::shared_ptr<ThreadPool> pool_;
    const Kernels& kernels_;
    int max_rows_, max_outputs_;
    std::vector<std::unique_ptr<Buffer>> buffers_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<std::pair<BufferId, const ChooseCentroidsOp*>> choosers_;
    std::vector<std::pair<BufferId, std::shared_ptr<bool>>> capped_;  // split logits: whether a soft-cap follows
    std::shared_ptr<AttendParts> parts_;
    BufferId parts_id_ = -1;
    std::vector<std::shared_ptr<uint8_t[]>> arena_;
    size_t arena_bytes_ = 0;
    bool finished_ = false;
    std::unique_ptr<Loops> loops_;  // [op]
    std::vector<uint8_t> touched_;  // per buffer and cache layer: accesses since the last barrier
    std::vector<double> seconds_;
    bool profiling_ = false;
};

}  // namespace gmtp
