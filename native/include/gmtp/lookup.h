// Finds, after every token, the longest suffix of a text that occurred in it before, and where.
//
// A suffix automaton (Blumer et al. 1985) grown token by token in amortised constant time. The suffix link of the state of
// the whole text is its longest suffix that occurs at least twice, so the match is read off, never searched for.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace gmtp {

class SuffixLookup {
public:
    SuffixLookup();

    void extend(std::span<const int32_t> tokens);

    int64_t size() const { return static_cast<int64_t>(text_.size()); }
    // Length of the longest suffix that occurred before; 0: none.
    int32_t match_length() const { return states_[states_[last_].link_or_root()].length; }
    // Where a recent earlier occurrence of that suffix ends: the index after its last token. 0 without a match.
    int32_t match_end() const { return match_end_; }
    struct Continuation {
        std::vector<int32_t> tokens;
        std::vector<int32_t> sureness;  // of each token, given those before it: 0 to kSurenessLevels - 1
    };
    // What followed there: `count` tokens, going on through its own output where the occurrence runs into the end of the
    // text. Empty without a match. A token is the surer the longer the string that it follows, and the more often it has
    // followed that before, if nothing else ever did.
    Continuation continuation(int64_t count) const;

private:
    struct State {
        int32_t length, link, end, edges;  // longest string; suffix link; end of a recent occurrence; first edge
        int32_t followed;                  // how often something followed, as far as counted
        int32_t link_or_root() const { return link < 0 ? 0 : link; }
    };
    struct Edge {
        int32_t from, token, to, next;
    };

    void append(int32_t token);
    int32_t add_state(int32_t length);
    void add_edge(int32_t from, int32_t token, int32_t to);
    int32_t sureness(int32_t state, int32_t length) const;  // of what followed the state's strings of that length
    int32_t* find(int32_t from, int32_t token);  // where an edge leads, null without one
    const int32_t* find(int32_t from, int32_t token) const { return const_cast<SuffixLookup*>(this)->find(from, token); }
    size_t slot_of(int32_t from, int32_t token) const;
    void grow();

    std::vector<int32_t> text_;
    std::vector<State> states_;
    std::vector<Edge> edges_;
    std::vector<int32_t> slots_;  // open addressing: indices into edges_, -1 empty
    int32_t last_ = 0, match_end_ = 0;
};

}  // namespace gmtp
