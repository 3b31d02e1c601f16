// A pool of threads for passes of a few milliseconds: workers spin briefly for the next job, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gmtp {

class ThreadPool {
public:
    explicit ThreadPool(int threads);  // throws InputError where the system has no more threads
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs body(thread) once on every thread, the caller being thread 0, and waits for all. An exception thrown by a
    // body is rethrown here. One job at a time: throws InputError while there is another.
    void run(const std::function<void(int thread)>& body);

    // Inside a job: waits until every thread has come here.
    void barrier();

    // Inside a job: hands out [0, count) in chunks, dynamically; `next` must have been reset to 0 before a barrier.
    template <class F> static void share(std::atomic<int64_t>& next, int64_t count, int64_t chunk, F&& body) {
        for (;;) {
            int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= count) return;
            body(begin, begin + chunk < count ? begin + chunk : count);
        }
    }

    // Hands out [0, count) in stretches of whole chunks, long ones first: a walk over memory that is seldom broken off is
    // read at full speed, and the short last ones let all threads end together.
    template <class F> static void share_stretches(std::atomic<int64_t>& next, int64_t count, int64_t chunk, int threads, F&& body) {
        for (int64_t begin = next.load(std::memory_order_relaxed); begin < count; begin = next.load(std::memory_order_relaxed)) {
            const int64_t chunks = (count - begin + chunk - 1) / chunk / (2 * threads);
            const int64_t end = begin + (chunks > 1 ? chunks : 1) * chunk;
            if (!next.compare_exchange_strong(begin, end, std::memory_order_relaxed)) continue;
            body(begin, end < count ? end : count);
        }
    }

    // A whole job that is one shared loop.
    template <class F> void parallel_for(int64_t count, int64_t chunk, F&& body) {
        std::atomic<int64_t> next{0};
        run([&](int) { share(next, count, chunk, body); });
    }

private:
    void end();
    void work(int thread);
    void call(int thread);

    std::vector<std::thread> workers_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<uint32_t> job_{0};
    std::atomic<int> running_{0};
    std::atomic<int> waiting_{0};
    std::atomic<uint32_t> phase_{0};
    std::atomic<bool> stop_{false}, busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    int sleeping_ = 0;
    std::exception_ptr error_;
};

}  // namespace gmtp
