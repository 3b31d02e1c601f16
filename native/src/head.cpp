#include "gmtp/head.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "formats.h"
#include "gmtp/error.h"
#include "gmtp/weight.h"
#include "ops.h"

namespace gmtp {
namespace {

// Of each of the two scores a sum over blocks of columns, with 6 roundings a block at most, every one relative to a partial
// sum that |row| |x| bounds: this much of |row| |x| covers the rounding of both, and of the bounds themselves.
float rounding(int64_t cols) { return 16.0f * static_cast<float>(cols / kBlock) * 0x1p-24f; }

// SplitHead::error of a row of Q8_0.
float error_of(const uint8_t* row, int64_t cols) {
    double remainder = 0, squared_scales = 0;
    for (const uint8_t *block = row, *end = row + cols / kBlock * 34; block < end; block += 34) {
        int equal = 0;  // codes whose last two bits are: of those |l - 1.5| is 1.5, of the others 0.5
        for (int i = 0; i < 4; i++) {
            uint64_t eight;
            memcpy(&eight, block + 2 + 8 * i, 8);
            equal += std::popcount(~(eight ^ eight >> 1) & 0x0101010101010101u);
        }
        const double d = half_to_float(static_cast<uint16_t>(block[0] | block[1] << 8));
        remainder += d * d * (0.25 * kBlock + 2 * equal), squared_scales += d * d;
    }
    const double most = std::sqrt(squared_scales * kBlock) * 128;  // the row's norm is not more
    return static_cast<float>(std::sqrt(remainder) * 1.000001 + rounding(cols) * most);
}

constexpr size_t kHighPieceBytes = 64 * 1024;

// What the ops of one output embedding share.
struct Scores {
    std::shared_ptr<const SplitHead> head;
    int64_t step, pieces;                    // groups of a piece
    std::vector<float> norms, thresholds;    // [output]
    std::vector<float> maxima;               // [output][piece][16]: of the lower bounds
    std::vector<std::vector<uint8_t>> group; // [thread]: a joined group
    std::vector<std::vector<uint8_t>> reaches;  // [thread][output][step]
    std::vector<std::vector<float>> scratch;    // [thread]
};

bool exact(const Run& r, int output) { return r.pass.best.empty() || r.pass.best[output] == 0; }

struct HighScoresOp : Op {
    std::shared_ptr<Scores> scores;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "logits"; }

    void run(const Run& r) const override {
        const SplitHead& h = *scores->head;
        const int rows = r.rows(*x);
        if (!rows) return;
        r.each_piece(h.high.groups(), scores->step, [&](int64_t begin, int64_t end) {
            r.matmul.matmul(h.high, begin, end, x->data, 0, rows, out->data.x, out->data.stride);
            const int64_t column = begin * kGroupRows, width = std::min(end * kGroupRows, out->width) - column;
            for (int i = 0; i < rows; i++) {
                if (exact(r, i)) continue;
                float* maxima = &scores->maxima[(i * scores->pieces + begin / scores->step) * kGroupRows];
                std::fill_n(maxima, kGroupRows, -std::numeric_limits<float>::infinity());
                r.layer.lower_maxima(row(*out, i) + column, h.error + column, scores->norms[i], width, maxima);
            }
        });
    }
};

// The norms of the activations as the kernels read them, rounded up.
struct NormsOp : Op {
    std::shared_ptr<Scores> scores;
    const Buffer* x;
    const char* name() const override { return "logits"; }

    void run(const Run& r) const override {
        const int64_t blocks = x->data.stride / kBlock;
        r.each_row(*x, [&](int i) {
            double total = 0;
            for (const QuantBlock *b = x->data.q + i * x->data.digits * blocks, *end = b + blocks; b < end; b++) {
                int squares = 0;
                for (int8_t q : b->q) squares += q * q;
                total += static_cast<double>(b->scale) * b->scale * squares;
            }
            scores->norms[i] = static_cast<float>(std::sqrt(total) * 1.000001);
        });
    }
};

struct ThresholdOp : Op {  // a lower bound of the best-th largest logit: of each maximum's token another
    std::shared_ptr<Scores> scores;
    const Buffer* x;
    const char* name() const override { return "logits"; }

    void run(const Run& r) const override {
        r.each_row(*x, [&](int i) {
            if (exact(r, i)) return;
            auto& maxima = scores->scratch[r.thread];
            const auto first = scores->maxima.begin() + i * scores->pieces * kGroupRows;
            maxima.assign(first, first + scores->pieces * kGroupRows);
            const int best = r.pass.best[i];
            if (best > static_cast<int>(maxima.size())) {
                scores->thresholds[i] = -std::numeric_limits<float>::infinity();
                return;
            }
            std::nth_element(maxima.begin(), maxima.begin() + (best - 1), maxima.end(), std::greater<>());
            scores->thresholds[i] = maxima[best - 1];
        });
    }
};

struct ExactScoresOp : Op {
    std::shared_ptr<Scores> scores;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "logits"; }

    void run(const Run& r) const override {
        const SplitHead& h = *scores->head;
        const int rows = r.rows(*x);
        const size_t high_bytes = group_bytes(h.high.type, h.high.cols);
        auto& reaches = scores->reaches[r.thread];
        uint8_t* joined = scores->group[r.thread].data();
        joined += -reinterpret_cast<uintptr_t>(joined) % 64;
        const Matrix one{WeightType::Q8_0, kGroupRows, h.high.cols, joined};
        r.each_piece(rows ? h.high.groups() : 0, scores->step, [&](int64_t begin, int64_t end) {
            const int64_t column = begin * kGroupRows, width = std::min(end * kGroupRows, out->width) - column;
            for (int i = 0; i < rows; i++) {
                uint8_t* flags = &reaches[i * scores->step];
                if (exact(r, i)) std::fill_n(flags, end - begin, uint8_t{1});
                else r.layer.reaching(row(*out, i) + column, h.error + column, scores->norms[i], scores->thresholds[i], width, flags);
            }
            for (int64_t g = begin; g < end; g++) {
                bool ready = false;
                for (int i = 0; i < rows; i++) {
                    if (!reaches[i * scores->step + g - begin]) continue;
                    if (!ready) r.matmul.join(h.high.data + g * high_bytes, h.low_of(g), h.high.cols, joined);
                    ready = true;
                    r.matmul.matmul(one, 0, 1, x->data, i, i + 1, out->data.x + g * kGroupRows, out->data.stride);
                }
            }
        });
    }
};

}  // namespace

std::shared_ptr<const SplitHead> SplitHead::pack(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                                 ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
    if (rows < 1 || cols < 1 || cols % kBlock) throw InputError("an output embedding of Q8_0 needs rows of a multiple of 32 columns");
    const size_t row_bytes = file_row_bytes(WeightType::Q8_0, cols);
    if (row_bytes * static_cast<size_t>(rows) != source_bytes) throw InputError("a tensor's bytes do not match its shape");
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t high_group = group_bytes(WeightType::Q8_HIGH, cols), low_group = static_cast<size_t>(cols / kBlock) * 128;
    const size_t high_bytes = groups * high_group, low_bytes = groups * low_group, error_bytes = groups * kGroupRows * sizeof(float);
    auto memory = aligned_bytes(high_bytes + low_bytes + error_bytes);
    uint8_t *high = memory.get(), *low = high + high_bytes;
    auto* error = reinterpret_cast<float*>(low + low_bytes);
    std::fill_n(error, groups * kGroupRows, 0.0f);

    constexpr int64_t kSlabGroups = 1024;
    for (int64_t first = 0; first < groups; first += kSlabGroups) {
        const int64_t last = std::min(first + kSlabGroups, groups);
        pool.parallel_for(last - first, 8, [&](int64_t begin, int64_t end) {
            for (int64_t g = first + begin; g < first + end; g++) pack_split_group(source, rows, cols, g, high + g * high_group, low + g * low_group);
            for (int64_t i = (first + begin) * kGroupRows; i < std::min((first + end) * kGroupRows, rows); i++)
                error[i] = error_of(source + i * row_bytes, cols);
        });
        done(static_cast<size_t>(first * kGroupRows) * row_bytes, static_cast<size_t>(std::min(last * kGroupRows, rows)) * row_bytes);
    }
    return std::make_shared<SplitHead>(SplitHead{{WeightType::Q8_HIGH, rows, cols, high}, low, error,
                                                 high_bytes + low_bytes + error_bytes, memory});
}

std::shared_ptr<Weight> pack_head(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols, ThreadPool& pool,
                                  const std::function<void(size_t, size_t)>& done) {
    auto split = SplitHead::pack(source, source_bytes, rows, cols, pool, done);
    return std::make_shared<Weight>(Weight{{WeightType::Q8_0, rows, cols, nullptr}, nullptr, split->bytes, split});
}

void SplitHead::unpack_row(int64_t row, float* out) const {
    const int64_t group = row / kGroupRows, lane = row % kGroupRows, blocks = high.cols / kBlock;
    const uint8_t* scales = high.data + group * group_bytes(high.type, high.cols);
    const uint8_t *planes = scales + (blocks * 32 + 63) / 64 * 64, *rest = low_of(group);
    for (int64_t b = 0; b < blocks; b++, planes += 384, rest += 128) {
        const float d = half_to_float(static_cast<uint16_t>(scales[32 * b + 2 * lane] | scales[32 * b + 2 * lane + 1] << 8));
        for (int64_t c = 0; c < kBlock; c++) {
            const int64_t v = c / 4, at = 4 * lane + c % 4;  // vector, and byte of it
            const int four = planes[64 * (v % 4) + at] >> 4 * (v / 4) & 15;
            const int two = planes[256 + 64 * (v % 2) + at] >> 2 * (v / 2) & 3;
            const int last = rest[64 * (v % 2) + at] >> 2 * (v / 2) & 3;
            *out++ = d * static_cast<float>(((four | two << 4) << 2 | last) - 128);
        }
    }
}

BufferId Plan::split_logits(BufferId x, std::shared_ptr<const SplitHead> head) {
    read_by(head->high, x, 1);
    const int most = get(x).rows == Rows::Pass ? max_rows_ : max_outputs_, threads = pool_->size();
    auto scores = std::make_shared<Scores>();
    scores->step = std::max<int64_t>(1, static_cast<int64_t>(kHighPieceBytes / group_bytes(head->high.type, head->high.cols)));
    scores->pieces = (head->high.groups() + scores->step - 1) / scores->step;
    scores->norms.resize(most), scores->thresholds.resize(most);
    scores->maxima.resize(static_cast<size_t>(most) * scores->pieces * kGroupRows);
    scores->group.assign(threads, std::vector<uint8_t>(group_bytes(WeightType::Q8_0, head->high.cols) + 64));
    scores->reaches.assign(threads, std::vector<uint8_t>(static_cast<size_t>(most) * scores->step));
    scores->scratch.assign(threads, {});
    for (auto& s : scores->scratch) s.reserve(scores->pieces * kGroupRows);

    const BufferId id = make(head->high.groups() * kGroupRows, get(x).rows);
    const BufferId norms = make(kGroupRows, get(x).rows), bounds = make(kGroupRows, get(x).rows);  // stand for what ops share
    const Share by_row = get(x).rows == Rows::Pass ? Share::PassRows : Share::OutputRows;
    scores->head = std::move(head);
    auto record = [&](auto op, std::vector<int> reads, std::vector<int> writes, Share share) {
        op->scores = scores, op->x = &get(x), op->reads = std::move(reads), op->writes = std::move(writes), op->share = share;
        append(std::move(op));
    };
    record(std::make_unique<NormsOp>(), {x}, {norms}, by_row);
    auto high = std::make_unique<HighScoresOp>();
    high->out = &get(id);
    record(std::move(high), {x, norms}, {id, bounds}, Share::Pieces);
    record(std::make_unique<ThresholdOp>(), {bounds}, {bounds}, by_row);
    auto exact_scores = std::make_unique<ExactScoresOp>();
    exact_scores->out = &get(id);
    record(std::move(exact_scores), {x, norms, bounds}, {id}, Share::Pieces);
    return id;
}

}  // namespace gmtp
