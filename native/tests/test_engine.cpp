// A small decoder with random weights, of every weight type and on every instruction set: the same bits however its rows are
// cut into passes and spread over threads, and after drafts that are taken back. Built to be run under the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "check.h"
#include "gmtp/cpu.h"
#include "gmtp/drafter.h"
#include "gmtp/lookup.h"
#include "gmtp/runner.h"

using namespace gmtp;

namespace {

constexpr int64_t kVocab = 208, kHidden = 256, kHeadDim = 32, kWidth = 512, kWindow = 40;
constexpr int kHeads = 4, kKvHeads = 2, kLayers = 2, kMaxRows = 96, kMaxOutputs = 16, kExperts = 5, kActiveExperts = 2;
constexpr int kCentroids = 13, kActiveCentroids = 3;
constexpr float kEps = 1e-6f;

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }

// Bytes without the top exponent bits, so that whatever floats lie in them are finite and small.
std::vector<uint8_t> random_bytes(WeightType type, int64_t rows, int64_t cols) {
    std::vector<uint8_t> bytes(file_row_bytes(type, cols) * rows);
    for (auto& b : bytes) b = static_cast<uint8_t>(random_bits() >> 24) & (is_float(type) ? 0x3B : 0x2B);
    return bytes;
}

std::shared_ptr<const Weight> random_weight(WeightType type, int64_t rows, int64_t cols, ThreadPool& pool) {
    const auto bytes = random_bytes(type, rows, cols);
    return Weight::pack(type, bytes.data(), bytes.size(), rows, cols, pool, [](size_t, size_t) {});
}

struct Weights {
    std::vector<uint8_t> embed_bytes;  // as in a file
    std::shared_ptr<const Weight> embed;
    struct Layer { std::shared_ptr<const Weight> q, k, v, o, gate, up, down, router, experts_gate_up, experts_down; };
    std::vector<Layer> layers;

    Weights(WeightType type, ThreadPool& pool) {
        auto make = [&](int64_t rows, int64_t cols) { return random_weight(type, rows, cols, pool); };
        embed_bytes = random_bytes(type, kVocab, kHidden);
        embed = Weight::pack(type, embed_bytes.data(), embed_bytes.size(), kVocab, kHidden, pool, [](size_t, size_t) {});
        for (int i = 0; i < kLayers; i++)
            layers.push_back({make(kHeads * kHeadDim * 2, kHidden), make(kKvHeads * kHeadDim, kHidden), make(kKvHeads * kHeadDim, kHidden),
                              make(kHidden, kHeads * kHeadDim * 2), make(kWidth, kHidden), make(kWidth, kHidden), make(kHidden, kWidth),
                              make(kExperts, kHidden), make(kExperts * 2 * kHidden, kHidden), make(kExperts * kHidden, kHidden)});
    }
};

struct Engine {
    std::vector<KvLayer> shapes = {{kKvHeads, kHeadDim, kWindow}, {kKvHeads, kHeadDim, 0}};
    std::shared_ptr<ThreadPool> pool;
    const Kernels& kernels;
    std::shared_ptr<KvCache> cache;
    std::shared_ptr<Runner> runner;

    Engine(const Weights& w, const Kernels& isa, int threads, KvType kv, float cap = 30.0f) : pool(std::make_shared<ThreadPool>(threads)), kernels(isa) {
        auto plan = std::make_shared<Plan>(pool, kernels, kMaxRows, kMaxOutputs);
        const std::vector<float> ones(kHidden, 1.0f), head_ones(kHeadDim, 1.0f);
        std::vector<float> frequencies(kHeadDim / 2);
        for (size_t i = 0; i < frequencies.size(); i++) frequencies[i] = std::pow(10000.0f, -2.0f * i / kHeadDim);

        BufferId x = plan->embed(std::make_shared<Table>(Table{w.embed->matrix.type, kVocab, kHidden, nullptr, w.embed}), 16.0f);
        const BufferId rope = plan->rope(kHeadDim / 2, frequencies);
        for (int i = 0; i < kLayers; i++) {
            const auto& l = w.layers[i];
            auto qkv = plan->project(plan->norm(x, ones, kEps), {l.q, l.k, l.v});
            plan->heads(qkv[0], kHeadDim, head_ones, kEps, rope);
            plan->heads(qkv[1], kHeadDim, head_ones, kEps, rope);
            plan->heads(qkv[2], kHeadDim, {}, kEps, -1);
            plan->remember(i, qkv[1], qkv[2]);
            plan->add_norm(x, plan->project(plan->attend(qkv[0], i, shapes[i], 0.2f, 0), {l.o})[0], ones, kEps, 1.0f);
            BufferId y = plan->gated(plan->norm(x, ones, kEps), l.gate, l.up);
            y = plan->project(plan->gelu_times(y, plan->concat(y, y), kWidth), {l.down})[0];
            plan->add_norm(x, y, ones, kEps, 0.5f);
            const BufferId scores = plan->project(plan->norm(x, ones, kEps), {l.router})[0];
            y = plan->experts(plan->norm(x, ones, kEps), scores, l.experts_gate_up, l.experts_down,
                              std::vector<float>(kExperts, 0.7f), kActiveExperts);
            plan->add_norm(x, y, ones, kEps, 1.0f);
            plan->add(x, plan->norm(y, {}, kEps), 1.0f);
            plan->scale(x, 1.1f);
        }
        const BufferId hidden = plan->norm(plan->outputs(x), ones, kEps), logits = plan->logits(hidden, w.embed);
        if (cap > 0) plan->softcap(logits, cap);
        cache = std::make_shared<KvCache>(kv, shapes, 512, 32, 0);
        runner = std::make_shared<Runner>(plan, cache, logits, hidden, kVocab);
    }

    void feed(int sequence, std::span<const int32_t> tokens, int outputs, SampleParams params = kAllLogits) {
        const Feed f{sequence, tokens, outputs, params};
        runner->forward({&f, 1});
    }
    std::vector<float> logits() const {
        std::vector<float> all;
        for (int i = 0; i < runner->outputs(); i++) all.insert(all.end(), runner->logits(i), runner->logits(i) + kVocab);
        return all;
    }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The logits after the last of the tokens, fed `chunk` at a time.
std::vector<float> run(Engine& e, std::span<const int32_t> tokens, size_t chunk, bool wrong_drafts) {
    const int sequence = e.cache->create();
    for (size_t at = 0; at < tokens.size(); at += chunk) {
        e.feed(sequence, tokens.subspan(at, std::min(chunk, tokens.size() - at)), 1);
        if (wrong_drafts && at + chunk < tokens.size()) {
            const int64_t length = e.cache->length(sequence);
            e.feed(sequence, tokens.first(13), 13);
            e.cache->truncate(sequence, length);
        }
    }
    auto result = e.logits();
    e.cache->release(sequence);
    return result;
}

void test_decoder(WeightType type, KvType kv) {
    ThreadPool pool(2);
    const Weights weights(type, pool);
    std::vector<int32_t> tokens(150);
    for (auto& t : tokens) t = static_cast<int32_t>(random_bits() % kVocab);
    const auto few = std::span(tokens).first(20);  // for the portable build, which is slow
    Engine reference(weights, kernels_for("auto"), 1, kv), portable(weights, kernels_for("portable"), 2, kv);
    check(same_bits(run(portable, few, kMaxRows, false), run(reference, few, 7, false)), "instruction sets give the same bits");
    const auto expected = run(reference, tokens, kMaxRows, false);
    for (float value : expected) check(std::isfinite(value), "logits are finite");
    check(expected[0] != expected[1], "logits differ from token to token");
    for (int threads : {1, 3}) {
        Engine e(weights, kernels_for("auto"), threads, kv);
        for (size_t chunk : {5, 64}) check(same_bits(run(e, tokens, chunk, false), expected), "chunks give the same bits");
        check(same_bits(run(e, tokens, 30, true), expected), "wrong drafts leave no trace");

        // Two sequences in one pass, each as if alone.
        const int a = e.cache->create(), b = e.cache->create();
        e.feed(a, std::span(tokens).first(90), 0), e.feed(a, std::span(tokens).subspan(90, 59), 0);
        const Feed both[] = {{b, std::span(tokens).first(20), 1}, {a, std::span(tokens).last(1), 1}};
        e.runner->forward(both);
        check(std::memcmp(e.runner->logits(1), expected.data(), kVocab * sizeof(float)) == 0, "sequences do not mix");
        check_refused([&] { const Choosing how{}; e.runner->sample({&how, 1}); }, "two feeds are not sampled with one setting");
        e.cache->release(a), e.cache->release(b);
        check(e.cache->bytes_in_use() == 0, "released sequences hold nothing");
    }
}

// A drafter with a centroid head over the cache of a target: its drafts are those of steps taken one by one.
void test_drafter(WeightType type) {
    ThreadPool packing(1);
    const Weights weights(type, packing);
    const int64_t per = kVocab / kCentroids, padded = (per + kGroupRows - 1) / kGroupRows * kGroupRows;
    const auto pre = random_weight(type, kHidden, 2 * kHidden, packing), post = random_weight(type, kHidden, kHidden, packing);
    const auto q = random_weight(type, kHeads * kHeadDim, kHidden, packing);
    const auto o = random_weight(type, kHidden, 256, packing);
    const auto centroids = random_weight(type, kCentroids, kHidden, packing);
    const auto head = random_weight(type, kCentroids * padded, kHidden, packing);
    std::vector<int32_t> tokens(kCentroids * padded, -1);
    for (int32_t t = 0; t < kVocab; t++) tokens[t / per * padded + t % per] = kVocab - 1 - t;

    std::vector<std::vector<int32_t>> all;
    for (int threads : {1, 3}) {
        Engine e(weights, kernels_for("auto"), threads, KvType::F16);
        auto plan = std::make_shared<Plan>(e.pool, e.kernels, 1, 1);
        const std::vector<float> ones(kHidden, 1.0f), wide_ones(2 * kHidden, 1.0f);
        const BufferId state = plan->input(kHidden);
        const BufferId embed = plan->embed(std::make_shared<Table>(Table{type, kVocab, kHidden, nullptr, weights.embed}), 16.0f);
        BufferId x = plan->project(plan->norm(plan->concat(embed, state), wide_ones, kEps), {pre})[0];
        const BufferId seen = plan->attend(plan->project(plan->norm(x, ones, kEps), {q})[0], 1, e.shapes[1], 0.2f, 1);
        plan->add_norm(x, plan->project(plan->concat(seen, plan->copy(seen)), {o})[0], ones, kEps, 1.0f);
        const BufferId last = plan->norm(plan->outputs(x), ones, kEps);
        const BufferId next = plan->project(last, {post})[0];
        const BufferId logits = plan->centroid_logits(last, plan->project(last, {centroids})[0], head, tokens, kCentroids, kActiveCentroids);
        Drafter drafter(plan, e.cache, {state, {logits}, next}, kVocab);

        const int sequence = e.cache->create();
        const std::vector<float> start(kHidden, 0.5f);
        check_refused([&] { drafter.draft(sequence, 1, start, 1, {}); }, "an empty sequence has nothing to read");
        e.feed(sequence, std::vector<int32_t>{3, 5, 7}, 1);
        check_refused([&] { drafter.draft(sequence, kVocab, start, 1, {}); }, "a token outside the vocabulary is refused");
        check_refused([&] { drafter.draft(sequence, 1, std::span(start).first(16), 1, {}); }, "a narrow state is refused");
        for (float temperature : {0.0f, 1.0f}) {
            const SampleParams params{temperature, 0, 1, 0, 1, 9, 0};
            const auto together = drafter.draft(sequence, 11, start, 6, params);
            check(together.tokens.size() == 6 && together.sureness.size() == 6 && !together.left_out, "as many drafts as asked for");
            for (int32_t t : together.tokens) check(t >= 0 && t < kVocab, "drafts are tokens");
            const auto first = drafter.draft(sequence, 11, start, 1, params);
            check(first.tokens[0] == together.tokens[0], "the first draft does not depend on the later ones");
            const std::vector<float> half(3 * kSurenessLevels, 0.5f);  // products of 0.5, 0.25, 0.125
            const std::vector<float> none(3, 0.0f), second{0.5f, 0.3f, 0.0f}, third{0.0f, 0.0f, 0.3f};
            const auto left_out = drafter.draft(sequence, 11, start, 6, params, {}, 0, {half, second, none});
            check(left_out.tokens.size() == 1 && left_out.sureness.size() == 2 && left_out.left_out == together.tokens[1],
                  "a token that is not likely enough is left out");
            const auto unmade = drafter.draft(sequence, 11, start, 6, params, {}, 0, {half, none, third});
            check(unmade.tokens.size() == 2 && unmade.sureness.size() == 2 && !unmade.left_out, "or not even made");
            check(drafter.draft(sequence, 11, start, 6, params, {}, 0, {half, none, none}).tokens == together.tokens,
                  "beyond the depths that have bars a draft goes on");
            check_refused([&] { drafter.draft(sequence, 11, start, 6, params, {}, 0, {half, none, std::span(none).first(2)}); },
                          "bars of other depths are refused");
            int scored = 0;
            for (size_t i = 0; i < drafter.logits(0).size(); i++) scored += drafter.candidates(0)[i] >= 0;
            check(scored == kActiveCentroids * per, "the tokens of the chosen centroids are scored");
            all.push_back(together.tokens);
        }
    }
    check(sureness(0) == 0 && sureness(0.5f) == 5 && sureness(1) == kSurenessLevels - 1, "sureness goes by probability");
    check(all[0] == all[2] && all[1] == all[3], "drafts do not depend on the number of threads");
}

// An output embedding in two parts against the same one whole.
void test_split_head() {
    ThreadPool packing(1);
    Weights whole(WeightType::Q8_0, packing), split = whole;
    split.embed = pack_head(whole.embed_bytes.data(), whole.embed_bytes.size(), kVocab, kHidden, packing, [](size_t, size_t) {});
    std::vector<float> a(kHidden), b(kHidden);
    for (int64_t row = 0; row < kVocab; row++) {
        unpack_row(whole.embed->matrix, row, a.data());
        split.embed->split->unpack_row(row, b.data());
        check(same_bits(a, b), "a row looked up is the file's");
    }
    std::vector<int32_t> tokens(16);
    std::iota(tokens.begin(), tokens.end(), 30);
    std::vector<std::vector<float>> sums_of_isas;
    for (const std::string& isa : available_isas()) {
        auto& all_sums = sums_of_isas.emplace_back();
        for (auto [threads, cap] : {std::pair(1, 0.0f), {3, 0.0f}, {2, 30.0f}}) {
            auto engine = [&](const Weights& w) { return Engine(w, kernels_for(isa), threads, KvType::F16, cap); };
            Engine unsplit = engine(whole), one = engine(split), two = engine(split);
            const int r = unsplit.cache->create(), s = one.cache->create(), t = two.cache->create();
            for (const SampleParams& params : {SampleParams{}, {1.5f, 1}, {1.5f, 4, 0.9f}, {1.5f, 40}, {1.5f, 128}, {0.7f}, {30.0f}, {1.0f, 0, 0.9f}, {1.0f, 200}})
                for (uint64_t seed : {1, 2, 3}) {
                    SampleParams own = params;
                    own.seed = seed;
                    unsplit.feed(r, tokens, 16), one.feed(s, tokens, 16), two.feed(t, tokens, 16, own);
                    const bool reads_all = own.temperature > 0 && (own.top_p < 1 ? own.top_k == 0 : own.top_k > 128);
                    check(two.runner->exact() == reads_all, "a pass knows whether its logits are exact");
                    const auto logits = unsplit.logits(), sums = one.logits();
                    all_sums.insert(all_sums.end(), sums.begin(), sums.end());
                    const float largest = std::abs(std::ranges::max(logits, {}, [](float l) { return std::abs(l); }));
                    for (size_t i = 0; i < logits.size(); i++)
                        check(std::abs(logits[i] - sums[i]) <= 2e-6f * largest, "all logits are those of the whole matrix, but for rounding");
                    const Choosing how{own, {}};
                    const auto expected = one.runner->sample({&how, 1}), found = two.runner->sample({&how, 1});
                    const auto in_part = two.logits();
                    const int wanted = own.temperature == 0 || own.top_k == 0 ? 1 : own.top_k;
                    for (size_t i = 0; i < expected.size(); i++) {
                        check(expected[i].token == found[i].token, "the same tokens are drawn");
                        auto largest_of = [&](const std::vector<float>& all) {
                            std::vector<float> values(all.begin() + i * kVocab, all.begin() + (i + 1) * kVocab);
                            std::ranges::sort(values, std::greater<>());
                            values.resize(wanted);
                            return values;
                        };
                        check(same_bits(largest_of(sums), largest_of(in_part)), "and the largest logits have the same bits");
                    }
                }
        }
        check(same_bits(all_sums, sums_of_isas.front()), "every instruction set gives the same bits");
    }
}

void test_sampling() {
    ThreadPool pool(2);
    Engine e(Weights(WeightType::F32, pool), kernels_for("auto"), 2, KvType::F16);
    const int sequence = e.cache->create();
    std::vector<int32_t> tokens(16);
    std::iota(tokens.begin(), tokens.end(), 5);
    e.feed(sequence, tokens, 16);
    for (float temperature : {0.0f, 0.7f, 1.5f})
        for (int32_t top_k : {0, 1, 64})
            for (float top_p : {1.0f, 0.9f})
                for (float min_p : {0.0f, 0.05f}) {
                    const SampleParams params{temperature, top_k, top_p, min_p, 1.1f, 7, 5};
                    const Choosing how{params, std::span(tokens).first(1)};
                    const auto sampled = e.runner->sample({&how, 1});
                    check(sampled.size() == 16, "every output is sampled");
                    for (const Sampled& s : sampled) check(s.token >= 0 && s.token < kVocab && s.top.size() == 5, "a token of the vocabulary");
                }
    // Two sequences in one pass, each sampled with its own settings, give what they give alone.
    const SampleParams greedy{.repetition_penalty = 1.3f}, drawn{.temperature = 1.0f, .top_k = 40, .seed = 3};
    const auto first = std::span(tokens).first(9), second = std::span(tokens).last(6);
    const Choosing how[] = {{greedy, first.first(6)}, {drawn, {}}};
    std::vector<int32_t> alone, together;
    const int a = e.cache->create(), b = e.cache->create();
    e.feed(a, first, 4);
    for (const Sampled& s : e.runner->sample({&how[0], 1})) alone.push_back(s.token);
    e.feed(b, second, 2);
    for (const Sampled& s : e.runner->sample({&how[1], 1})) alone.push_back(s.token);
    e.cache->truncate(a, 0), e.cache->truncate(b, 0);
    const Feed both[] = {{a, first, 4}, {b, second, 2}};
    e.runner->forward(both);
    for (const Sampled& s : e.runner->sample(how)) together.push_back(s.token);
    check(together == alone && alone.size() == 6, "each sequence is sampled with its own settings");
    e.cache->release(a), e.cache->release(b);
    check_refused([&] { e.feed(sequence, std::vector<int32_t>{static_cast<int32_t>(kVocab)}, 1); }, "a token outside the vocabulary is refused");
    check_refused([&] { e.feed(sequence, std::vector<int32_t>(kMaxRows + 1), 1); }, "too long a pass is refused");
    check(e.cache->length(sequence) == 16, "what is refused changes nothing");
}

// Sequences of four texts come, grow, share pages and go: what one adopts is its own text's, and memory stays bounded.
void test_shared_pages() {
    constexpr int64_t kContext = 640, kRows = 96, kRollback = 32;
    KvCache cache(KvType::F32, {{1, 32, kWindow}, {1, 32, 0}, {1, 32, 150}, {0, 32, 0}}, kContext, kRollback, 0);
    const int64_t limit = 2 * cache.bytes_for(kContext, kRows);
    cache.set_limit(limit);
    auto names = [](int text, int64_t first, int64_t end) {
        std::vector<std::string> result;
        for (; first < end; first++) result.push_back(std::to_string(text) + "/" + std::to_string(first));
        return result;
    };
    struct Running {
        int handle, text;
    };
    std::vector<Running> running;
    auto mark = [&](const Running& s, int layer, int64_t page) { return static_cast<float*>(cache.keys(s.handle, layer, 0, page * kPagePositions)); };
    int adopted = 0, refused = 0;
    for (int step = 0; step < 4000; step++) {
        if (running.empty() || (running.size() < 6 && random_bits() % 8 == 0)) {
            Running s{cache.create(), static_cast<int>(random_bits() >> 20) % 4};
            const int64_t length = cache.adopt(s.handle, names(s.text, 0, (random_bits() >> 20) % 10));
            adopted += length > 0;
            check(length % kPagePositions == 0 && cache.floor(s.handle) <= length, "a sequence can go on from where it starts");
            for (int layer = 0; layer < 3; layer++) {
                const int64_t window = cache.layer(layer).window;
                for (int64_t page = window ? std::max<int64_t>(length - window + 1, 0) / kPagePositions : 0; page < length / kPagePositions; page++)
                    check(*mark(s, layer, page) == static_cast<float>(100 * s.text + page), "an adopted page is the text's");
            }
            running.push_back(s);
        }
        const size_t which = (random_bits() >> 20) % running.size();
        const Running s = running[which];
        const int64_t before = cache.length(s.handle), count = 1 + (random_bits() >> 20) % kRows;
        const std::pair<int, int64_t> wanted{s.handle, count};
        const bool fits = cache.fits({&wanted, 1}, kRows);
        refused += !fits;
        if (before + count > kContext || !fits || random_bits() % 16 == 0) {
            cache.release(s.handle);
            running.erase(running.begin() + static_cast<int64_t>(which));
            continue;
        }
        cache.reserve(s.handle, count);
        for (int layer = 0; layer < 3; layer++)
            for (int64_t page = (before + kPagePositions - 1) / kPagePositions; page * kPagePositions < before + count; page++)
                *mark(s, layer, page) = static_cast<float>(100 * s.text + page);
        cache.advance(s.handle, count);
        const int64_t drafts = std::min<int64_t>(count - 1, (random_bits() >> 20) % kRollback);
        cache.truncate(s.handle, before + count - drafts);
        const int64_t first = before / kPagePositions, end = cache.length(s.handle) / kPagePositions;
        cache.name(s.handle, first, names(s.text, first, end));
        check(cache.bytes_allocated() <= limit && cache.bytes_in_use() <= cache.bytes_allocated(), "memory is bounded");
    }
    check(adopted > 50 && refused > 50, "pages were shared, and memory ran out");
    for (const Running& s : running) cache.release(s.handle);
    check(cache.bytes_in_use() == 0 && cache.bytes_allocated() > 0, "named pages stay");
    cache.set_limit(0);
    check(cache.adopt(cache.create(), names(0, 0, 9)) == 0, "without a limit nothing is kept");
}

// Against its definition: the longest suffix seen before, and what followed it.
void test_lookup() {
    SuffixLookup lookup;
    std::vector<int32_t> text;
    for (int i = 0; i < 400; i++) {
        text.push_back(static_cast<int32_t>((random_bits() >> 20) % 3));
        lookup.extend(std::span(text).last(1));
        int64_t longest = 0;
        for (size_t end = 1; end < text.size(); end++) {
            size_t n = 0;
            while (n < end && text[end - 1 - n] == text[text.size() - 1 - n]) n++;
            longest = std::max<int64_t>(longest, static_cast<int64_t>(n));
        }
        check(lookup.match_length() == longest, "the longest match is found");
        const SuffixLookup::Continuation found = lookup.continuation(8);
        check(found.tokens.size() == (longest ? 8u : 0u), "a match is continued");
        check(found.sureness.size() == found.tokens.size(), "each token has a sureness");
        for (int32_t level : found.sureness) check(level >= 0 && level < kSurenessLevels, "there are so many levels");
    }
}

}  // namespace

int main() {
    for (int t = 0; t <= static_cast<int>(WeightType::IQ4_XS); t++) test_decoder(static_cast<WeightType>(t), static_cast<KvType>(t % 3));
    for (auto type : {WeightType::F32, WeightType::Q8_0, WeightType::Q4_K}) test_drafter(type);
    test_split_head();
    test_sampling();
    test_shared_pages();
    test_lookup();
    std::puts("all as expected");
}
