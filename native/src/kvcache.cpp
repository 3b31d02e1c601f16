#include "gmtp/kvcache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "formats.h"
#include "gmtp/error.h"

namespace gmtp {
namespace {

// Bytes that the keys or the values of one head take in a page.
size_t head_bytes(KvType type, int64_t dim) {
    const auto elements = static_cast<size_t>(dim * kPagePositions);
    if (type == KvType::Q8_0) return elements + elements / kKvBlock * sizeof(uint16_t);
    return elements * (type == KvType::F16 ? sizeof(uint16_t) : sizeof(float));
}

// Element d of a position in a page [dim x kPagePositions] that has it at `i`.
float element(KvType type, const void* page, int64_t dim, int64_t i, int64_t d, int64_t position) {
    if (type == KvType::F32) return static_cast<const float*>(page)[i];
    if (type == KvType::F16) return half_to_float(static_cast<const uint16_t*>(page)[i]);
    const auto* codes = static_cast<const int8_t*>(page);
    const auto* scales = reinterpret_cast<const uint16_t*>(codes + dim * kPagePositions);
    return half_to_float(scales[d / kKvBlock * kPagePositions + position]) * static_cast<float>(codes[i]);
}

}  // namespace

KvCache::KvCache(KvType type, std::vector<KvLayer> layers, int64_t context, int64_t rollback, int64_t memory_limit)
    : type_(type), layers_(std::move(layers)), context_(context), rollback_(rollback), limit_(memory_limit) {
    for (const KvLayer& layer : layers_) {
        if (layer.kv_heads < 0 || layer.head_dim < kKvBlock || layer.head_dim % kKvBlock || layer.window < 0)
            throw InputError("a cached layer needs a head size that is a multiple of 32");
        if (!layer.kv_heads) {
            group_of_.push_back(-1), offset_.push_back(0);
            continue;
        }
        auto found = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.window == layer.window; });
        if (found == groups_.end()) found = groups_.insert(groups_.end(), Group{.window = layer.window, .free = {}, .named = {}});
        group_of_.push_back(static_cast<int>(found - groups_.begin()));
        offset_.push_back(found->page_bytes);
        found->page_bytes += 2 * static_cast<size_t>(layer.kv_heads) * head_bytes(type_, layer.head_dim);
    }
    if (groups_.empty()) throw InputError("a cache needs a layer that keeps keys and values");
}

KvCache::~KvCache() {
    for (size_t i = 0; i < sequences_.size(); i++)
        if (sequences_[i].used) release(static_cast<int>(i));
    while (free_one()) {}
}

const KvCache::Sequence& KvCache::at(int sequence) const {
    if (sequence < 0 || sequence >= static_cast<int>(sequences_.size()) || !sequences_[sequence].used)
        throw InputError("no such sequence in the cache");
    return sequences_[sequence];
}

KvCache::Sequence& KvCache::at(int sequence) { return const_cast<Sequence&>(std::as_const(*this).at(sequence)); }

int KvCache::create() {
    auto unused = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.used; });
    if (unused == sequences_.end()) unused = sequences_.emplace(sequences_.end());
    unused->used = true;
    unused->length = 0;
    unused->pages.assign(groups_.size(), {});
    unused->first.assign(groups_.size(), 0);
    return static_cast<int>(unused - sequences_.begin());
}

void KvCache::release(int sequence) {
    Sequence& s = at(sequence);
    for (auto& table : s.pages)  // from the end: a beginning can be of use without what follows it, so it is kept longer
        for (; !table.empty(); table.pop_back())
            if (table.back()) let_go(*table.back());
    s.used = false;
}

void KvCache::destroy(Page* page) {
    Group& group = groups_[page->group];
    if (!page->name.empty()) {
        group.named.erase(page->name);
        unheld_.erase(page->unheld);
    }
    allocated_ -= static_cast<int64_t>(group.page_bytes);
    std::free(page->data);
    delete page;
}

bool KvCache::free_one() {
    for (Group& group : groups_)
        if (!group.free.empty()) {
            destroy(group.free.back());
            group.free.pop_back();
            return true;
        }
    if (unheld_.empty()) return false;
    destroy(unheld_.front());
    return true;
}

KvCache::Page* KvCache::take(size_t index) {
    Group& group = groups_[index];
    Page* page;
    if (!group.free.empty()) {
        page = group.free.back();
        group.free.pop_back();
    } else {
        const auto bytes = static_cast<int64_t>(group.page_bytes);
        while (limit_ && allocated_ + bytes > limit_)
            if (!free_one()) throw InputError("the KV cache is full");
        auto made = std::make_unique<Page>(Page{.data = std::aligned_alloc(64, group.page_bytes), .group = index, .name = {}, .unheld = {}});
        if (!made->data) throw std::bad_alloc();
        std::memset(made->data, 0, group.page_bytes);  // positions not yet written are multiplied by weights of 0
        allocated_ += bytes;
        page = made.release();
    }
    hold(*page);
    return page;
}

void KvCache::hold(Page& page) {
    if (page.holders++) return;
    groups_[page.group].held++;
    if (!page.name.empty()) unheld_.erase(page.unheld);
}

void KvCache::let_go(Page& page) {
    if (--page.holders) return;
    Group& group = groups_[page.group];
    group.held--;
    if (!page.name.empty() && limit_) {
        page.unheld = unheld_.insert(unheld_.end(), &page);
        return;
    }
    if (!page.name.empty()) group.named.erase(page.name);
    page.name.clear();
    group.free.push_back(&page);
}

void KvCache::slide(Sequence& s) {
    for (size_t g = 0; g < groups_.size(); g++) {
        const int64_t oldest = s.length - rollback_ - groups_[g].window + 1;  // still seen after the longest rollback
        if (!groups_[g].window || oldest <= 0) continue;
        auto& table = s.pages[g];
        const auto end = std::min<int64_t>(oldest / kPagePositions, table.size());
        for (int64_t& first = s.first[g]; first < end; first++) let_go(*std::exchange(table[first], nullptr));
    }
}

void KvCache::reserve(int sequence, int64_t count) {
    Sequence& s = at(sequence);
    const int64_t end = s.length + count;
    if (end > context_) throw InputError("the context of " + std::to_string(context_) + " tokens is full");
    slide(s);
    try {
        for (size_t g = 0; g < groups_.size(); g++)
            while (static_cast<int64_t>(s.pages[g].size()) * kPagePositions < end) s.pages[g].push_back(take(g));
    } catch (...) {
        give_back(s, s.length);
        throw;
    }
}

void KvCache::give_back(Sequence& s, int64_t length) {
    const auto keep = static_cast<size_t>((length + kPagePositions - 1) / kPagePositions);
    for (auto& table : s.pages)
        for (; table.size() > keep; table.pop_back())
            if (table.back()) let_go(*table.back());
}

int64_t KvCache::most_pages(const Group& group, int64_t length, int64_t rows) const {
    // Of the window, the slack and a pass, the pages at both ends may be there for a part only.
    const int64_t positions = group.window ? std::min(length, group.window + rollback_ + rows + 2 * kPagePositions) : length;
    return (positions + kPagePositions - 1) / kPagePositions;
}

bool KvCache::fits(std::span<const std::pair<int, int64_t>> wanted, int64_t rows) {
    int64_t total = bytes_in_use();
    for (const auto& [sequence, count] : wanted) {
        Sequence& s = at(sequence);
        const int64_t before = bytes_in_use();
        slide(s);
        total -= before - bytes_in_use();
        for (size_t g = 0; g < groups_.size(); g++) {
            const int64_t pages = static_cast<int64_t>(s.pages[g].size()), length = s.length + count;
            const int64_t more = std::min((length + kPagePositions - 1) / kPagePositions - pages,
                                          most_pages(groups_[g], length, rows) - (pages - s.first[g]));
            total += std::max<int64_t>(more, 0) * static_cast<int64_t>(groups_[g].page_bytes);
        }
    }
    return !limit_ || total <= limit_;
}

int64_t KvCache::bytes_for(int64_t length, int64_t rows) const {
    int64_t total = 0;
    for (const Group& g : groups_) total += most_pages(g, length, rows) * static_cast<int64_t>(g.page_bytes);
    return total;
}

void KvCache::set_limit(int64_t bytes) {
    if (bytes < 0) throw InputError("a memory limit is not negative");
    limit_ = bytes;
    while ((limit_ ? allocated_ > limit_ : !unheld_.empty()) && free_one()) {}
}

void KvCache::name(int sequence, int64_t first, std::span<const std::string> names) {
    Sequence& s = at(sequence);
    if (first < 0 || (first + static_cast<int64_t>(names.size())) * kPagePositions > s.length)
        throw InputError("only full pages can be named");
    for (size_t g = 0; g < groups_.size(); g++)
        for (size_t i = 0; i < names.size(); i++) {
            Page* page = s.pages[g][first + i];
            if (!page || !page->name.empty()) continue;
            // If another page has the name, with the same content, this one stays its sequence's own.
            if (groups_[g].named.try_emplace(names[i], page).second) page->name = names[i];
        }
}

int64_t KvCache::adopt(int sequence, std::span<const std::string> names) {
    Sequence& s = at(sequence);
    if (s.length) throw InputError("only an empty sequence can start with cached pages");
    const auto most = std::min<int64_t>(names.size(), context_ / kPagePositions);
    auto first_page = [&](const Group& g, int64_t count) {  // that the position after `count` pages sees
        return g.window ? std::max<int64_t>(count * kPagePositions - g.window + 1, 0) / kPagePositions : 0;
    };
    std::vector<int64_t> run(groups_.size(), 0);  // [group]: cached pages in a row up to here
    int64_t count = 0;
    for (int64_t i = 0; i < most; i++) {
        bool enough = true;
        for (size_t g = 0; g < groups_.size(); g++) {
            run[g] = groups_[g].named.contains(names[i]) ? run[g] + 1 : 0;
            enough = enough && run[g] >= i + 1 - first_page(groups_[g], i + 1);
        }
        if (enough) count = i + 1;
    }
    for (size_t g = 0; g < groups_.size() && count; g++) {
        for (Page* page : s.pages[g])
            if (page) let_go(*page);
        s.first[g] = first_page(groups_[g], count);
        s.pages[g].assign(count, nullptr);
        for (int64_t i = s.first[g]; i < count; i++) hold(*(s.pages[g][i] = groups_[g].named.at(names[i])));
    }
    return s.length = count * kPagePositions;
}

void KvCache::advance(int sequence, int64_t count) { at(sequence).length += count; }

int64_t KvCache::floor(int sequence) const {
    const Sequence& s = at(sequence);
    int64_t lowest = 0;
    for (size_t g = 0; g < groups_.size(); g++)
        if (s.first[g]) lowest = std::max(lowest, s.first[g] * kPagePositions + groups_[g].window - 1);
    return lowest;
}

void KvCache::truncate(int sequence, int64_t length) {
    Sequence& s = at(sequence);
    if (length < 0 || length > s.length) throw InputError("a sequence can only be cut to at most its own length");
    if (length && length < floor(sequence)) throw InputError("the sliding window before that position is no longer held");
    if (length % kPagePositions)
        for (const auto& table : s.pages)
            if (const Page* page = table[length / kPagePositions]; page && !page->name.empty())
                throw InputError("a named page cannot be cut");
    s.length = length;
    give_back(s, length);
    if (!length) s.first.assign(groups_.size(), 0);
}

int64_t KvCache::bytes_in_use() const {
    int64_t total = 0;
    for (const Group& g : groups_) total += g.held * static_cast<int64_t>(g.page_bytes);
    return total;
}

char* KvCache::place(int sequence, int layer, int64_t position) const {
    const Page* page = sequences_[sequence].pages[group_of_[layer]][position / kPagePositions];
    return page ? static_cast<char*>(page->data) + offset_[layer] : nullptr;
}

void* KvCache::keys(int sequence, int layer, int64_t kv_head, int64_t position) const {
    char* p = place(sequence, layer, position);
    return p ? p + static_cast<size_t>(kv_head) * head_bytes(type_, layers_[layer].head_dim) : nullptr;
}

void* KvCache::values(int sequence, int layer, int64_t kv_head, int64_t position) const {
    const KvLayer& l = layers_[layer];
    char* p = place(sequence, layer, position);
    return p ? p + static_cast<size_t>(l.kv_heads + kv_head) * head_bytes(type_, l.head_dim) : nullptr;
}

void KvCache::read(int sequence, int layer, int64_t begin, int64_t end, float* keys_out, float* values_out) const {
    const Sequence& s = at(sequence);
    if (!layers_.at(layer).kv_heads) throw InputError("that layer keeps no keys and values");
    if (begin < s.first[group_of_[layer]] * kPagePositions || begin > end || end > s.length)
        throw InputError("the cache does not hold these positions");
    const int64_t dim = layers_[layer].head_dim;
    for (int64_t p = begin; p < end; p++)
        for (int64_t h = 0; h < layers_[layer].kv_heads; h++) {
            const void *key = keys(sequence, layer, h, p), *value = values(sequence, layer, h, p);
            const int64_t place = p % kPagePositions;
            for (int64_t d = 0; d < dim; d++) {  // keys lie 16 positions to an element, see put_key
                *keys_out++ = element(type_, key, dim, (place / 16 * dim + d) * 16 + place % 16, d, place);
                *values_out++ = element(type_, value, dim, place * dim + d, d, place);
            }
        }
}

}  // namespace gmtp
