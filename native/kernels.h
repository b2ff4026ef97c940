// What is compiled once for each processor, and the choice among it when the program runs.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "decode.h"
#include "multiply.h"
#include "packed.h"
#include "step.h"

namespace lowbit {

// Where decoded codes go: rows [0, rows) of a matrix of int8 or int16, from the panel's first column on.
struct Target {
    void* out;
    std::size_t stride, rows, width;  // in elements; stride between rows, width of the panel
    std::ptrdiff_t row[SETS];         // of each set's first row in `out`; rows outside [0, rows) are dropped
    bool wide;                        // int16
};

struct Kernels {
    const char* name;
    bool (*store)(Batch&, const Target&);  // false: a stream was overrun
    bool (*multiply)(Batch&, const Factors&);
    decltype(portable::packed_enter)* packed_enter;  // see packed.h
    decltype(portable::packed_multiply)* packed_multiply;
    decltype(portable::packed_decode)* packed_decode;
    decltype(portable::norm)* norm;  // see step.h
    decltype(portable::attend)* attend;
    decltype(portable::silu)* silu;
};

// Those that this processor runs, slowest first.
std::vector<const Kernels*> available();

// The fastest, or the one that the environment variable LOWBIT_ISA names. Throws std::invalid_argument.
const Kernels& kernels();

#define LOWBIT_KERNELS(isa)                       \
    namespace isa {                               \
    bool store(Batch& batch, const Target& to);   \
    bool multiply(Batch& b, const Factors& by);   \
    }
LOWBIT_KERNELS(portable)
LOWBIT_KERNELS(avx2)
LOWBIT_KERNELS(avx512)
LOWBIT_KERNELS(vbmi)
LOWBIT_KERNELS(neon)
#undef LOWBIT_KERNELS

}  // namespace lowbit
