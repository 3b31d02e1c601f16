// Runs a drafter's plan over the target's cache: one call a round.
#pragma once
#include "gmtp/plan.h"
#include "gmtp/sampler.h"

namespace gmtp {

// Which buffers of a drafter's plan are which.
struct DrafterBuffers {
    BufferId state;                // in: the target's hidden state, or the drafter's own from the step before
    std::vector<BufferId> logits;  // out: of the tokens that one run proposes, in order
    BufferId next = -1;            // out: the state of the step after; -1: one run is all (parallel heads)
};

class Drafter {
public:
    Drafter(std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, DrafterBuffers buffers, int64_t vocab);

    // Proposes up to `depth` tokens to follow `token`, the newest of the sequence, which is not in the cache yet. state: the
    // target's hidden state that `token` was sampled from; seen: what the repetition penalty counts, up to and including
    // `token`; floor: the probability that the drafter must give all it has proposed together, or it ends before. All steps
    // work at the position of `token`. Throws InputError.
    std::vector<int32_t> draft(int sequence, int32_t token, std::span<const float> state, int depth, const SampleParams& params,
                               std::span<const int32_t> seen = {}, float floor = 0);

    // Scores of the last step: float [count], and the tokens they are of (null: token i is at i).
    std::span<const float> logits(size_t head) const;
    const int32_t* candidates(size_t head) const { return plan_->candidates(buffers_.logits[head], 0); }
    std::span<const float> next_state() const;

    Plan& plan() { return *plan_; }

private:
    std::span<float> values(BufferId id) const;

    std::shared_ptr<Plan> plan_;
    std::shared_ptr<KvCache> cache_;
    DrafterBuffers buffers_;
    int64_t vocab_;
    Pass pass_;
    Scratch scratch_;
};

}  // namespace gmtp
