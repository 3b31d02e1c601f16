// Keys and values of many sequences, in pages of kPagePositions positions.
//
// The layers that keep a cache fall into groups by how far back they look (a window, or everything). A page belongs to
// one group and holds kPagePositions positions of all its layers. A sequence owns a table of pages per group; pages that
// have slid out of the window, plus the slack that a rollback may need, go back to the free list.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "gmtp/layers.h"

namespace gmtp {

struct KvLayer {
    int64_t kv_heads;
    int64_t head_dim;
    int64_t window;  // positions a query sees, itself included; 0: all before it
};

class KvCache {
public:
    // `rollback`: the number of newest positions that truncate() can always take back.
    // `memory_limit`: bytes of pages that may exist at once; 0: no limit.
    KvCache(KvType type, std::vector<KvLayer> layers, int64_t context, int64_t rollback, int64_t memory_limit);
    ~KvCache();
    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    int create();                 // a new, empty sequence; its handle
    void release(int sequence);   // frees its pages
    int64_t length(int sequence) const { return at(sequence).length; }

    // Makes room for `count` more positions; nothing changes if it throws (context or memory limit).
    void reserve(int sequence, int64_t count);
    // Counts `count` reserved positions as filled.
    void advance(int sequence, int64_t count);
    // Forgets all positions from `length` on. Throws if the window before `length` is no longer held.
    void truncate(int sequence, int64_t length);
    // The smallest length that truncate() can go back to, 0 included always.
    int64_t floor(int sequence) const;

    const KvLayer& layer(int index) const { return layers_.at(index); }
    KvType type() const { return type_; }
    int64_t context() const { return context_; }
    int64_t bytes_in_use() const;
    int64_t bytes_allocated() const { return allocated_; }

    // Where a layer keeps the keys and values of one KV head in the page that holds `position`.
    // Null if that page is not held.
    void* keys(int sequence, int layer, int64_t kv_head, int64_t position) const;
    void* values(int sequence, int layer, int64_t kv_head, int64_t position) const;
    // What positions [begin, end) of a sequence hold, as [position][kv_head][element] each. Throws InputError for positions
    // that are not filled or not held any more.
    void read(int sequence, int layer, int64_t begin, int64_t end, float* keys, float* values) const;

private:
    struct Group {
        int64_t window;
        size_t page_bytes = 0;
        std::vector<void*> free;
        int64_t held = 0;
    };
    struct Sequence {
        bool used = false;
        int64_t length = 0;
        std::vector<std::vector<void*>> pages;  // [group][position / kPagePositions], null once dropped
        std::vector<int64_t> first;             // [group]: first page still held
    };

    const Sequence& at(int sequence) const;
    Sequence& at(int sequence);
    void* take(Group& group);
    void drop_before(Sequence& s, size_t group, int64_t page);
    char* place(int sequence, int layer, int64_t position) const;

    KvType type_;
    std::vector<KvLayer> layers_;
    std::vector<int> group_of_;        // [layer]
    std::vector<size_t> offset_;       // [layer]: bytes from the start of a page
    std::vector<Group> groups_;
    std::vector<Sequence> sequences_;
    int64_t context_, rollback_, limit_, allocated_ = 0;
};

}  // namespace gmtp
