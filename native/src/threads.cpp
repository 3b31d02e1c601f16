#include "gmtp/threads.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gmtp {
namespace {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for some tens of microseconds, then yields the core at each look: a busy machine must not stall the others.
struct Backoff {
    int looks = 0;
    void wait() {
        if (++looks < 2000) relax();
        else std::this_thread::yield();
    }
};

}  // namespace

ThreadPool::ThreadPool(int threads) {
    for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
}

void ThreadPool::call(int thread) {
    try {
        (*body_)(thread);
    } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
    }
}

void ThreadPool::run(const std::function<void(int)>& body) {
    body_ = &body;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
        std::lock_guard lock(mutex_);
        job_.fetch_add(1, std::memory_order_release);
        if (sleeping_) wake_.notify_all();
    }
    call(0);
    for (Backoff b; running_.load(std::memory_order_acquire);) b.wait();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int thread) {
    for (uint32_t seen = 0;;) {
        // A decode step is followed by the next within a fraction of a millisecond: look for it before sleeping.
        for (int looks = 0; looks < 20000 && job_.load(std::memory_order_acquire) == seen; looks++) relax();
        if (job_.load(std::memory_order_acquire) == seen) {
            std::unique_lock lock(mutex_);
            sleeping_++;
            wake_.wait(lock, [&] { return stop_ || job_.load(std::memory_order_relaxed) != seen; });
            sleeping_--;
        }
        if (stop_) return;
        seen = job_.load(std::memory_order_acquire);
        call(thread);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

void ThreadPool::barrier() {
    if (workers_.empty()) return;
    uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == static_cast<int>(workers_.size())) {
        waiting_.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1, std::memory_order_release);
    } else {
        for (Backoff b; phase_.load(std::memory_order_acquire) == phase;) b.wait();
    }
}

}  // namespace gmtp
