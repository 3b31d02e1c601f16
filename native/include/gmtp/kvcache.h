// Keys and values of many sequences, in pages of kPagePositions positions.
//
// The layers that keep a cache fall into groups by how far back they look (a window, or everything). A page belongs to
// one group and holds kPagePositions positions of all its layers. A sequence has a table of pages per group; it lets go of
// pages that have slid out of the window, plus the slack that a rollback may need.
//
// A full page can be given a name, which stands for all tokens up to its end. Sequences share named pages, and nobody
// writes to them again. Where there is a memory limit, a named page that no sequence holds keeps its content until its
// memory is needed; the one let go of first goes first (docs/decisions/0008-prefix-cache.md).
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gmtp/layers.h"

namespace gmtp {

struct KvLayer {
    int64_t kv_heads;  // 0: it keeps nothing, and reads what another layer keeps
    int64_t head_dim;
    int64_t window;  // positions a query sees, itself included; 0: all before it
};

class KvCache {
public:
    // `rollback`: the number of newest positions that truncate() can always take back.
    // `memory_limit`: see set_limit.
    KvCache(KvType type, std::vector<KvLayer> layers, int64_t context, int64_t rollback, int64_t memory_limit);
    ~KvCache();
    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    int create();                 // a new, empty sequence; its handle
    void release(int sequence);   // lets go of its pages
    int64_t length(int sequence) const { return at(sequence).length; }

    // Makes room for `count` more positions; none is made if it throws (context or memory limit).
    void reserve(int sequence, int64_t count);
    // Counts `count` reserved positions as filled.
    void advance(int sequence, int64_t count);
    // Forgets all positions from `length` on. Throws if the window before `length` is no longer held.
    void truncate(int sequence, int64_t length);
    // The smallest length that truncate() can go back to, 0 included always.
    int64_t floor(int sequence) const;

    // Names the pages that hold the sequence's positions from page `first` on; each must be full.
    void name(int sequence, int64_t first, std::span<const std::string> names);
    // Gives an empty sequence as many of the pages named so as it can go on from; returns its length then.
    int64_t adopt(int sequence, std::span<const std::string> names);

    // Bytes of pages that may exist at once; 0: no limit, and named pages that nobody holds are freed.
    void set_limit(int64_t bytes);
    // Whether there is memory to fill all of these further (sequence, count), at most `rows` of each at a time.
    bool fits(std::span<const std::pair<int, int64_t>> wanted, int64_t rows);
    // The most bytes that a sequence of `length` positions holds, filled at most `rows` positions at a time.
    int64_t bytes_for(int64_t length, int64_t rows) const;

    const KvLayer& layer(int index) const { return layers_.at(index); }
    KvType type() const { return type_; }
    int64_t context() const { return context_; }
    int64_t bytes_in_use() const;  // of pages that sequences hold
    int64_t bytes_allocated() const { return allocated_; }
    int64_t limit() const { return limit_; }

    // Where a layer keeps the keys and values of one KV head in the page that holds `position`.
    // Null if that page is not held.
    void* keys(int sequence, int layer, int64_t kv_head, int64_t position) const;
    void* values(int sequence, int layer, int64_t kv_head, int64_t position) const;
    // What positions [begin, end) of a sequence hold, as [position][kv_head][element] each. Throws InputError for positions
    // that are not filled or not held any more.
    void read(int sequence, int layer, int64_t begin, int64_t end, float* keys, float* values) const;

private:
    struct Page {
        void* data;
        size_t group;
        int holders = 0;                     // sequences
        std::string name;                    // empty: none
        std::list<Page*>::iterator unheld;   // its place in unheld_, if it has a name and no holder
    };
    struct Group {
        int64_t window;
        size_t page_bytes = 0;
        std::vector<Page*> free;  // without a name or a holder
        int64_t held = 0;
        std::unordered_map<std::string, Page*> named;
    };
    struct Sequence {
        bool used = false;
        int64_t length = 0;
        std::vector<std::vector<Page*>> pages;  // [group][position / kPagePositions], null once dropped
        std::vector<int64_t> first;             // [group]: first page still held
    };

    const Sequence& at(int sequence) const;
    Sequence& at(int sequence);
    Page* take(size_t group);
    void hold(Page& page);
    void let_go(Page& page);
    void destroy(Page* page);
    bool free_one();  // destroys a page that nobody holds, if there is one
    void slide(Sequence& s);
    void give_back(Sequence& s, int64_t length);  // the pages past it
    int64_t most_pages(const Group& group, int64_t length, int64_t rows) const;
    char* place(int sequence, int layer, int64_t position) const;

    KvType type_;
    std::vector<KvLayer> layers_;
    std::vector<int> group_of_;        // [layer], -1 for one that keeps nothing
    std::vector<size_t> offset_;       // [layer]: bytes from the start of a page
    std::vector<Group> groups_;
    std::list<Page*> unheld_;  // named pages, the one let go of first at the front
    std::vector<Sequence> sequences_;
    int64_t context_, rollback_, limit_, allocated_ = 0;
};

}  // namespace gmtp
