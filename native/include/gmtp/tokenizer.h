// Byte-pair encoding with a SentencePiece-style vocabulary, as Gemma's tokenizers do it: spaces are spelled U+2581, there
// is no split into words, a character without a token of its own becomes byte tokens, and merges are done best first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gmtp/strings.h"

namespace gmtp {

// Strings that lie elsewhere, and more that this list holds itself: those are numbered on.
class StringList {
public:
    explicit StringList(StringsView mapped = {}) : mapped_(mapped) {}
    size_t push(std::string s) {
        more_.push_back(std::move(s));
        return mapped_.size() + more_.size() - 1;
    }
    std::string_view operator[](size_t i) const {
        return i < mapped_.size() ? mapped_[i] : std::string_view(more_[i - mapped_.size()]);
    }

private:
    StringsView mapped_;
    std::vector<std::string> more_;
};

// Finds the number of a string in a list: an open-addressing hash table of numbers, the strings stay in the list.
class StringIndex {
public:
    StringIndex() = default;
    // Of the strings with these numbers; of equal strings the last one is found.
    StringIndex(const StringList& strings, std::span<const uint32_t> numbers);
    int64_t find(const StringList& strings, std::string_view s) const;  // -1: not there

private:
    struct Slot { uint32_t tag, number; };
    void insert(const StringList& strings, uint32_t number, uint64_t hash);

    std::vector<Slot> slots_ = std::vector<Slot>(1);
    size_t mask_ = 0;
};

// A token's kind, numbered as in GGUF's tokenizer.ggml.token_type.
enum class TokenKind : int32_t { Normal = 1, Unknown = 2, Control = 3, UserDefined = 4, Unused = 5, Byte = 6 };

class BytePairEncoder {
public:
    // `merges` holds "left right" texts, best first. Without it (no strings) every pair of tokens that joined are a token
    // merges too, the token with the smallest id first, and of its splits the one with the longer left half.
    // Both must outlive the encoder. Throws InputError.
    BytePairEncoder(StringsView tokens, std::span<const int32_t> kinds, StringsView merges);

    // Control tokens in the text are found only with `parse_control`, user-defined ones always. Text that is not UTF-8
    // becomes byte tokens.
    std::vector<int32_t> encode(std::string_view text, bool parse_control) const;

    size_t size() const { return size_; }
    std::string_view token(size_t id) const { return tokens_[id]; }  // as the file spells it

private:
    friend class Fragment;
    struct Added { uint32_t id; bool control; };
    struct Match { size_t bytes; int32_t id; };

    int32_t find_token(std::string_view spelling) const;  // -1: none that merges can make
    int64_t merge_rank(std::string_view joined, size_t left_bytes, int32_t id) const;
    void add_mergeable(size_t number, std::vector<uint32_t>& numbers);
    void add_byte_token(std::string_view spelling, int32_t id);
    Match longest_added(std::string_view text, bool parse_control) const;
    void encode_fragment(std::string_view text, std::vector<int32_t>& out) const;

    size_t size_;
    StringList tokens_;                  // the vocabulary, then tokens of spaces only as the encoder spells them
    std::vector<int32_t> respelled_;     // the ids of the latter
    StringList merges_;
    bool has_merges_;
    StringIndex token_index_, merge_index_;
    std::vector<Added> added_;           // sorted by spelling
    int32_t byte_tokens_[256];
    size_t longest_ = 0;                 // bytes of the longest token that merges can make
};

}  // namespace gmtp
