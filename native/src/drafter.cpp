#include "gmtp/drafter.h"

#include <algorithm>

#include "gmtp/error.h"

namespace gmtp {

Drafter::Drafter(std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, DrafterBuffers buffers, int64_t vocab)
    : plan_(std::move(plan)), cache_(std::move(cache)), buffers_(std::move(buffers)), vocab_(vocab) {
    if (buffers_.logits.empty()) throw InputError("a drafter needs logits");
    std::vector<BufferId> kept = buffers_.logits;
    if (buffers_.next >= 0) kept.push_back(buffers_.next);
    plan_->finish(kept);
    if (buffers_.next >= 0 && plan_->buffer(buffers_.next).width != plan_->buffer(buffers_.state).width)
        throw InputError("a drafter's state must be as wide before a step as after");
    pass_.cache = cache_.get(), pass_.rows = 1;
    pass_.positions.resize(1), pass_.outputs = {0}, pass_.segments.resize(1);
}

std::span<float> Drafter::values(BufferId id) const {
    const Buffer& b = plan_->buffer(id);
    return {b.data.x, static_cast<size_t>(b.width)};
}

std::span<const float> Drafter::logits(size_t head) const {
    const auto all = values(buffers_.logits.at(head));
    return candidates(head) ? all : all.first(std::min(all.size(), static_cast<size_t>(vocab_)));
}

std::span<const float> Drafter::next_state() const {
    if (buffers_.next < 0) throw InputError("parallel heads have no next state");
    return values(buffers_.next);
}

Draft Drafter::draft(int sequence, int32_t token, std::span<const float> state, int depth, const SampleParams& params,
                     std::span<const int32_t> seen, size_t prompt, const DraftEnds& ends) {
    const int64_t position = cache_->length(sequence);
    const auto input = values(buffers_.state);
    if (state.size() != input.size()) throw InputError("a hidden state has another width than the drafter reads");
    if (token < 0 || token >= vocab_) throw InputError("token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocab_));
    if (position < 1) throw InputError("a sequence needs a token in the cache before any can be drafted");
    const size_t barred = ends.keep.size();
    if (ends.go_on.size() != barred || ends.acceptance.size() != barred * kSurenessLevels)
        throw InputError("the bars of a draft are not about the same depths");
    std::copy(state.begin(), state.end(), input.begin());
    pass_.tokens = &token;
    pass_.positions[0] = position;
    pass_.segments[0] = {sequence, position, 0, 1};

    Draft draft;
    float together = 1;
    while (static_cast<int>(draft.tokens.size()) < depth) {
        if (const size_t step = draft.tokens.size(); step < barred && together < ends.go_on[step]) break;
        const Wanted wants = wanted(params, position + 1 + static_cast<int64_t>(draft.tokens.size()));
        // The heads of one run draw at several positions, each with a noise of its own.
        pass_.wanted = {wants.temperature > 0 && buffers_.logits.size() > 1 ? Wanted{} : wants};
        plan_->run(pass_);
        for (size_t head = 0; head < buffers_.logits.size() && static_cast<int>(draft.tokens.size()) < depth; head++) {
            const auto scores = logits(head);
            const size_t step = draft.tokens.size();
            const Proposal proposal =
                propose(*plan_->kernels().sampling, scores.data(), candidates(head), static_cast<int64_t>(scores.size()), params,
                        position + 1 + static_cast<int64_t>(step), {seen, draft.tokens, prompt}, scratch_);
            const int level = sureness(proposal.probability);
            draft.sureness.push_back(level);
            if (step < barred && (together *= ends.acceptance[step * kSurenessLevels + level]) < ends.keep[step]) {
                draft.left_out = proposal.token;
                return draft;
            }
            draft.tokens.push_back(token = proposal.token);
        }
        if (buffers_.next < 0) break;
        std::ranges::copy(next_state(), input.begin());
    }
    return draft;
}

int sureness(float probability) {
    return static_cast<int>(std::ranges::upper_bound(kSurenessBounds, probability) - kSurenessBounds.begin());
}

}  // namespace gmtp
