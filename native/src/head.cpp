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

// A product is a sum over blocks of columns, with 6 roundings a block at most, every one relative to a partial sum that
// |row| |x| bounds: this much of |row| |x| covers the rounding of both products, of their sum and of the bounds themselves.
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
constexpr int64_t kLowPieces = 8;     // of the high part, to one of the low part: of which little is wanted
constexpr int64_t kMostSets = 2048;   // of tokens whose maximum is taken to find a threshold

// What the ops of one output embedding share.
struct Scores {
    std::shared_ptr<const SplitHead> head;
    int64_t step, pieces;  // groups of a piece
    // Whether a soft-cap follows: bounds with noise would have to be of what it makes of them.
    std::shared_ptr<bool> capped = std::make_shared<bool>(false);
    std::vector<float> norms, thresholds, noisy_thresholds;  // [output]
    std::vector<float> lower, upper;                         // [output][piece][16]: the largest bounds
    std::vector<std::vector<float>> noisy;                   // [thread][output]: the largest lower bound with noise
    std::vector<std::vector<uint8_t>> reaches;               // [thread][output][group of kLowPieces pieces]
    std::vector<std::vector<float>> scratch;                 // [thread]

    const Wanted& wanted(const Run& r, int output) const {
        static constexpr Wanted all{};
        if (r.pass.wanted.empty()) return all;
        const Wanted& w = r.pass.wanted[output];
        return w.temperature > 0 && *capped ? all : w;
    }
    bool exact(const Run& r, int output) const { return wanted(r, output).best == 0; }
    // What both parts are multiplied with: of activations in two digits the first, which the bounds are of.
    static Activations factor(const Buffer& x) { return {x.data.x, x.data.q, x.data.stride * x.data.digits, 1}; }

    size_t high_bytes() const { return group_bytes(head->high.type, head->high.cols); }
    size_t low_bytes() const { return group_bytes(head->low.type, head->low.cols); }

    // Adds the low part of a group to the scores of outputs [first, last).
    void add_low(const Run& r, int64_t group, const Activations& x, int first, int last, Buffer& out) {
        const SplitHead& h = *head;
        const Matrix one{h.low.type, kGroupRows, h.low.cols, h.low.data + group * low_bytes(), h.high.data + group * high_bytes()};
        auto& sums = scratch[r.thread];
        sums.resize(static_cast<size_t>(last) * kGroupRows);
        r.matmul.matmul(one, 0, 1, x, first, last, sums.data(), kGroupRows);
        for (int i = first; i < last; i++) r.layer.add_scaled(&sums[i * kGroupRows], 1, kGroupRows, row(out, i) + group * kGroupRows);
    }
    // Has the low part of a group on its way into the second-level cache.
    void fetch_low(int64_t group) const {
        const uint8_t* begin = head->low.data + group * low_bytes();
        for (const uint8_t* p = begin; p < begin + low_bytes(); p += 64) __builtin_prefetch(p, 0, 2);
    }
    void fetch_scales(int64_t group) const {
        const uint8_t* begin = head->high.data + group * high_bytes();
        for (const uint8_t* p = begin; p < begin + head->high.cols / kBlock * kGroupRows * 2; p += 64) __builtin_prefetch(p, 0, 2);
    }
};

struct HeadOp : Op {
    std::shared_ptr<Scores> scores;
    const Buffer* x;
    Buffer* out;
};

// The norms of the activations as the kernels read them, rounded up.
struct NormsOp : HeadOp {
    const char* name() const override { return "norms"; }

    void run(const Run& r) const override {
        const int64_t blocks = x->data.stride / kBlock;
        for (float& best : scores->noisy[r.thread]) best = -std::numeric_limits<float>::infinity();
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

// All scores where all are wanted; of other rows those of the high part, and their bounds.
struct HighScoresOp : HeadOp {
    const char* name() const override { return "high logits"; }

    void run(const Run& r) const override {
        Scores& s = *scores;
        const int rows = r.rows(*x);
        if (!rows) return;
        r.each_chunk(s.head->high.groups(), s.step, [&](int64_t begin, int64_t end) { score(r, rows, begin, end); });
    }

    // The piece of groups [begin, end).
    void score(const Run& r, int rows, int64_t begin, int64_t end) const {
        Scores& s = *scores;
        const int64_t column = begin * kGroupRows, width = (end - begin) * kGroupRows;
        for (int first = 0, last; first < rows; first = last) {  // runs of rows alike
            const bool exact = s.exact(r, first);
            for (last = first + 1; last < rows && s.exact(r, last) == exact;) last++;
            const Activations factor = Scores::factor(*x);
            if (exact) r.matmul.both(s.head->high, s.head->low, begin, end, factor, first, last, out->data.x, out->data.stride);
            else r.matmul.matmul(s.head->high, begin, end, factor, first, last, out->data.x, out->data.stride);
        }
        for (int i = 0; i < rows; i++) {
            if (s.exact(r, i)) continue;
            const float *from = row(*out, i) + column, *error = s.head->error + column;
            const int64_t place = (i * s.pieces + begin / s.step) * kGroupRows;
            r.layer.bounds(from, error, s.norms[i], width, &s.lower[place], &s.upper[place]);
            const Wanted& w = s.wanted(r, i);
            float& best = s.noisy[r.thread][i];
            if (w.temperature > 0) best = r.sampling.noisy_lower(from, error, s.norms[i], column, width, w.temperature, w.key, best);
        }
    }
};

// Lower bounds of the best-th largest logit, each set's maximum being of another token, and of the largest with noise.
struct ThresholdOp : HeadOp {
    const char* name() const override { return "threshold"; }

    void run(const Run& r) const override {
        Scores& s = *scores;
        r.each_row(*x, [&](int i) {
            if (s.exact(r, i)) return;
            const Wanted& w = s.wanted(r, i);
            auto& maxima = s.scratch[r.thread];
            const float* of_pieces = &s.lower[i * s.pieces * kGroupRows];
            const int64_t all = s.pieces * kGroupRows, sets = std::min(all, kMostSets);
            maxima.assign(of_pieces, of_pieces + sets);
            for (int64_t first = sets; first < all; first += sets)
                for (int64_t k = 0; k < std::min(sets, all - first); k++) maxima[k] = std::max(maxima[k], of_pieces[first + k]);
            s.thresholds[i] = -std::numeric_limits<float>::infinity();
            if (w.best <= sets) {
                std::nth_element(maxima.begin(), maxima.begin() + (w.best - 1), maxima.end(), std::greater<>());
                s.thresholds[i] = maxima[w.best - 1];
            }
            if (w.temperature > 0) {
                float best = -std::numeric_limits<float>::infinity();
                for (const auto& of_thread : s.noisy) best = std::max(best, of_thread[i]);
                // The draw computes (logit - largest) / temperature + noise, whose rounding is less than this.
                s.noisy_thresholds[i] = best - 1e-6f * (std::abs(best) + 64 * w.temperature);
            }
        });
    }
};

// Adds the low part of the tokens that can be among the wanted.
struct LowScoresOp : HeadOp {
    const char* name() const override { return "low logits"; }

    void run(const Run& r) const override {
        Scores& s = *scores;
        const int rows = r.rows(*x);
        bool any = false;
        for (int i = 0; i < rows; i++) any |= !s.exact(r, i);
        r.each_chunk(any ? s.head->low.groups() : 0, kLowPieces * s.step,
                     [&](int64_t begin, int64_t end) { add_reaching(r, rows, begin, end); });
    }

    // Of the pieces [begin, end), at most kLowPieces.
    void add_reaching(const Run& r, int rows, int64_t begin, int64_t end) const {
        Scores& s = *scores;
        const int64_t most = kLowPieces * s.step;
        auto& reaches = s.reaches[r.thread];
        std::fill_n(reaches.begin(), rows * most, uint8_t{0});
        for (int64_t g = begin; g < end; g += s.step)
            for (int i = 0; i < rows; i++) find_reaching(r, i, g, std::min(g + s.step, end), &reaches[i * most + g - begin]);
        auto reached = [&](int i, int64_t g) { return reaches[i * most + g - begin] != 0; };
        auto each_wanted = [&](auto&& body) {
            for (int64_t g = begin; g < end; g++)
                for (int i = 0; i < rows; i++)
                    if (reached(i, g)) {
                        body(g, i);
                        break;
                    }
        };
        each_wanted([&](int64_t g, int) { s.fetch_low(g), s.fetch_scales(g); });
        each_wanted([&](int64_t g, int i) {
            for (; i < rows; i++) {
                if (!reached(i, g)) continue;
                const int first = i;
                while (i + 1 < rows && reached(i + 1, g)) i++;
                s.add_low(r, g, Scores::factor(*x), first, i + 1, *out);
            }
        });
    }

    // Which groups of the piece [begin, end) hold a token that can be among those wanted of output i.
    void find_reaching(const Run& r, int i, int64_t begin, int64_t end, uint8_t* reaches) const {
        Scores& s = *scores;
        if (s.exact(r, i)) return;
        const Wanted& w = s.wanted(r, i);
        const float* uppers = &s.upper[(i * s.pieces + begin / s.step) * kGroupRows];
        const float upper = *std::max_element(uppers, uppers + kGroupRows);
        const int64_t column = begin * kGroupRows, width = (end - begin) * kGroupRows;
        const float *from = row(*out, i) + column, *error = s.head->error + column;
        if (upper >= s.thresholds[i]) r.layer.reaching(from, error, s.norms[i], s.thresholds[i], width, reaches);
        if (w.temperature > 0 && upper + w.temperature * kLargestNoise >= s.noisy_thresholds[i])
            r.sampling.noisy_reaching(from, error, s.norms[i], column, width, w.temperature, w.key, s.noisy_thresholds[i], reaches);
    }
};

}  // namespace

std::shared_ptr<const SplitHead> SplitHead::pack(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols,
                                                 ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
    if (rows < 1 || rows % kGroupRows || cols < 1 || cols % kBlock)
        throw InputError("an output embedding in two parts needs a multiple of 16 rows of a multiple of 32 columns");
    const size_t row_bytes = file_row_bytes(WeightType::Q8_0, cols);
    if (row_bytes * static_cast<size_t>(rows) != source_bytes) throw InputError("a tensor's bytes do not match its shape");
    const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
    const size_t high_group = group_bytes(WeightType::Q8_HIGH, cols), low_group = group_bytes(WeightType::Q8_LOW, cols);
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
                if (!std::isfinite(error[i] = error_of(source + i * row_bytes, cols))) throw InputError("a weight is not finite");
        });
        done(static_cast<size_t>(first * kGroupRows) * row_bytes, static_cast<size_t>(std::min(last * kGroupRows, rows)) * row_bytes);
    }
    return std::make_shared<SplitHead>(SplitHead{
        {WeightType::Q8_HIGH, rows, cols, high}, {WeightType::Q8_LOW, rows, cols, low, high}, error, high_bytes + low_bytes + error_bytes, memory});
}

std::shared_ptr<const SplitHead> SplitHead::mapped(std::span<const uint8_t> data, int64_t rows, int64_t cols,
                                                   std::shared_ptr<const void> owner) {
    const uint8_t *high = data.data(), *low = high + packed_bytes(WeightType::Q8_HIGH, rows, cols);
    const auto* error = reinterpret_cast<const float*>(low + packed_bytes(WeightType::Q8_LOW, rows, cols));
    for (int64_t i = 0; i < rows; i++)
        if (!(error[i] >= 0 && std::isfinite(error[i]))) throw InputError("a packed output embedding has an error that is no number");
    return std::make_shared<SplitHead>(SplitHead{
        {WeightType::Q8_HIGH, rows, cols, high}, {WeightType::Q8_LOW, rows, cols, low, high}, error, data.size(), std::move(owner)});
}

std::shared_ptr<Weight> pack_head(const uint8_t* source, size_t source_bytes, int64_t rows, int64_t cols, ThreadPool& pool,
                                  const std::function<void(size_t, size_t)>& done) {
    auto split = SplitHead::pack(source, source_bytes, rows, cols, pool, done);
    return std::make_shared<Weight>(Weight{{WeightType::Q8_0, rows, cols, nullptr}, nullptr, split->bytes, split});
}

void SplitHead::unpack_row(int64_t row, float* out) const {
    const int64_t group = row / kGroupRows, lane = row % kGroupRows, blocks = high.cols / kBlock;
    const uint8_t* scales = high.data + group * group_bytes(high.type, high.cols);
    const uint8_t *planes = scales + (blocks * 32 + 63) / 64 * 64, *rest = low.data + group * group_bytes(low.type, low.cols);
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
    for (auto* values : {&scores->norms, &scores->thresholds, &scores->noisy_thresholds}) values->resize(most);
    for (auto* bounds : {&scores->lower, &scores->upper}) bounds->resize(static_cast<size_t>(most) * scores->pieces * kGroupRows);
    scores->noisy.assign(threads, std::vector<float>(most));
    scores->reaches.assign(threads, std::vector<uint8_t>(static_cast<size_t>(most) * kLowPieces * scores->step));
    scores->scratch.assign(threads, {});
    for (auto& s : scores->scratch) s.reserve(std::max<size_t>(kMostSets, static_cast<size_t>(most) * kGroupRows));

    const BufferId id = make(head->high.rows, get(x).rows);
    const BufferId norms = make(kGroupRows, get(x).rows), bounds = make(kGroupRows, get(x).rows);  // stand for what ops share
    const Share by_row = get(x).rows == Rows::Pass ? Share::PassRows : Share::OutputRows;
    scores->head = std::move(head);
    auto record = [&](auto op, std::vector<int> reads, std::vector<int> writes, Share share) {
        op->scores = scores, op->x = &get(x), op->out = &get(id);
        op->reads = std::move(reads), op->writes = std::move(writes), op->share = share;
        append(std::move(op));
    };
    record(std::make_unique<NormsOp>(), {x}, {norms}, by_row);
    record(std::make_unique<HighScoresOp>(), {x, norms}, {id, bounds}, Share::Pieces);
    record(std::make_unique<ThresholdOp>(), {bounds}, {bounds}, by_row);
    record(std::make_unique<LowScoresOp>(), {x, norms, bounds}, {id}, Share::Pieces);
    capped_.emplace_back(id, scores->capped);
    return id;
}

}  // namespace gmtp
