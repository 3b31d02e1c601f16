// Runs a drafter's plan over the target's cache: one call a round.
#pragma once
#include <array>
#include <optional>

#include "gmtp/plan.h"
#include "gmtp/sampler.h"

namespace gmtp {

// Which buffers of a drafter's plan are which.
struct DrafterBuffers {
    BufferId state;                // in: the target's hidden state, or the drafter's own from the step before
    std::vector<BufferId> logits;  // out: of the tokens that one run proposes, in order
    BufferId next = -1;            // out: the state of the step after; -1: one run is all (parallel heads)
};

// How sure a drafter is of a token, from the probability it gives it: 0 to kSurenessLevels - 1, higher being surer.
inline constexpr std::array kSurenessBounds{0.02f, 0.06f, 0.15f, 0.3f, 0.5f, 0.75f, 0.92f};
inline constexpr int kSurenessLevels = kSurenessBounds.size() + 1;
int sureness(float probability);

// Where a draft ends early. How likely its tokens are to be kept together is the product of their acceptance: float
// [depths, kSurenessLevels], by depth and sureness. Each depth has a bar for that product, below which its token is left out,
// and one for the product before it, below which its token is not even made.
struct DraftEnds {
    std::span<const float> acceptance;
    std::span<const float> keep, go_on;  // [depths]; none at all: a draft ends at its depth
};

struct Draft {
    std::vector<int32_t> tokens;
    std::vector<int32_t> sureness;    // of each, and then of the one left out
    std::optional<int32_t> left_out;  // what the draft ended before, if its token was made
};

class Drafter {
public:
    Drafter(std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, DrafterBuffers buffers, int64_t vocab);

    // Proposes up to `depth` tokens to follow `token`, the newest of the sequence, which is not in the cache yet. state: the
    // target's hidden state that `token` was sampled from; seen: what penalties count, up to and including `token`; prompt:
    // how many of these are the prompt's. All steps work at the position of `token`. Throws InputError.
    Draft draft(int sequence, int32_t token, std::span<const float> state, int depth, const SampleParams& params,
                std::span<const int32_t> seen = {}, size_t prompt = 0, const DraftEnds& ends = {});

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
