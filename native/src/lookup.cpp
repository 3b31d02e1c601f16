#include "gmtp/lookup.h"

namespace gmtp {
namespace {
// How many shorter suffixes learn of each new occurrence. The rest keep an older one, which is as true, only less recent.
constexpr int kRefreshed = 16;
}  // namespace

SuffixLookup::SuffixLookup() : slots_(1024, -1) {
    add_state(0);
    states_[0].link = -1;
}

void SuffixLookup::extend(std::span<const int32_t> tokens) {
    for (int32_t token : tokens) append(token);
}

void SuffixLookup::append(int32_t token) {
    text_.push_back(token);
    const int32_t end = static_cast<int32_t>(text_.size());
    const int32_t whole = add_state(end);
    int32_t p = last_;
    for (; p >= 0 && !find(p, token); p = states_[p].link) add_edge(p, token, whole);
    if (p < 0) {
        states_[whole].link = 0;
    } else {
        const int32_t q = *find(p, token);
        if (states_[q].length == states_[p].length + 1) {
            states_[whole].link = q;
        } else {
            // Split q: its strings up to this length now end here as well, the longer ones do not.
            const int32_t split = add_state(states_[p].length + 1);
            states_[split].link = states_[q].link;
            states_[split].end = states_[q].end;
            for (int32_t e = states_[q].edges; e >= 0; e = edges_[e].next) {
                const Edge edge = edges_[e];
                add_edge(split, edge.token, edge.to);
            }
            for (int32_t* to; p >= 0 && (to = find(p, token)) && *to == q; p = states_[p].link) *to = split;
            states_[q].link = states_[whole].link = split;
        }
    }
    last_ = whole;
    const int32_t match = states_[whole].link;
    match_end_ = match > 0 ? states_[match].end : 0;
    int32_t s = whole;
    for (int i = 0; i <= kRefreshed && s > 0; i++, s = states_[s].link) states_[s].end = end;
}

std::vector<int32_t> SuffixLookup::continuation(int64_t count) const {
    std::vector<int32_t> tokens;
    if (match_length() == 0) return tokens;
    tokens.reserve(count);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = match_end_ + i;
        tokens.push_back(at < size() ? text_[at] : tokens[at - size()]);
    }
    return tokens;
}

int32_t SuffixLookup::add_state(int32_t length) {
    states_.push_back({length, 0, 0, -1});
    return static_cast<int32_t>(states_.size()) - 1;
}

void SuffixLookup::add_edge(int32_t from, int32_t token, int32_t to) {
    if (2 * (edges_.size() + 1) > slots_.size()) grow();
    const int32_t index = static_cast<int32_t>(edges_.size());
    edges_.push_back({from, token, to, states_[from].edges});
    states_[from].edges = index;
    slots_[slot_of(from, token)] = index;
}

int32_t* SuffixLookup::find(int32_t from, int32_t token) {
    const int32_t index = slots_[slot_of(from, token)];
    return index < 0 ? nullptr : &edges_[index].to;
}

// The slot that holds this edge, or the empty one where it would go.
size_t SuffixLookup::slot_of(int32_t from, int32_t token) const {
    const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(from)) << 32 | static_cast<uint32_t>(token);
    const size_t mask = slots_.size() - 1;
    size_t slot = (key * 0x9E3779B97F4A7C15 >> 32) & mask;
    while (slots_[slot] >= 0 && (edges_[slots_[slot]].from != from || edges_[slots_[slot]].token != token))
        slot = (slot + 1) & mask;
    return slot;
}

void SuffixLookup::grow() {
    slots_.assign(2 * slots_.size(), -1);
    for (size_t i = 0; i < edges_.size(); i++)
        slots_[slot_of(edges_[i].from, edges_[i].token)] = static_cast<int32_t>(i);
}

}  // namespace gmtp
