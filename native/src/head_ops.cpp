// Scoring by an output embedding in two parts: see head.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "gmtp/head.h"
#include "ops.h"

namespace gmtp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kHighPieceBytes = 64 * 1024;
constexpr int64_t kLowPieces = 8;     // of the high part, to one of the low part: of which little is wanted
constexpr int64_t kMostSets = 2048;   // of tokens whose maximum is taken to find a threshold

// What the ops of one output embedding share.
struct Scores {
    std::shared_ptr<const SplitHead> head;
    size_t high_bytes, low_bytes;  // of a group
    int64_t step, pieces;          // groups of a piece
    // Whether a soft-cap follows: bounds with noise would have to be of what it makes of them.
    std::shared_ptr<bool> capped = std::make_shared<bool>(false);
    struct Noisy {
        float lower;      // the largest lower bound with noise
        int64_t group;    // the first of the piece that has it
    };
    std::vector<float> norms, thresholds, noisy_thresholds;  // [output]
    std::vector<float> block_norms;                          // [output][block], for shares in their units
    std::vector<float> lower;                                // [output][piece][16]: the largest lower bounds
    std::vector<float> largest_lower, largest_upper;         // [output][piece]
    std::vector<std::vector<Noisy>> noisy;                   // [thread][output]
    // Tokens of a group are the bits of a number.
    std::vector<uint16_t> completed;                         // [output][group]: with the low part added
    struct Reaching {                                        // of kLowPieces pieces
        std::vector<uint16_t> of_piece;                      // [group of one piece]
        std::vector<uint16_t> tokens;                        // [group][output]
        std::vector<int64_t> groups;                         // those with any
    };
    std::vector<Reaching> reaching;                          // [thread]
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

    // Of the pieces that any thread has seen.
    Noisy noisiest(int output) const {
        Noisy best = noisy[0][output];
        for (const auto& of_thread : noisy)
            if (of_thread[output].lower > best.lower) best = of_thread[output];
        return best;
    }

    const uint16_t* scales(int64_t group) const {
        return reinterpret_cast<const uint16_t*>(head->high.data + group * high_bytes);
    }
    const uint8_t* shares(int64_t group) const { return head->shares + group * blocks() * kGroupRows; }
    // Four rows of the low part, and how many bytes they have.
    const uint8_t* low_rows(int64_t group, int four) const {
        return head->low.data + group * low_bytes + four * low_rows_bytes();
    }
    size_t low_rows_bytes() const { return low_bytes / 4; }
    int64_t blocks() const { return head->high.cols / kBlock; }
    // Have what bounds by blocks, and the low parts of tokens, need on its way into the second-level cache.
    void fetch_shares(int64_t group) const { fetch(shares(group), blocks() * kGroupRows); }
    void fetch_low(int64_t group, unsigned tokens) const {
        if (tokens) fetch(scales(group), blocks() * kGroupRows * sizeof(uint16_t));
        for (int four = 0; four < 4; four++)
            if (tokens >> 4 * four & 15) fetch(low_rows(group, four), low_rows_bytes());
    }
    static void fetch(const void* memory, size_t bytes) {
        const auto* begin = static_cast<const uint8_t*>(memory);
        for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(begin + at, 0, 2);
        __builtin_prefetch(begin + bytes - 1, 0, 2);
    }
    // Adds the low part of some tokens of a group to their scores.
    void add_low(const Run& r, int64_t group, unsigned tokens, const QuantBlock* x, float* of_group) const {
        for (; tokens; tokens &= tokens - 1) {
            const int lane = std::countr_zero(tokens);
            of_group[lane] += r.matmul.low(low_rows(group, lane / 4) + lane % 4 * 4, scales(group) + lane, x, blocks());
        }
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
        const int64_t stride = x->data.stride / kBlock, blocks = scores->blocks(), groups = scores->head->high.groups();
        for (auto& best : scores->noisy[r.thread]) best = {-kInfinity, 0};
        r.each_row(*x, [&](int i) {
            std::fill_n(&scores->completed[i * groups], groups, uint16_t{0});
            double total = 0;
            float* norm = &scores->block_norms[i * blocks];
            for (const QuantBlock *b = x->data.q + i * x->data.digits * stride, *end = b + blocks; b < end; b++) {
                int squares = 0;
                for (int8_t q : b->q) squares += q * q;
                total += static_cast<double>(b->scale) * b->scale * squares;
                *norm++ = static_cast<float>(b->scale * std::sqrt(squares) * 1.000001 / SplitHead::kShares);
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
            const int64_t piece = i * s.pieces + begin / s.step;
            r.layer.bounds(from, error, s.norms[i], width, &s.lower[piece * kGroupRows], &s.largest_lower[piece], &s.largest_upper[piece]);
            const Wanted& w = s.wanted(r, i);
            if (w.temperature <= 0) continue;
            Scores::Noisy& best = s.noisy[r.thread][i];
            const float lower = r.sampling.noisy_lower(from, error, s.norms[i], column, width, w.temperature, w.key, best.lower);
            if (lower > best.lower) best = {lower, begin};
        }
    }
};

// A lower bound of the best-th largest logit: each set's maximum is of another token.
struct FirstThresholdOp : HeadOp {
    const char* name() const override { return "threshold"; }

    void run(const Run& r) const override {
        Scores& s = *scores;
        r.each_row(*x, [&](int i) {
            if (s.exact(r, i)) return;
            auto& maxima = s.scratch[r.thread];
            const float* of_pieces = &s.lower[i * s.pieces * kGroupRows];
            const int64_t all = s.pieces * kGroupRows, sets = std::min(all, kMostSets);
            maxima.assign(of_pieces, of_pieces + sets);
            for (int64_t first = sets; first < all; first += sets)
                for (int64_t k = 0; k < std::min(sets, all - first); k++) maxima[k] = std::max(maxima[k], of_pieces[first + k]);
            s.thresholds[i] = nth_largest(maxima, s.wanted(r, i).best);
        });
    }

    // -inf where there are not as many.
    static float nth_largest(std::vector<float>& values, int64_t n) {
        if (n > static_cast<int64_t>(values.size())) return -kInfinity;
        std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), std::greater<>());
        return values[n - 1];
    }
};

// Higher ones, from the logits that are exact by now: those of the tokens whose lower bounds reach the first threshold, which
// are as many as wanted, and of the one with the largest lower bound with noise.
struct SecondThresholdOp : HeadOp {
    const char* name() const override { return "threshold"; }

    void run(const Run& r) const override {
        Scores& s = *scores;
        const int64_t groups = s.head->high.groups();
        r.each_row(*x, [&](int i) {
            if (s.exact(r, i)) return;
            const Wanted& w = s.wanted(r, i);
            const uint16_t* completed = &s.completed[i * groups];
            auto& logits = s.scratch[r.thread];
            logits.clear();
            for (int64_t g = 0; g < groups; g++)
                for (unsigned tokens = completed[g]; tokens; tokens &= tokens - 1) {
                    const float logit = row(*out, i)[g * kGroupRows + std::countr_zero(tokens)];
                    logits.push_back(logit > s.thresholds[i] ? logit : s.thresholds[i]);  // also one that is no number
                }
            s.thresholds[i] = std::max(s.thresholds[i], FirstThresholdOp::nth_largest(logits, w.best));
            if (w.temperature > 0) {
                const auto [lower, group] = s.noisiest(i);
                const int64_t column = group * kGroupRows, width = std::min(s.step, groups - group) * kGroupRows;
                logits.assign(row(*out, i) + column, row(*out, i) + column + width);
                for (int64_t k = 0; k < width; k++)
                    if (!(completed[group + k / kGroupRows] >> k % kGroupRows & 1)) logits[k] = -kInfinity;
                const float best = r.sampling.noisy_lower(logits.data(), s.head->error, 0, column, width, w.temperature, w.key, lower);
                // The draw computes (logit - largest) / temperature + noise, whose rounding is less than this.
                s.noisy_thresholds[i] = best - 1e-6f * (std::abs(best) + 64 * w.temperature);
            }
        });
    }
};

// Adds the low part of the tokens that can be among the wanted: first of those that raise the threshold, then of all that reach it.
struct LowScoresOp : HeadOp {
    bool first;
    explicit LowScoresOp(bool is_first) : first(is_first) {}
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
        const int64_t groups = s.head->high.groups();
        auto& [of_piece, tokens, reached_groups] = s.reaching[r.thread];
        std::fill_n(tokens.begin(), (end - begin) * rows, uint16_t{0});
        auto reached = [&](int64_t g) { return &tokens[(g - begin) * rows]; };  // by each output
        auto reached_by_any = [&](int64_t g) { return std::accumulate(reached(g), reached(g) + rows, 0u, std::bit_or<>()); };

        bool any = false;
        for (int i = 0; i < rows; i++)
            for (int64_t from = begin; from < end && !s.exact(r, i); from += s.step) {
                const int64_t to = std::min(from + s.step, end);
                uint16_t* completed = &s.completed[i * groups + from];
                std::fill_n(of_piece.begin(), to - from, uint16_t{0});
                if (!(first ? find_best(r, i, from, to, of_piece.data()) : find_reaching(r, i, from, to, of_piece.data()))) continue;
                for (int64_t k = 0; k < to - from; k++) {
                    reached(from + k)[i] = of_piece[k] & ~completed[k];
                    if (first) completed[k] = of_piece[k];
                }
                any = true;
            }
        if (!any) return;

        reached_groups.clear();
        for (int64_t g = begin; g < end; g++)
            if (reached_by_any(g)) reached_groups.push_back(g), s.fetch_shares(g);
        for (int64_t g : reached_groups) {
            if (!first) confirm(r, rows, g, reached(g));
            s.fetch_low(g, reached_by_any(g));
        }
        const Activations factor = Scores::factor(*x);
        for (int64_t g : reached_groups)
            for (int i = 0; i < rows; i++)
                s.add_low(r, g, reached(g)[i], factor.q + i * factor.stride / kBlock, row(*out, i) + g * kGroupRows);
    }

    // Leaves of the tokens that each output has of a group those that do so by the closer bounds as well.
    void confirm(const Run& r, int rows, int64_t group, uint16_t* tokens) const {
        const Scores& s = *scores;
        const int64_t column = group * kGroupRows;
        for (int i = 0; i < rows; i++) {
            if (!tokens[i]) continue;
            const Wanted& w = s.wanted(r, i);
            float upper[kGroupRows];
            uint16_t reaches;
            r.layer.upper_by_blocks(row(*out, i) + column, s.head->error + column, s.shares(group), &s.block_norms[i * s.blocks()],
                                    s.blocks(), upper);
            r.layer.reaching(upper, s.head->error, 0, s.thresholds[i], kGroupRows, &reaches);
            if (w.temperature > 0)
                r.sampling.noisy_reaching(upper, s.head->error, 0, column, kGroupRows, w.temperature, w.key, s.noisy_thresholds[i], &reaches);
            tokens[i] &= reaches;
        }
    }

    // Which tokens of the groups [begin, end), a piece, have lower bounds that reach the threshold of output i; false if none has.
    bool find_best(const Run& r, int i, int64_t begin, int64_t end, uint16_t* reaches) const {
        const Scores& s = *scores;
        const int64_t column = begin * kGroupRows, width = (end - begin) * kGroupRows;
        const bool any = s.largest_lower[i * s.pieces + begin / s.step] >= s.thresholds[i];
        if (any) r.layer.reaching(row(*out, i) + column, s.head->error + column, -s.norms[i], s.thresholds[i], width, reaches);
        const Wanted& w = s.wanted(r, i);
        const Scores::Noisy noisiest = w.temperature > 0 ? s.noisiest(i) : Scores::Noisy{0, -1};
        if (noisiest.group != begin) return any;
        r.sampling.noisy_reaching(row(*out, i) + column, s.head->error + column, -s.norms[i], column, width, w.temperature, w.key,
                                  noisiest.lower, reaches);  // with its noise at most, so some others as well
        return true;
    }

    // Which have upper bounds that do, or can win by noise.
    bool find_reaching(const Run& r, int i, int64_t begin, int64_t end, uint16_t* reaches) const {
        const Scores& s = *scores;
        const Wanted& w = s.wanted(r, i);
        const float upper = s.largest_upper[i * s.pieces + begin / s.step];
        const int64_t column = begin * kGroupRows, width = (end - begin) * kGroupRows;
        const float *from = row(*out, i) + column, *error = s.head->error + column;
        const bool any = upper >= s.thresholds[i];
        if (any) r.layer.reaching(from, error, s.norms[i], s.thresholds[i], width, reaches);
        if (w.temperature <= 0 || upper + w.temperature * kLargestNoise < s.noisy_thresholds[i]) return any;
        r.sampling.noisy_reaching(from, error, s.norms[i], column, width, w.temperature, w.key, s.noisy_thresholds[i], reaches);
        return true;
    }
};

}  // namespace

BufferId Plan::split_logits(BufferId x, std::shared_ptr<const SplitHead> head) {
    read_by(head->high, x, 1);
    const int most = get(x).rows == Rows::Pass ? max_rows_ : max_outputs_, threads = pool_->size();
    auto scores = std::make_shared<Scores>();
    scores->high_bytes = group_bytes(head->high.type, head->high.cols);
    scores->low_bytes = group_bytes(head->low.type, head->low.cols);
    scores->step = std::max<int64_t>(1, static_cast<int64_t>(kHighPieceBytes / scores->high_bytes));
    scores->pieces = (head->high.groups() + scores->step - 1) / scores->step;
    scores->block_norms.resize(static_cast<size_t>(most) * (head->high.cols / kBlock));
    for (auto* values : {&scores->norms, &scores->thresholds, &scores->noisy_thresholds}) values->resize(most);
    for (auto* bounds : {&scores->largest_lower, &scores->largest_upper}) bounds->resize(static_cast<size_t>(most) * scores->pieces);
    scores->lower.resize(static_cast<size_t>(most) * scores->pieces * kGroupRows);
    scores->noisy.assign(threads, std::vector<Scores::Noisy>(most));
    scores->completed.resize(static_cast<size_t>(most) * head->high.groups());
    scores->reaching.resize(threads);
    for (auto& of_thread : scores->reaching) {
        of_thread.of_piece.resize(scores->step);
        of_thread.tokens.resize(static_cast<size_t>(most) * kLowPieces * scores->step);
    }
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
    record(std::make_unique<FirstThresholdOp>(), {bounds}, {bounds}, by_row);
    record(std::make_unique<LowScoresOp>(true), {x, norms, bounds}, {id, bounds}, Share::Pieces);
    record(std::make_unique<SecondThresholdOp>(), {id, bounds}, {bounds}, by_row);
    record(std::make_unique<LowScoresOp>(false), {x, norms, bounds}, {id}, Share::Pieces);
    capped_.emplace_back(id, scores->capped);
    return id;
}

}  // namespace gmtp
