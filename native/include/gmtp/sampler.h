// Choosing a token from one row of logits.
//
// The choice is a pure function of (logits, settings, seed, position): position p draws its Gumbel noise g(seed, p, token)
// from a counter-based hash, and the sample is the argmax over the kept tokens of logit / temperature + g (the Gumbel-max
// trick). Whoever samples position p with the same seed uses the same noise, so a drafter agrees with its target as often
// as their distributions allow, and the text does not depend on the drafter: "Coupling without Communication and
// Drafter-Invariant Speculative Decoding", Daliri, Musco, Suresh 2024 (arXiv 2408.07978).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace gmtp {

// Something to add to the logit of a token.
struct LogitBias {
    int32_t token;
    float value;
};

struct SampleParams {
    float temperature = 0;          // 0: the largest logit, the lowest id on ties
    int32_t top_k = 0;              // 0: off
    float top_p = 1, min_p = 0;     // 1 and 0: off
    float repetition_penalty = 1;   // 1: off
    uint64_t seed = 0;
    int32_t logprobs = 0;           // how many of the likeliest tokens to report; 0: none, and no logprob of the chosen
    float presence_penalty = 0;     // taken once from each token that was generated; 0: off
    float frequency_penalty = 0;    // and this for each time that it was; 0: off
    std::vector<LogitBias> biases{};

    // Whether a draw depends on the tokens before it.
    bool counts() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
    // Whether it is made from other logits than the model's.
    bool adjusts() const { return counts() || !biases.empty(); }
};

// The tokens before a position, which penalties count, in two parts so that row i of a verification pass can share the
// sequence and add the i tokens drafted before it. Ids outside the vocabulary are passed over.
struct Seen {
    std::span<const int32_t> sequence, drafted;
    size_t prompt = 0;  // how many of the first were not generated: those count for the repetition penalty alone
};

struct TokenLogprob {
    int32_t token;
    float logprob;
};

// Log probabilities are of the model's own distribution, before penalties, biases, temperature and filters.
struct Sampled {
    int32_t token = 0;
    float logprob = 0;                  // of `token`; 0 when not asked for
    std::span<const TokenLogprob> top;  // likeliest first; lies in the Scratch until its next use
};

struct Candidates {
    std::vector<float> logits;
    std::vector<int32_t> ids;
    void push(float logit, int32_t id) { logits.push_back(logit), ids.push_back(id); }
};

// Memory that a caller keeps between calls, one per thread, so that sampling allocates nothing in steady state.
struct Scratch {
    std::vector<float> row, maxima, block_maxima, ranked_maxima, weights;
    std::vector<double> bands;
    std::vector<int32_t> order, seen;
    Candidates found, kept;
    std::vector<LogitBias> added;
    std::vector<TokenLogprob> top;
};

// The key of one position's noise, derived from (seed, position) by SplitMix64 (Steele, Lea, Flood 2014).
struct NoiseKey {
    uint32_t a, b;
};
NoiseKey noise_key(uint64_t seed, int64_t position);

struct Winner {
    float score;
    int32_t token;
};

constexpr int64_t kSampleBlock = 1024;  // logits whose maxima are kept lane by lane: 16 groups of 64

// The vector part, compiled once per instruction set; every build gives the same bits.
struct SamplingKernels {
    // maxima[16 * block + lane]: the largest of logits[1024 * block + 16 * j + lane]; NaN is passed over. block_maxima: of
    // whole blocks.
    void (*lane_maxima)(const float* logits, int64_t n, float* maxima, float* block_maxima);
    // Appends the logits >= floor of [begin, end) to values and ids (room for end - begin), in order; returns how many.
    int64_t (*collect)(const float* logits, int64_t begin, int64_t end, float floor, float* values, int32_t* ids);
    // out[i] = exp((logits[i] - shift) * scale).
    void (*weights)(const float* logits, int64_t n, float shift, float scale, float* out);
    // The sum of those weights, in a fixed order.
    double (*total_weight)(const float* logits, int64_t n, float shift, float scale);
    // The best of (logits[i] - shift) * scale + g(key, id) and of `start`, lowest id on ties; ids null means id = i.
    Winner (*noisy_argmax)(const float* logits, const int32_t* ids, int64_t n, float shift, float scale, NoiseKey key,
                           Winner start);
    // out[i] = g(key, i): standard Gumbel noise.
    void (*gumbel)(NoiseKey key, int64_t n, float* out);
    float (*log)(float x);
    // With token first + i's score known to be within error[i] * norm of x[i], and noise g of `key` times `temperature`
    // added: the largest lower bound, or `best` if that is larger; and in reaches[i / 16], added to what is there, a bit for
    // each whose upper bound is at least `threshold`. n is a multiple of 16.
    float (*noisy_lower)(const float* x, const float* error, float norm, int64_t first, int64_t n, float temperature,
                         NoiseKey key, float best);
    void (*noisy_reaching)(const float* x, const float* error, float norm, int64_t first, int64_t n, float temperature,
                           NoiseKey key, float threshold, uint16_t* reaches);
};

constexpr float kLargestNoise = 22.9f;  // no g is larger: see uniform() in kernels/sampling.cpp

// Samples the token at `position` (its index in the sequence) from logits[vocab]. The order is that of transformers,
// with OpenAI's adjustments where vLLM has them: repetition penalty, presence and frequency penalty, biases, temperature,
// top-k, top-p, min-p. Tokens are ranked by (logit descending, id ascending), and each
// filter keeps a first part of that ranking: top-k exactly k tokens, top-p those with less than top_p of the probability
// ranked before them, min-p those with at least min_p times the probability of the first. At least one is kept.
// allowed: a bit for each token, bit t % 32 of word t / 32, of those that may be sampled; empty: all may. The others are out
// before anything else looks at the logits, log probabilities excepted.
// Throws InputError when no logit is finite, or none that is allowed.
Sampled sample(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleParams& params,
               int64_t position, Seen seen, Scratch& scratch, std::span<const uint32_t> allowed = {});

// What of its logits a position's draw reads.
struct Wanted {
    int best = 0;           // so many of the largest; 0: any
    float temperature = 0;  // above 0: and all that can have the largest sum with this much of the noise of `key`
    NoiseKey key{};
};
Wanted wanted(const SampleParams& params, int64_t position);

// What a drafter proposes, and the probability it gives it before top-k, top-p and min-p (at temperature 1 if greedy).
struct Proposal {
    int32_t token;
    float probability;
};

// A drafter's proposal for `position`: the same draw, with the same noise, from its own logits. tokens[i] is the token of
// logits[i], -1 for none; null: token i.
Proposal propose(const SamplingKernels& kernels, const float* logits, const int32_t* tokens, int64_t count,
                const SampleParams& params, int64_t position, Seen seen, Scratch& scratch);

}  // namespace gmtp
