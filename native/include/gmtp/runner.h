// Runs a plan over sequences of a cache and samples from its logits: one call a round.
#pragma once
#include "gmtp/plan.h"
#include "gmtp/sampler.h"

namespace gmtp {

// Settings that read every logit.
inline const SampleParams kAllLogits{.logprobs = 1};

// The newest tokens of a sequence, to be put into the cache.
struct Feed {
    int sequence;
    std::span<const int32_t> tokens;
    int outputs;   // how many of the last of them want a result
    SampleParams params = kAllLogits;  // how they will be sampled: only the logits that this reads need be exact
};

// How the outputs of one feed are sampled. Output i decides the token after it.
struct Choosing {
    SampleParams params;
    std::span<const int32_t> seen;  // what penalties count, up to and including the first output's own token
    size_t prompt = 0;              // how many of these are the prompt's
    // [masks][words]: what each of the last `masks` outputs may be, see sample(); the others may be anything.
    std::span<const uint32_t> allowed{};
    size_t masks = 0;
};

class Runner {
public:
    Runner(std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, BufferId logits, BufferId hidden, int64_t vocab);

    // One pass: the feeds' tokens enter the cache, and rows 0.. of logits() and hidden() are the wanted outputs in order.
    // Throws InputError (too many rows, a token outside the vocabulary, a full context) before anything has changed.
    void forward(std::span<const Feed> feeds);
    int outputs() const { return static_cast<int>(pass_.outputs.size()); }
    const float* logits(int output) const;   // [vocab]; exact are those that the feed's settings read
    bool exact() const;                      // whether all logits of the last pass are
    const float* hidden(int output) const;   // [hidden size]
    int64_t hidden_size() const { return plan_->buffer(hidden_).width; }
    int64_t vocab() const { return vocab_; }
    int64_t experts_read() const { return pass_.experts_read; }  // by the last pass, in all layers together

    // Samples every output of the last pass, in order; `how` has one entry for each of its feeds.
    std::vector<Sampled> sample(std::span<const Choosing> how);

    Plan& plan() { return *plan_; }
    KvCache& cache() { return *cache_; }

private:
    std::shared_ptr<Plan> plan_;
    std::shared_ptr<KvCache> cache_;
    BufferId logits_, hidden_;
    int64_t vocab_;
    Pass pass_;
    std::vector<int32_t> tokens_;
    std::vector<Scratch> scratch_;  // [output]: holds its top logprobs
};

}  // namespace gmtp
