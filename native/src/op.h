// What a plan is made of.
#pragma once
#include "gmtp/plan.h"

namespace gmtp {

// How an op's work is split. Ops that share by rows give row r to thread r mod threads, so that a chain of them needs no
// barrier; the others share a loop over pieces.
enum class Share : uint8_t { PassRows, OutputRows, Pieces };

struct Run {
    Plan& plan;
    Pass& pass;
    ThreadPool& pool;
    const LayerKernels& layer;
    const MatmulKernels& matmul;
    const SamplingKernels& sampling;
    int thread;
    Loop loop;  // of this op

    int rows(const Buffer& b) const {
        return (b.rows == Rows::Pass ? pass.rows : static_cast<int>(pass.outputs.size())) * b.per_row;
    }

    template <class F> void each_row(const Buffer& b, F&& body) const {
        for (int r = thread, n = rows(b); r < n; r += pool.size()) body(r);
    }
    // body(begin, end): stretches of [0, count) that begin at a multiple of `chunk`.
    template <class F> void each_stretch(int64_t count, int64_t chunk, F&& body) const { loop.run(thread, count, chunk, body); }
    // The same, chunk by chunk.
    template <class F> void each_chunk(int64_t count, int64_t chunk, F&& body) const { loop.run_chunks(thread, count, chunk, body); }
    template <class F> void each_piece(int64_t count, F&& body) const {
        each_chunk(count, 1, [&](int64_t piece, int64_t) { body(piece); });
    }
    // To be called once columns [begin, end) of a row are written; begin is a multiple of 32.
    void wrote(const Buffer& b, int64_t row, int64_t begin, int64_t end) const {
        if (b.quantised) matmul.quantize(b.data, row, begin, (end + kBlock - 1) / kBlock * kBlock);
    }
    void wrote(const Buffer& b, int64_t row) const { wrote(b, row, 0, b.width); }
};

class Op {
public:
    virtual ~Op() = default;
    virtual const char* name() const = 0;
    virtual void prepare(const Pass&) {}         // on one thread, before a run
    virtual void run(const Run& r) const = 0;    // on every thread

    Share share = Share::Pieces;
    std::vector<int> reads, writes;              // buffers; cache layer l is -1 - l
    bool barrier = false;                        // wait for the other threads first
};

inline float* row(const Buffer& b, int64_t r) { return b.data.x + r * b.data.stride; }

}  // namespace gmtp
