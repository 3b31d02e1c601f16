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

size_t element_bytes(KvType type) { return type == KvType::F16 ? 2 : 4; }

float element(KvType type, const void* elements, int64_t i) {
    if (type == KvType::F32) return static_cast<const float*>(elements)[i];
    return half_to_float(static_cast<const uint16_t*>(elements)[i]);
}

}  // namespace

KvCache::KvCache(KvType type, std::vector<KvLayer> layers, int64_t context, int64_t rollback, int64_t memory_limit)
    : type_(type), layers_(std::move(layers)), context_(context), rollback_(rollback), limit_(memory_limit) {
    for (const KvLayer& layer : layers_) {
        if (layer.kv_heads < 1 || layer.head_dim < 16 || layer.head_dim % 16 || layer.window < 0)
            throw InputError("a cached layer needs at least one KV head and a head size that is a multiple of 16");
        auto found = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.window == layer.window; });
        if (found == groups_.end()) found = groups_.insert(groups_.end(), Group{.window = layer.window, .free = {}});
        group_of_.push_back(static_cast<int>(found - groups_.begin()));
        offset_.push_back(found->page_bytes);
        found->page_bytes += 2 * static_cast<size_t>(layer.kv_heads * layer.head_dim * kPagePositions) * element_bytes(type_);
    }
}

KvCache::~KvCache() {
    for (Sequence& s : sequences_)
        for (auto& table : s.pages)
            for (void* page : table) std::free(page);
    for (Group& g : groups_)
        for (void* page : g.free) std::free(page);
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
    for (size_t g = 0; g < groups_.size(); g++) drop_before(s, g, static_cast<int64_t>(s.pages[g].size()));
    s.used = false;
}

void* KvCache::take(Group& group) {
    void* page;
    if (!group.free.empty()) {
        page = group.free.back();
        group.free.pop_back();
    } else {
        if (limit_ && allocated_ + static_cast<int64_t>(group.page_bytes) > limit_) throw InputError("the KV cache is full");
        page = std::aligned_alloc(64, group.page_bytes);
        if (!page) throw std::bad_alloc();
        std::memset(page, 0, group.page_bytes);  // positions not yet written are multiplied by weights of 0
        allocated_ += static_cast<int64_t>(group.page_bytes);
    }
    group.held++;
    return page;
}

void KvCache::drop_before(Sequence& s, size_t group, int64_t page) {
    for (int64_t& first = s.first[group]; first < page; first++) {
        groups_[group].free.push_back(s.pages[group][first]);
        groups_[group].held--;
        s.pages[group][first] = nullptr;
    }
}

void KvCache::reserve(int sequence, int64_t count) {
    Sequence& s = at(sequence);
    const int64_t end = s.length + count;
    if (end > context_) throw InputError("the context of " + std::to_string(context_) + " tokens is full");
    for (size_t g = 0; g < groups_.size(); g++) {
        if (groups_[g].window) {
            int64_t oldest = s.length - rollback_ - groups_[g].window + 1;  // still seen after the longest rollback
            if (oldest > 0) drop_before(s, g, std::min<int64_t>(oldest / kPagePositions, s.pages[g].size()));
        }
        auto& table = s.pages[g];
        while (static_cast<int64_t>(table.size()) * kPagePositions < end) table.push_back(take(groups_[g]));
    }
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
    s.length = length;
    for (size_t g = 0; g < groups_.size(); g++) {
        auto& table = s.pages[g];
        const auto keep = static_cast<size_t>((length + kPagePositions - 1) / kPagePositions);
        while (table.size() > keep) {
            if (table.back()) groups_[g].free.push_back(table.back()), groups_[g].held--;
            table.pop_back();
        }
        s.first[g] = length ? s.first[g] : 0;
    }
}

int64_t KvCache::bytes_in_use() const {
    int64_t total = 0;
    for (const Group& g : groups_) total += g.held * static_cast<int64_t>(g.page_bytes);
    return total;
}

char* KvCache::place(int sequence, int layer, int64_t position) const {
    void* page = sequences_[sequence].pages[group_of_[layer]][position / kPagePositions];
    return page ? static_cast<char*>(page) + offset_[layer] : nullptr;
}

void* KvCache::keys(int sequence, int layer, int64_t kv_head, int64_t position) const {
    char* p = place(sequence, layer, position);
    return p ? p + static_cast<size_t>(kv_head * layers_[layer].head_dim * kPagePositions) * element_bytes(type_) : nullptr;
}

void* KvCache::values(int sequence, int layer, int64_t kv_head, int64_t position) const {
    const KvLayer& l = layers_[layer];
    char* p = place(sequence, layer, position);
    return p ? p + static_cast<size_t>((l.kv_heads + kv_head) * l.head_dim * kPagePositions) * element_bytes(type_) : nullptr;
}

void KvCache::read(int sequence, int layer, int64_t begin, int64_t end, float* keys_out, float* values_out) const {
    const Sequence& s = at(sequence);
    if (begin < s.first[group_of_[layer]] * kPagePositions || begin > end || end > s.length)
        throw InputError("the cache does not hold these positions");
    const int64_t dim = layers_[layer].head_dim;
    for (int64_t p = begin; p < end; p++)
        for (int64_t h = 0; h < layers_[layer].kv_heads; h++) {
            const void *key = keys(sequence, layer, h, p), *value = values(sequence, layer, h, p);
            const int64_t place = p % kPagePositions;
            for (int64_t d = 0; d < dim; d++) {  // keys lie 16 positions to an element, see put_key
                *keys_out++ = element(type_, key, (place / 16 * dim + d) * 16 + place % 16);
                *values_out++ = element(type_, value, place * dim + d);
            }
        }
}

}  // namespace gmtp
