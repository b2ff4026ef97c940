// Work spread over threads, by an atomic counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lowbit {

// Calls work(i) once for each i < n, on up to `threads` threads, this one among them. The first exception is rethrown.
template <class Work>
void parallel(std::size_t n, int threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr error;
    std::mutex lock;
    const auto loop = [&] {
        for (std::size_t i; (i = next.fetch_add(1)) < n;) {
            try {
                work(i);
            } catch (...) {
                const std::lock_guard<std::mutex> guard(lock);
                if (!error) error = std::current_exception();
                next = n;
            }
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (std::size_t t = 1; t < std::min(n, std::size_t(std::max(threads, 1))); ++t) helpers.emplace_back(loop);
    } catch (const std::system_error&) {
        // no more threads to be had: those there are do the work
    }
    loop();
    for (std::thread& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace lowbit
