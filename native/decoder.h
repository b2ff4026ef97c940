// From a parsed stream to codes in memory.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "stream.h"

namespace lowbit {

// Rows [first, first + rows) of all columns into `out`, as int8 (wrapping where a code does not fit) or int16. Throws
// std::invalid_argument for corrupt segments.
template <class T>
void decode(const Stream& stream, std::size_t first, std::size_t rows, T* out, int threads, const Kernels& isa);

}  // namespace lowbit
