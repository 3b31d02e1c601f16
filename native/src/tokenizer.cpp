#include "gmtp/tokenizer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <queue>

#include "gmtp/error.h"

namespace gmtp {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, how the vocabulary spells a space
constexpr size_t kMaxTokenBytes = 0xFFFF;
constexpr size_t kMaxStrings = 0x7FFFFFFF;
constexpr size_t kMaxTextBytes = size_t{64} << 20;

uint64_t hash(std::string_view s) {
    constexpr uint64_t k = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
    uint64_t h = s.size() * k;
    auto mix = [&](uint64_t word) {
        h = (h ^ word) * k;
        h ^= h >> 29;
    };
    while (s.size() >= 8) {
        uint64_t word;
        std::memcpy(&word, s.data(), 8);
        mix(word);
        s.remove_prefix(8);
    }
    uint64_t tail = 0;
    if (!s.empty()) std::memcpy(&tail, s.data(), s.size());
    mix(tail);
    mix(h >> 32);
    return h;
}

uint32_t tag_of(uint64_t h) { return static_cast<uint32_t>(h >> 32) | 1; }  // 0 marks an empty slot

// Bytes of the UTF-8 character that starts at text[0]; 1 where there is no valid start.
size_t character_bytes(std::string_view text) {
    const auto first = static_cast<unsigned char>(text[0]);
    const size_t bytes = first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    return std::min(bytes, text.size());
}

bool only_spaces(std::string_view s) { return !s.empty() && s.find_first_not_of(' ') == s.npos; }

std::string with_spaces_respelled(std::string_view text) {
    std::string out;
    out.reserve(text.size() + text.size() / 2);
    for (char c : text) {
        if (c == ' ') out += kSpace;
        else out += c;
    }
    return out;
}

}  // namespace

StringIndex::StringIndex(const StringList& strings, std::span<const uint32_t> numbers)
    : slots_(std::bit_ceil(numbers.size() + numbers.size() / 2 + 1)), mask_(slots_.size() - 1) {
    // Batches: all of a batch's slots are on their way from memory before the first one is needed.
    constexpr size_t kBatch = 16;
    for (size_t start = 0; start < numbers.size(); start += kBatch) {
        const std::span<const uint32_t> batch = numbers.subspan(start, std::min(kBatch, numbers.size() - start));
        uint64_t hashes[kBatch];
        for (size_t i = 0; i < batch.size(); i++) {
            hashes[i] = hash(strings[batch[i]]);
            __builtin_prefetch(&slots_[hashes[i] & mask_], 1);
        }
        for (size_t i = 0; i < batch.size(); i++) insert(strings, batch[i], hashes[i]);
    }
}

void StringIndex::insert(const StringList& strings, uint32_t number, uint64_t h) {
    size_t at = h & mask_;
    while (slots_[at].tag != 0 && (slots_[at].tag != tag_of(h) || strings[slots_[at].number] != strings[number]))
        at = (at + 1) & mask_;
    slots_[at] = {tag_of(h), number};
}

int64_t StringIndex::find(const StringList& strings, std::string_view s) const {
    const uint64_t h = hash(s);
    for (size_t at = h & mask_; slots_[at].tag != 0; at = (at + 1) & mask_)
        if (slots_[at].tag == tag_of(h) && strings[slots_[at].number] == s) return slots_[at].number;
    return -1;
}

BytePairEncoder::BytePairEncoder(StringsView tokens, std::span<const int32_t> kinds, StringsView merges)
    : size_(tokens.size()), tokens_(tokens), merges_(merges), has_merges_(merges.size() > 0) {
    if (tokens.size() > kMaxStrings || merges.size() > kMaxStrings) throw InputError("The tokenizer is too large.");
    if (kinds.size() != tokens.size()) throw InputError("The tokenizer has not as many token types as tokens.");
    std::fill(std::begin(byte_tokens_), std::end(byte_tokens_), -1);
    std::vector<uint32_t> numbers;
    numbers.reserve(tokens.size());
    for (size_t id = 0; id < tokens.size(); id++) {
        const std::string_view token = tokens[id];
        const auto kind = static_cast<TokenKind>(kinds[id]);
        if (only_spaces(token) && kind != TokenKind::Control) {
            // Some files have these as user-defined, yet they have to be found in text whose spaces are respelled.
            add_mergeable(tokens_.push(with_spaces_respelled(token)), numbers);
            respelled_.push_back(static_cast<int32_t>(id));
        } else if (kind == TokenKind::Control || kind == TokenKind::UserDefined) {
            if (!token.empty()) added_.push_back({static_cast<uint32_t>(id), kind == TokenKind::Control});
        } else if (kind == TokenKind::Byte) {
            add_byte_token(token, static_cast<int32_t>(id));
        } else {
            add_mergeable(id, numbers);
        }
    }
    if (std::find(std::begin(byte_tokens_), std::end(byte_tokens_), -1) != std::end(byte_tokens_))
        throw InputError("The tokenizer does not have a token for each of the 256 bytes.");
    std::sort(added_.begin(), added_.end(), [&](Added a, Added b) { return tokens_[a.id] < tokens_[b.id]; });
    token_index_ = StringIndex(tokens_, numbers);
    numbers.resize(merges.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    merge_index_ = StringIndex(merges_, numbers);
}

void BytePairEncoder::add_mergeable(size_t number, std::vector<uint32_t>& numbers) {
    if (tokens_[number].size() > kMaxTokenBytes) throw InputError("The tokenizer has a token of more than 65535 bytes.");
    numbers.push_back(static_cast<uint32_t>(number));
    longest_ = std::max(longest_, tokens_[number].size());
}

// A byte token is spelled "<0x0A>".
void BytePairEncoder::add_byte_token(std::string_view spelling, int32_t id) {
    auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
    const bool framed = spelling.size() == 6 && spelling.starts_with("<0x") && spelling.ends_with('>');
    const int high = framed ? digit(spelling[3]) : -1, low = framed ? digit(spelling[4]) : -1;
    if (high < 0 || low < 0) throw InputError("The tokenizer has a byte token that is not spelled as in '<0x0A>'.");
    byte_tokens_[16 * high + low] = id;
}

// The longest added token that `text` starts with. The sorted list is narrowed byte by byte, like walking down a trie.
BytePairEncoder::Match BytePairEncoder::longest_added(std::string_view text, bool parse_control) const {
    Match best{0, -1};
    auto first = added_.begin(), last = added_.end();
    for (size_t depth = 0; depth < text.size() && first != last; depth++) {
        auto byte = [&](Added a) {
            const std::string_view spelling = tokens_[a.id];
            return depth < spelling.size() ? static_cast<unsigned char>(spelling[depth]) : -1;
        };
        const int wanted = static_cast<unsigned char>(text[depth]);
        first = std::partition_point(first, last, [&](Added a) { return byte(a) < wanted; });
        last = std::partition_point(first, last, [&](Added a) { return byte(a) == wanted; });
        for (auto it = first; it != last && tokens_[it->id].size() == depth + 1; ++it)
            if (parse_control || !it->control) best = {depth + 1, static_cast<int32_t>(it->id)};
    }
    return best;
}

std::vector<int32_t> BytePairEncoder::encode(std::string_view text, bool parse_control) const {
    if (text.size() > kMaxTextBytes) throw InputError("A text of more than 64 MiB cannot be tokenized at once.");
    std::vector<int32_t> out;
    size_t start = 0, at = 0;
    while (at < text.size()) {
        const Match match = longest_added(text.substr(at), parse_control);
        if (match.id < 0) {
            at++;
            continue;
        }
        encode_fragment(text.substr(start, at - start), out);
        out.push_back(match.id);
        at += match.bytes;
        start = at;
    }
    encode_fragment(text.substr(start), out);
    return out;
}

// Text between added tokens on its way from characters to tokens: a linked list of symbols whose neighbours are merged
// best first.
class Fragment {
public:
    Fragment(const BytePairEncoder& encoder, std::string_view text) : encoder_(encoder), text_(text) {
        symbols_.reserve(text.size());
        for (size_t at = 0; at < text.size();) {
            const size_t bytes = character_bytes(text.substr(at));
            const int32_t id = encoder.find_token(text.substr(at, bytes));
            if (id >= 0) push(at, bytes, id, true);
            else for (size_t i = 0; i < bytes; i++)
                push(at + i, 1, encoder.byte_tokens_[static_cast<unsigned char>(text[at + i])], false);
            at += bytes;
        }
    }

    void merge() {
        std::vector<Candidate> all;
        all.reserve(symbols_.size());
        for (uint32_t left = 0; left + 1 < symbols_.size(); left++) {
            if (const Candidate c = candidate(left); c.id >= 0) all.push_back(c);
        }
        std::priority_queue queue(Worse{}, std::move(all));
        auto propose = [&](uint32_t left) {
            if (const Candidate c = candidate(left); c.id >= 0) queue.push(c);
        };
        while (!queue.empty()) {
            const Candidate best = queue.top();
            queue.pop();
            if (!still_holds(best)) continue;
            Symbol& left = symbols_[best.left];
            const Symbol& right = symbols_[left.next];
            left.bytes += right.bytes;
            left.id = best.id;
            symbols_[left.next].bytes = 0;
            left.next = right.next;
            if (left.next < symbols_.size()) {
                symbols_[left.next].previous = best.left;
                propose(best.left);
            }
            if (left.previous != kNone) propose(left.previous);
        }
    }

    void append_to(std::vector<int32_t>& out) const {
        for (size_t i = 0; i < symbols_.size(); i = symbols_[i].next) out.push_back(symbols_[i].id);
    }

private:
    static constexpr uint32_t kNone = UINT32_MAX;
    struct Symbol {
        uint32_t start, bytes;    // bytes 0: merged into the symbol before it
        uint32_t previous, next;  // kNone before the first; the number of symbols after the last
        int32_t id;
        bool merges;              // false for a byte token
    };
    struct Candidate {
        uint64_t rank;            // smaller merges first
        uint32_t left, left_bytes, bytes;
        int32_t id;               // of the token that the merge makes; -1: the two do not merge
    };
    struct Worse {
        bool operator()(const Candidate& a, const Candidate& b) const {
            return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
        }
    };

    void push(size_t start, size_t bytes, int32_t id, bool merges) {
        const auto at = static_cast<uint32_t>(symbols_.size());
        symbols_.push_back({static_cast<uint32_t>(start), static_cast<uint32_t>(bytes), at - 1, at + 1, id, merges});
    }

    // The merge of a symbol with the next one, which must exist.
    Candidate candidate(uint32_t at) const {
        const Symbol& left = symbols_[at];
        const Symbol& right = symbols_[left.next];
        Candidate c{0, at, left.bytes, left.bytes + right.bytes, -1};
        if (!left.merges || !right.merges || c.bytes > encoder_.longest_) return c;
        const std::string_view joined = text_.substr(left.start, c.bytes);
        const int32_t id = encoder_.find_token(joined);
        if (id < 0) return c;
        const int64_t rank = encoder_.merge_rank(joined, left.bytes, id);
        if (rank < 0) return c;
        c.rank = static_cast<uint64_t>(rank);
        c.id = id;
        return c;
    }

    // Whether the two sides still are neighbours, or two others that join to the same text and merge as well.
    bool still_holds(const Candidate& c) const {
        const Symbol& left = symbols_[c.left];
        if (left.bytes == 0 || left.next >= symbols_.size() || left.bytes + symbols_[left.next].bytes != c.bytes) return false;
        return left.bytes == c.left_bytes || candidate(c.left).id >= 0;
    }

    const BytePairEncoder& encoder_;
    std::string_view text_;
    std::vector<Symbol> symbols_;
};

int32_t BytePairEncoder::find_token(std::string_view spelling) const {
    const int64_t number = token_index_.find(tokens_, spelling);
    const auto vocabulary = static_cast<int64_t>(size_);
    return number < vocabulary ? static_cast<int32_t>(number) : respelled_[static_cast<size_t>(number - vocabulary)];
}

// How early the merge of joined[0, left_bytes) with the rest comes; -1 if the two do not merge.
int64_t BytePairEncoder::merge_rank(std::string_view joined, size_t left_bytes, int32_t id) const {
    if (!has_merges_) return (int64_t{id} << 16) + static_cast<int64_t>(kMaxTokenBytes - left_bytes);
    std::string spelling;
    spelling.reserve(joined.size() + 1);
    spelling.append(joined, 0, left_bytes).append(1, ' ').append(joined, left_bytes);
    return merge_index_.find(merges_, spelling);
}

void BytePairEncoder::encode_fragment(std::string_view text, std::vector<int32_t>& out) const {
    if (text.empty()) return;
    const std::string respelled = with_spaces_respelled(text);
    Fragment fragment(*this, respelled);
    fragment.merge();
    fragment.append_to(out);
}

}  // namespace gmtp
