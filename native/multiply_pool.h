// Work of a fraction of a millisecond spread over threads: starting a thread takes a tenth of one.
#pragma once

#include <cstddef>
#include <functional>

namespace lowbit {

// Calls work(i) once for each i < n, on up to `threads` threads, this one among them. The first exception is rethrown.
//
// The threads are those of the OpenMP that torch brings (libgomp): they stay awake from one operation to the next, and
// threads of our own would have to share processors with them. Where it is not loaded, threads are started (parallel.h).
void spread(std::size_t n, int threads, const std::function<void(std::size_t)>& work);

}  // namespace lowbit
