// Prints the best read bandwidth in GB/s of N threads over 500 MB: the ceiling of plain decoding. Not over a power of two:
// threads that read as far apart as one get in each other's way in the memory's banks. Usage: bandwidth N
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const std::size_t count = std::size_t{500'004'864} / sizeof(std::uint64_t);
    const std::vector<std::uint64_t> data(count, 1);
    double best = 0;
    for (int repeat = 0; repeat < 8; repeat++) {
        std::vector<std::uint64_t> sums(threads * 16);  // a cache line apart
        std::vector<std::thread> pool;
        const auto start = std::chrono::steady_clock::now();
        for (int t = 0; t < threads; t++)
            pool.emplace_back([&, t] {
                std::uint64_t sum[32] = {};
                for (std::size_t i = count / threads / 32 * t * 32, end = i + count / threads / 32 * 32; i < end; i += 32)
                    for (int lane = 0; lane < 32; lane++) sum[lane] += data[i + lane];
                for (const std::uint64_t s : sum) sums[t * 16] += s;
            });
        for (auto& thread : pool) thread.join();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::uint64_t total = 0;
        for (const std::uint64_t s : sums) total += s;
        if (total == 0) return 1;  // keeps the reads from being optimised away
        best = std::max(best, static_cast<double>(count / threads / 32 * 32 * threads * 8) / seconds.count() / 1e9);
    }
    std::printf("%.2f\n", best);
}
