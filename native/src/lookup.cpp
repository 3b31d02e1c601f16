#include "gmtp/lookup.h"

#include <algorithm>
#include <bit>

#include "gmtp/drafter.h"

namespace gmtp {
namespace {
// How many shorter suffixes learn of each new occurrence. The rest keep an older one, which is as true, only less recent.
constexpr int kRefreshed = 16;

// Sureness of a token that followed a string of 1, 2..3, 4..7, 8..15, 16 and more tokens: where other tokens followed it as
// well, where it was followed once, and where it was followed by this token each of several times. What levels are worth is
// learnt (decoding/acceptance.py); here are set apart what had different acceptance (decision 11).
constexpr int kLengths = 5;
constexpr int32_t kSureness[3][kLengths] = {{0, 0, 1, 1, 1}, {0, 2, 3, 4, 5}, {4, 5, 6, 7, 7}};
static_assert(kSurenessLevels == 8);
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
    int32_t suffix = last_;
    for (int i = 0; i <= kRefreshed && suffix > 0; i++, suffix = states_[suffix].link) states_[suffix].followed++;
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
            states_[split].followed = states_[q].followed;
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

SuffixLookup::Continuation SuffixLookup::continuation(int64_t count) const {
    Continuation found;
    int32_t state = states_[last_].link_or_root(), length = match_length();
    if (length == 0) return found;
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = match_end_ + i;
        const int32_t token = at < size() ? text_[at] : found.tokens[at - size()];
        const int32_t* next = find(state, token);
        while (!next && state > 0) {  // the occurrence ran into the end of the text
            state = states_[state].link, length = states_[state].length;
            next = find(state, token);
        }
        found.tokens.push_back(token);
        found.sureness.push_back(sureness(state, length));
        if (next) state = *next, length++;
    }
    return found;
}

int32_t SuffixLookup::sureness(int32_t state, int32_t length) const {
    if (length == 0) return 0;
    const State& s = states_[state];
    const bool others = s.edges >= 0 && edges_[s.edges].next >= 0;
    return kSureness[others ? 0 : s.followed > 1 ? 2 : 1][std::min<int>(std::bit_width(static_cast<uint32_t>(length)), kLengths) - 1];
}

int32_t SuffixLookup::add_state(int32_t length) {
    states_.push_back({length, 0, 0, -1, 0});
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
