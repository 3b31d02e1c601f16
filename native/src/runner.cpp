#include "gmtp/runner.h"

#include <algorithm>
#include <array>

#include "gmtp/error.h"

namespace gmtp {

Runner::Runner(std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, BufferId logits, BufferId hidden, int64_t vocab)
    : plan_(std::move(plan)), cache_(std::move(cache)), logits_(logits), hidden_(hidden), vocab_(vocab) {
    plan_->finish(std::array{logits, hidden});
    if (plan_->buffer(logits).width < vocab) throw InputError("the plan's logits are narrower than the vocabulary");
    tokens_.reserve(plan_->max_rows());
}

void Runner::forward(std::span<const Feed> feeds) {
    size_t rows = 0, outputs = 0;
    for (const Feed& f : feeds) {
        rows += f.tokens.size(), outputs += f.outputs;
        if (f.tokens.empty() || f.outputs < 0 || f.outputs > static_cast<int>(f.tokens.size()))
            throw InputError("a feed needs tokens, and at most one output for each");
        for (int32_t t : f.tokens)
            if (t < 0 || t >= vocab_) throw InputError("token " + std::to_string(t) + " is outside the vocabulary of " + std::to_string(vocab_));
        if (cache_->length(f.sequence) + static_cast<int64_t>(f.tokens.size()) > cache_->context())
            throw InputError("the context of " + std::to_string(cache_->context()) + " tokens is full");
    }
    if (rows == 0 || rows > static_cast<size_t>(plan_->max_rows()))
        throw InputError("a pass must have between 1 and " + std::to_string(plan_->max_rows()) + " rows");
    if (outputs > static_cast<size_t>(plan_->max_outputs()))
        throw InputError("a pass can have at most " + std::to_string(plan_->max_outputs()) + " outputs");

    for (const Feed& f : feeds) cache_->reserve(f.sequence, static_cast<int64_t>(f.tokens.size()));
    tokens_.clear();
    pass_.segments.clear(), pass_.positions.clear(), pass_.outputs.clear(), pass_.wanted.clear();
    for (const Feed& f : feeds) {
        const int count = static_cast<int>(f.tokens.size()), first = static_cast<int>(tokens_.size());
        const int64_t start = cache_->length(f.sequence);
        pass_.segments.push_back({f.sequence, start, first, count});
        for (int i = 0; i < count; i++) {
            tokens_.push_back(f.tokens[i]);
            pass_.positions.push_back(start + i);
            if (i >= count - f.outputs) pass_.outputs.push_back(first + i), pass_.wanted.push_back(wanted(f.params, start + i + 1));
        }
    }
    pass_.cache = cache_.get();
    pass_.tokens = tokens_.data();
    pass_.rows = static_cast<int>(rows);
    plan_->run(pass_);
    for (const Feed& f : feeds) cache_->advance(f.sequence, static_cast<int64_t>(f.tokens.size()));
}

bool Runner::exact() const { return std::ranges::all_of(pass_.wanted, [](const Wanted& w) { return w.best == 0; }); }

const float* Runner::logits(int output) const {
    const Buffer& b = plan_->buffer(logits_);
    return b.data.x + output * b.data.stride;
}

const float* Runner::hidden(int output) const {
    const Buffer& b = plan_->buffer(hidden_);
    return b.data.x + output * b.data.stride;
}

std::vector<Sampled> Runner::sample(std::span<const Choosing> how) {
    if (how.size() != pass_.segments.size()) throw InputError("a pass is sampled with one setting for each of its feeds");
    const size_t count = pass_.outputs.size();
    if (scratch_.size() < count) scratch_.resize(count);
    struct Place {
        size_t feed;
        std::span<const int32_t> drafted;  // the feed's tokens after its first output, up to this one
        std::span<const uint32_t> allowed{};
    };
    std::vector<Place> places;
    for (size_t feed = 0; feed < how.size(); feed++) {
        const Segment& segment = pass_.segments[feed];
        const size_t first = places.size();
        while (places.size() < count && pass_.outputs[places.size()] < segment.row + segment.count) {
            const int start = pass_.outputs[first] + 1, end = pass_.outputs[places.size()] + 1;
            places.push_back({feed, std::span<const int32_t>(tokens_).subspan(start, end - start)});
        }
        const auto [allowed, masks] = std::pair(how[feed].allowed, how[feed].masks);
        if (masks > places.size() - first) throw InputError("a feed has more masks than outputs");
        for (size_t mask = 0; mask < masks; mask++) {
            const size_t words = allowed.size() / masks;
            places[places.size() - masks + mask].allowed = allowed.subspan(mask * words, words);
        }
    }
    std::vector<Sampled> result(count);
    plan_->pool().parallel_for(static_cast<int64_t>(count), 1, [&](int64_t i, int64_t) {
        const Choosing& choosing = how[places[i].feed];
        result[i] = gmtp::sample(*plan_->kernels().sampling, logits(static_cast<int>(i)), vocab_, choosing.params,
                                 pass_.positions[pass_.outputs[i]] + 1, {choosing.seen, places[i].drafted, choosing.prompt}, scratch_[i],
                                 places[i].allowed);
    });
    return result;
}

}  // namespace gmtp
