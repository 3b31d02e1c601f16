#include "gmtp/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>

#include "gmtp/error.h"

namespace gmtp {
namespace {

constexpr int64_t kSmallNucleus = 256;  // tokens ranked at once for top-p; most nuclei are smaller
constexpr int kBands = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One row of logits on its way to a token.
struct Row {
    const SamplingKernels& kernels;
    const float* logits;
    int64_t vocab;
    Scratch& scratch;
    float largest = -kInfinity;

    Row(const SamplingKernels& kernels, const float* logits, int64_t vocab, Scratch& scratch)
        : kernels(kernels), logits(logits), vocab(vocab), scratch(scratch) {
        scratch.maxima.resize(blocks() * 16), scratch.block_maxima.resize(blocks());
        kernels.lane_maxima(logits, vocab, scratch.maxima.data(), scratch.block_maxima.data());
        for (float m : scratch.block_maxima) largest = std::max(largest, m);
        if (!std::isfinite(largest))
            throw InputError("The model's logits are not finite: its checkpoint is damaged, or its values overflow the type it runs in.");
    }

    int64_t blocks() const { return (vocab + kSampleBlock - 1) / kSampleBlock; }

    int32_t argmax() const {
        for (int64_t block = 0;; block++) {
            if (scratch.block_maxima[block] < largest) continue;
            for (int64_t i = block * kSampleBlock;; i++)
                if (logits[i] == largest) return static_cast<int32_t>(i);
        }
    }

    // All tokens with logits >= floor, in the order of their ids, into scratch.found.
    void collect(float floor) {
        auto& [values, ids] = scratch.found;
        int64_t count = 0;
        for (int64_t block = 0; block < blocks(); block++) {
            if (scratch.block_maxima[block] < floor) continue;
            if (const int64_t room = count + kSampleBlock; room > static_cast<int64_t>(values.size()))
                values.resize(2 * room), ids.resize(2 * room);
            count += kernels.collect(logits, block * kSampleBlock, std::min((block + 1) * kSampleBlock, vocab), floor,
                                     values.data() + count, ids.data() + count);
        }
        values.resize(count), ids.resize(count);
    }

    // The first `count` tokens of the ranking (fewer if fewer are above -inf), into scratch.kept.
    // Each of `count` groups with the largest maxima holds a token at least as large as the smallest of those maxima,
    // so that maximum is a floor no wanted token lies under. It is looked for in the blocks that can hold such groups.
    void rank(int64_t count) {
        auto& maxima = scratch.ranked_maxima;
        const auto smallest_of_best = [&] {
            std::nth_element(maxima.begin(), maxima.begin() + (count - 1), maxima.end(), std::greater<>());
            return maxima[count - 1];
        };
        float floor = std::numeric_limits<float>::lowest();
        if (count < static_cast<int64_t>(scratch.maxima.size())) {
            float least = -kInfinity;
            if (count <= blocks()) maxima = scratch.block_maxima, least = smallest_of_best();
            maxima.clear();
            for (int64_t block = 0; block < blocks(); block++)
                if (scratch.block_maxima[block] >= least)
                    for (int64_t i = 16 * block; i < 16 * (block + 1); i++)
                        if (scratch.maxima[i] >= least) maxima.push_back(scratch.maxima[i]);
            floor = std::max(floor, smallest_of_best());
        }
        collect(floor);
        rank_found(count);
        auto &kept = scratch.kept, &found = scratch.found;
        kept.logits.clear(), kept.ids.clear();
        for (int32_t i : scratch.order) kept.push(found.logits[i], found.ids[i]);
    }

    // Fills scratch.order with the ranking of scratch.found, its first `count` if there are more. Found tokens lie in the
    // order of their ids, so equal logits rank by index.
    void rank_found(int64_t count = std::numeric_limits<int64_t>::max()) {
        const auto& found = scratch.found;
        auto& order = scratch.order;
        order.resize(found.ids.size());
        std::iota(order.begin(), order.end(), 0);
        auto before = [&](int32_t a, int32_t b) {
            return found.logits[a] != found.logits[b] ? found.logits[a] > found.logits[b] : a < b;
        };
        if (static_cast<int64_t>(order.size()) > count) {
            std::nth_element(order.begin(), order.begin() + count, order.end(), before);
            order.resize(count);
        }
        std::sort(order.begin(), order.end(), before);
    }

    // Cuts scratch.kept after the token with which the ranked mass reaches `mass`; false if it is not reached.
    bool cut_at_mass(double mass, float scale) {
        auto& kept = scratch.kept;
        scratch.weights.resize(kept.ids.size());
        kernels.weights(kept.logits.data(), kept.ids.size(), largest, scale, scratch.weights.data());
        double before = 0;
        for (size_t i = 0; i < kept.ids.size(); i++) {
            before += scratch.weights[i];
            if (before >= mass) {
                kept.logits.resize(i + 1);
                kept.ids.resize(i + 1);
                return true;
            }
        }
        return false;
    }

    void keep_top_p(float top_p, float scale) {
        const double mass = top_p * kernels.total_weight(logits, vocab, largest, scale);
        rank(std::min(kSmallNucleus, vocab));
        if (cut_at_mass(mass, scale) || vocab <= kSmallNucleus) return;

        // A wide nucleus: sum the weights in bands of 1/64 nat below the largest logit, which finds the band where the
        // mass is reached; only that band is ranked.
        scratch.weights.resize(vocab);
        kernels.weights(logits, vocab, largest, scale, scratch.weights.data());
        auto band_of = [&](float logit) {  // the last band takes the rest, NaN with it
            float below = (largest - logit) * scale * 64;
            return below < kBands - 1 ? static_cast<int>(below) : kBands - 1;
        };
        scratch.bands.assign(kBands, 0.0);
        for (int64_t i = 0; i < vocab; i++) scratch.bands[band_of(logits[i])] += scratch.weights[i];
        double before = 0;
        int last = 0;
        while (last < kBands - 1 && before + scratch.bands[last] < mass) before += scratch.bands[last++];

        auto &kept = scratch.kept, &found = scratch.found;
        for (auto* list : {&kept, &found}) list->logits.clear(), list->ids.clear();
        for (int64_t i = 0; i < vocab; i++) {
            const int band = band_of(logits[i]);
            if (band <= last && logits[i] > -kInfinity) (band < last ? kept : found).push(logits[i], static_cast<int32_t>(i));
        }
        rank_found();
        for (int32_t i : scratch.order) {
            if (before >= mass) break;
            kept.push(found.logits[i], found.ids[i]);
            before += scratch.weights[found.ids[i]];
        }
    }

    // Fills scratch.kept with what the filters keep.
    void filter(const SampleParams& p, float scale) {
        auto& kept = scratch.kept;
        float floor = p.min_p > 0 ? largest + kernels.log(p.min_p) / scale : -kInfinity;
        if (p.top_k > 0 && p.top_k < vocab) {
            rank(p.top_k);
            if (p.top_p < 1)
                cut_at_mass(p.top_p * kernels.total_weight(kept.logits.data(), kept.ids.size(), largest, scale), scale);
        } else if (p.top_p < 1) {
            keep_top_p(p.top_p, scale);
        } else {
            collect(floor);
            std::swap(scratch.found, kept);
            return;
        }
        size_t count = kept.ids.size();
        while (count > 1 && kept.logits[count - 1] < floor) count--;
        kept.logits.resize(count);
        kept.ids.resize(count);
    }

    // tokens: the token of each logit, null for its index; noise and result are of tokens.
    int32_t draw(const SampleParams& p, int64_t position, const int32_t* tokens = nullptr) {
        const int32_t first = argmax(), likeliest = tokens ? tokens[first] : first;
        if (p.temperature <= 0 || p.top_k == 1) return likeliest;
        // Scores are relative to the largest logit; the limit only keeps 0 * scale a number.
        float scale = 1.0f / std::max(p.temperature, 1e-30f);
        NoiseKey key = noise_key(p.seed, position);
        Winner none{-kInfinity, std::numeric_limits<int32_t>::max()};
        if ((p.top_k > 0 && p.top_k < vocab) || p.top_p < 1 || p.min_p > 0) {
            filter(p, scale);
            auto& kept = scratch.kept;
            if (tokens)
                for (int32_t& id : kept.ids) id = tokens[id];
            return kernels.noisy_argmax(kept.logits.data(), kept.ids.data(), kept.ids.size(), largest, scale, key, none).token;
        }
        // The likeliest token first: it sets the mark that most others cannot reach.
        Winner start = kernels.noisy_argmax(logits + first, &likeliest, 1, largest, scale, key, none);
        return kernels.noisy_argmax(logits, tokens, vocab, largest, scale, key, start).token;
    }
};

// Hugging Face's form of the penalty of CTRL (Keskar et al. 2019): once per token, however often it was seen.
void penalise(const float* logits, int64_t vocab, float penalty, std::span<const int32_t> seen, float* row) {
    for (int32_t id : seen) {
        if (id < 0 || id >= vocab) continue;
        row[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
    }
}

// What is added to the logits, ascending by token, into scratch.added. Occurrences are counted before they are multiplied,
// so that the sum does not depend on how they are split between the sequence and the drafts.
void find_additions(const SampleParams& p, Seen seen, Scratch& scratch) {
    auto& added = scratch.added;
    added.clear();
    if (p.presence_penalty != 0 || p.frequency_penalty != 0) {
        auto& ids = scratch.seen;
        ids.assign(seen.sequence.begin(), seen.sequence.end());
        ids.insert(ids.end(), seen.drafted.begin(), seen.drafted.end());
        ids.erase(ids.begin(), ids.begin() + std::min(seen.prompt, ids.size()));
        std::sort(ids.begin(), ids.end());
        for (size_t i = 0, end; i < ids.size(); i = end) {
            for (end = i + 1; end < ids.size() && ids[end] == ids[i]; end++) {}
            added.push_back({ids[i], -(p.presence_penalty + p.frequency_penalty * static_cast<float>(end - i))});
        }
    }
    added.insert(added.end(), p.biases.begin(), p.biases.end());
    std::stable_sort(added.begin(), added.end(), [](LogitBias a, LogitBias b) { return a.token < b.token; });
}

// Adds them. tokens: the token of each logit, null for its index.
void add_to(float* row, int64_t count, const int32_t* tokens, const std::vector<LogitBias>& added) {
    if (!tokens) {
        for (auto [token, value] : added)
            if (token >= 0 && token < count) row[token] += value;
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        auto it = std::lower_bound(added.begin(), added.end(), tokens[i], [](LogitBias a, int32_t token) { return a.token < token; });
        for (; it != added.end() && it->token == tokens[i]; it++) row[i] += it->value;
    }
}

// Where the given ids are among `tokens`.
std::vector<int32_t> places_of(std::vector<int32_t> ids, const int32_t* tokens, int64_t count) {
    std::sort(ids.begin(), ids.end());
    std::vector<int32_t> places;
    for (int64_t i = 0; i < count; i++)
        if (std::binary_search(ids.begin(), ids.end(), tokens[i])) places.push_back(static_cast<int32_t>(i));
    return places;
}

// Puts out what is not allowed.
void mask(float* row, int64_t vocab, std::span<const uint32_t> allowed) {
    for (int64_t word = 0; 32 * word < vocab; word++) {
        uint32_t bits = allowed[word];
        if (bits == ~0u) continue;
        float* of_word = row + 32 * word;
        for (int64_t i = 0, count = std::min<int64_t>(32, vocab - 32 * word); i < count; i++, bits >>= 1)
            if (!(bits & 1)) of_word[i] = -kInfinity;
    }
}

uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

}  // namespace

NoiseKey noise_key(uint64_t seed, int64_t position) {
    uint64_t key = splitmix(splitmix(seed) ^ static_cast<uint64_t>(position));
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

Sampled sample(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleParams& p,
               int64_t position, Seen seen, Scratch& scratch, std::span<const uint32_t> allowed) {
    Sampled result;
    const float* row = logits;
    if (!allowed.empty() && static_cast<int64_t>(allowed.size()) < (vocab + 31) / 32)
        throw InputError("a mask needs a bit for each token of the vocabulary");
    if (p.adjusts() || !allowed.empty()) {
        scratch.row.assign(logits, logits + vocab);
        if (p.repetition_penalty != 1) {
            penalise(logits, vocab, p.repetition_penalty, seen.sequence, scratch.row.data());
            penalise(logits, vocab, p.repetition_penalty, seen.drafted, scratch.row.data());
        }
        find_additions(p, seen, scratch);
        add_to(scratch.row.data(), vocab, nullptr, scratch.added);
        if (!allowed.empty()) mask(scratch.row.data(), vocab, allowed);
        row = scratch.row.data();
    }
    result.token = Row(kernels, row, vocab, scratch).draw(p, position);
    if (p.logprobs <= 0) return result;

    Row model(kernels, logits, vocab, scratch);
    float log_total = kernels.log(static_cast<float>(kernels.total_weight(logits, vocab, model.largest, 1.0f)));
    auto logprob = [&](float logit) { return logit - model.largest - log_total; };
    model.rank(std::min<int64_t>(p.logprobs, vocab));
    scratch.top.clear();
    for (size_t i = 0; i < scratch.kept.ids.size(); i++)
        scratch.top.push_back({scratch.kept.ids[i], logprob(scratch.kept.logits[i])});
    result.logprob = logprob(logits[result.token]);
    result.top = scratch.top;
    return result;
}

Wanted wanted(const SampleParams& p, int64_t position) {
    constexpr int kMost = 128;  // more would leave little of a split head unread
    if (p.adjusts() || p.logprobs > 0) return {};
    if (p.temperature <= 0 || p.top_k == 1) return {.best = 1};
    if (p.top_k > 0) return {.best = p.top_k <= kMost ? p.top_k : 0};
    if (p.top_p < 1 || p.min_p > 0) return {};
    return {.best = 1, .temperature = p.temperature, .key = noise_key(p.seed, position)};
}

Proposal propose(const SamplingKernels& kernels, const float* logits, const int32_t* tokens, int64_t count,
                const SampleParams& params, int64_t position, Seen seen, Scratch& scratch) {
    const float* row = logits;
    if (params.adjusts()) {
        scratch.row.assign(logits, logits + count);
        row = scratch.row.data();
        if (params.repetition_penalty != 1) {
            auto& ids = scratch.seen;
            ids.assign(seen.sequence.begin(), seen.sequence.end());
            ids.insert(ids.end(), seen.drafted.begin(), seen.drafted.end());
            if (tokens) ids = places_of(ids, tokens, count);
            penalise(logits, count, params.repetition_penalty, ids, scratch.row.data());
        }
        find_additions(params, seen, scratch);
        add_to(scratch.row.data(), count, tokens, scratch.added);
    }
    Row drafted(kernels, row, count, scratch);
    const int32_t token = drafted.draw(params, position, tokens);
    const int64_t place = tokens ? std::find(tokens, tokens + count, token) - tokens : token;
    const float scale = 1.0f / (params.temperature > 0 ? std::max(params.temperature, 1e-30f) : 1.0f);
    float weight;
    kernels.weights(row + place, 1, drafted.largest, scale, &weight);
    return {token, static_cast<float>(weight / kernels.total_weight(row, count, drafted.largest, scale))};
}

}  // namespace gmtp
