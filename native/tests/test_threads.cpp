// Loops that threads share: every step once, whoever is held up; and what a pool refuses. Built to be run under the sanitizers.
#include <algorithm>
#include <chrono>
#include <thread>

#include "check.h"
#include "gmtp/threads.h"

using namespace gmtp;

namespace {

void test_every_step_once() {
    for (int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        for (int64_t count : {0, 1, 2, 37, 1000})
            for (int64_t chunk : {1, 3, 16}) {
                Loops loops(threads, 2);
                for (int turn = 0; turn < 20; turn++) {
                    std::vector<std::atomic<int>> done(static_cast<size_t>(2 * count));
                    std::atomic<bool> apart{false};
                    loops.reset();
                    pool.run([&](int thread) {
                        for (int64_t i = 0; i < 2; i++)
                            loops[static_cast<size_t>(i)].run(thread, count, chunk, [&](int64_t begin, int64_t end) {
                                if (begin % chunk || begin >= end || end > count || (end % chunk && end != count)) apart = true;
                                for (; begin < end; begin++) done[static_cast<size_t>(i * count + begin)]++;
                            });
                    });
                    check(!apart, "stretches are of whole chunks");
                    check(std::all_of(done.begin(), done.end(), [](const auto& d) { return d == 1; }), "every step is done once");
                }
            }
    }
}

// A thread that is held up in its first chunk leaves all the rest of its section to the others.
void test_held_up() {
    constexpr int64_t kCount = 96, kChunk = 4;
    for (int threads : {2, 4}) {
        ThreadPool pool(threads);
        Loops loops(threads, 1);
        std::atomic<int64_t> by_others{0};
        std::atomic<bool> held{false};
        bool waited_for = false;
        pool.run([&](int thread) {
            loops[0].run(thread, kCount, kChunk, [&](int64_t begin, int64_t end) {
                if (thread) {  // which must not take the section of a thread that has not begun
                    while (!held) std::this_thread::yield();
                    by_others += end - begin;
                    return;
                }
                held = true;
                const auto start = std::chrono::steady_clock::now();
                while (!waited_for && std::chrono::steady_clock::now() - start < std::chrono::seconds(20)) {
                    waited_for = by_others == kCount - kChunk;
                    std::this_thread::yield();
                }
            });
        });
        check(waited_for, "others do the work of a thread that is held up");
    }
}

void test_one_job_at_a_time() {
    ThreadPool pool(2);
    pool.run([&](int thread) {
        if (thread == 0) check_refused([&] { pool.run([](int) {}); }, "a job within a job is refused");
    });
    int64_t sum = 0;
    std::atomic<int64_t> shared{0};
    pool.parallel_for(100, 7, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin++) shared += begin;
    });
    for (int64_t i = 0; i < 100; i++) sum += i;
    check(shared == sum, "the pool works on");
}

}  // namespace

int main() {
    test_every_step_once();
    test_held_up();
    test_one_job_at_a_time();
    std::puts("all as expected");
}
