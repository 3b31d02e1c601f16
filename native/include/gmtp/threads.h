// A pool of threads for passes of a few milliseconds: workers spin briefly for the next job, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "gmtp/loop.h"

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

    // A whole job that is one shared loop.
    template <class F> void parallel_for(int64_t count, int64_t chunk, F&& body) {
        Loops loops(size(), 1);
        run([&](int thread) { loops[0].run_chunks(thread, count, chunk, body); });
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
