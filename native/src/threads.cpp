#include "gmtp/threads.h"

#include <string>
#include <utility>

#include "gmtp/error.h"

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

// Waits until `value` is no longer `old`: spins for some tens of microseconds, then sleeps, since on a busy machine the
// thread that is waited for may need this very core. Whoever changes `value` calls notify_all.
template <class T> void wait_while(const std::atomic<T>& value, T old) {
    for (int looks = 0; looks < 4000; looks++) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
    try {
        for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
    } catch (const std::exception& fault) {
        end();
        throw InputError("of " + std::to_string(threads) + " threads only " + std::to_string(size()) + " could be started (" + fault.what() + ")");
    }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
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
    if (busy_.exchange(true)) throw InputError("the threads are at work for somebody else: a pool runs one job at a time");
    body_ = &body;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
        std::lock_guard lock(mutex_);
        job_.fetch_add(1, std::memory_order_release);
        if (sleeping_) wake_.notify_all();
    }
    call(0);
    for (int left; (left = running_.load(std::memory_order_acquire));) wait_while(running_, left);
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false);
    if (error) std::rethrow_exception(error);
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
        running_.notify_all();
    }
}

void ThreadPool::barrier() {
    if (workers_.empty()) return;
    uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == static_cast<int>(workers_.size())) {
        waiting_.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase);
    }
}

}  // namespace gmtp
