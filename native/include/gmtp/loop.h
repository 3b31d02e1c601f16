// Loops whose steps the threads of a job share.
//
// Each thread walks a section of its own, from the front; one that is done takes the back half of what another has left. So
// a walk over memory is hardly ever broken off, with what was fetched ahead of it gone to waste, and threads that are held up
// leave their work to others.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gmtp {

// One loop over [0, count), in chunks: at most 2^32 of them.
class Loop {
public:
    // Calls body(begin, end) for stretches that are this thread's; each begins at a multiple of `chunk`.
    template <class F> void run(int thread, int64_t count, int64_t chunk, F&& body) const {
        const int64_t chunks = (count + chunk - 1) / chunk;
        auto call = [&](int64_t begin, int64_t end) { body(begin * chunk, std::min(end * chunk, count)); };
        const Section own = section(chunks, thread);
        for (int64_t at; (at = take(thread, own, false).begin) < own.end;) call(at, at + 1);
        for (int i = 1; i < threads_; i++) {
            const int other = (thread + i) % threads_;
            const Section others = section(chunks, other);
            for (Section s; (s = take(other, others, true)).begin < s.end;) call(s.begin, s.end);
        }
    }

    // The same, chunk by chunk.
    template <class F> void run_chunks(int thread, int64_t count, int64_t chunk, F&& body) const {
        run(thread, count, chunk, [&](int64_t begin, int64_t end) {
            for (; begin < end; begin += chunk) body(begin, std::min(begin + chunk, end));
        });
    }

    // Whether the thread whose chunk `i` is goes on with chunk i + 1, as far as one can say: others take the end of a section.
    bool goes_on(int64_t chunks, int64_t i) const {
        return i + 2 < chunks && ((i + 1) * threads_ - 1) / chunks == ((i + 3) * threads_ - 1) / chunks;
    }

private:
    friend class Loops;
    struct Section { int64_t begin, end; };  // chunks

    Loop(std::atomic<uint64_t>* taken, size_t stride, int threads) : taken_(taken), stride_(stride), threads_(threads) {}

    Section section(int64_t chunks, int thread) const { return {chunks * thread / threads_, chunks * (thread + 1) / threads_}; }

    // The next chunk from the front of a section, or the back half of what is left; nothing, at its end, if nothing is.
    Section take(int thread, Section all, bool back) const {
        std::atomic<uint64_t>& taken = taken_[thread * stride_];
        for (uint64_t now = taken.load(std::memory_order_relaxed);;) {
            const int64_t begin = all.begin + static_cast<int64_t>(now & 0xFFFFFFFF), end = all.end - static_cast<int64_t>(now >> 32);
            if (begin >= end) return {all.end, all.end};
            const int64_t count = back ? (end - begin + 1) / 2 : 1;
            if (taken.compare_exchange_weak(now, now + (static_cast<uint64_t>(count) << (back ? 32 : 0)), std::memory_order_relaxed))
                return back ? Section{end - count, end} : Section{begin, begin + 1};
        }
    }

    std::atomic<uint64_t>* taken_;  // of each thread's section: chunks from its front, and from its back in the high half
    size_t stride_;
    int threads_;
};

// The loops of a job.
class Loops {
public:
    Loops(int threads, size_t count)
        : threads_(threads), lines_((count + kPerLine - 1) / kPerLine), taken_(threads * lines_) {}

    Loop operator[](size_t i) { return {&taken_[i / kPerLine].taken[i % kPerLine], lines_ * kPerLine, threads_}; }
    // To be called before each run of the job.
    void reset() {
        for (Line& line : taken_)
            for (auto& t : line.taken) t.store(0, std::memory_order_relaxed);
    }

private:
    static constexpr size_t kPerLine = 64 / sizeof(uint64_t);
    struct alignas(64) Line { std::atomic<uint64_t> taken[kPerLine]; };  // what threads count lies apart
    int threads_;
    size_t lines_;  // of a thread
    std::vector<Line> taken_;
};

}  // namespace gmtp
