#include "multiply_pool.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace lowbit {

namespace {

// A parallel region in libgomp's binary interface: every thread of a team of `threads` calls `each(data)`.
using Team = void (*)(void (*each)(void*), void* data, unsigned threads, unsigned flags);

Team torch_team() {
#if defined(__linux__)
    if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD)) {
        return reinterpret_cast<Team>(dlsym(library, "GOMP_parallel"));
    }
#endif
    return nullptr;
}

struct Job {
    std::size_t n;
    const std::function<void(std::size_t)>& work;
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    void take() {
        for (std::size_t i; (i = next.fetch_add(1)) < n;) {
            try {
                work(i);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();  // read after all threads have joined
                next = n;
            }
        }
    }
};

}  // namespace

void spread(std::size_t n, int threads, const std::function<void(std::size_t)>& work) {
    static const Team team = torch_team();
    const std::size_t most = std::min(n, std::size_t(std::max(threads, 1)));
    if (most <= 1 || !team) return parallel(n, int(most), work);
    Job job{n, work, {}, {}, {}};
    team([](void* data) { static_cast<Job*>(data)->take(); }, &job, unsigned(most), 0);
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace lowbit
