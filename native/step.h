// What a decoder does between its products when it reads one token a row: norms, rotations, attention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace lowbit {

// y = x / sqrt(mean(x^2) + epsilon) * (weight + shift), a row at a time; x and y may be the same.
struct Norm {
    const float* x;
    const float* weight;
    float* y;
    std::size_t rows, columns;
    float epsilon, shift;
};

// One token a row over keys and values that other code holds: (rows, heads, width, size), the last dimension dense.
struct Seen {
    const float* data;
    std::size_t row, head, column;  // strides, in floats
};

struct Attention {
    const float* q;  // (rows, heads * group, size)
    Seen keys, values;
    const std::uint8_t* mask;  // (rows, width): 0 where a row must not look; or null
    std::size_t mask_row;      // its stride
    float* y;                  // as q
    std::size_t rows, heads, group, width, size;  // `group` queries share a head's keys; size is a multiple of CHUNK
    float scale;
};

#define LOWBIT_STEP(isa)                                                                            \
    namespace isa {                                                                                 \
    void norm(const Norm& n);                                                                       \
    /* One row's queries of one head; `scratch` has 4 * width floats. */                            \
    void attend(const Attention& a, std::size_t row, std::size_t head, float* scratch);             \
    /* gate * sigmoid(gate) * up, in place of gate. */                                              \
    void silu(float* gate, const float* up, std::size_t n);                                         \
    }
LOWBIT_STEP(portable)
LOWBIT_STEP(avx2)
LOWBIT_STEP(avx512)
LOWBIT_STEP(vbmi)
LOWBIT_STEP(neon)
#undef LOWBIT_STEP

}  // namespace lowbit
