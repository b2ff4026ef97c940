// Weights in few bits that are multiplied where they lie: what the loops of packed_rows.cpp read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// Codes are looked up, or are whole numbers, 16 columns at a time. Groups begin at multiples of that.
constexpr int CHUNK = 16;
constexpr std::size_t ROOM = 32;  // bytes that may be read past the codes of a chunk

// One number a group of a row, as it is stored.
struct Numbers {
    const void* data = nullptr;  // (rows, groups), or one row for all
    enum Type { u8, f16, f32 } type = f32;
    bool one_row = false;
};

// A weight is (value - shift) * scale, or value * scale + shift: in float32, each operation rounded, so that it is the
// very number that the plain decode in Python gives. `value` is table[code]; without a table, the code itself.
struct PackedWeight {
    const std::uint8_t* codes;  // rows of little-endian streams of codes, as lowbit/formats/pack.py lays them out
    const std::uint8_t* end;    // a copy of the rows from `copied` on, with ROOM behind it
    std::size_t rows, copied, columns, row_bytes;
    int bits;  // of a code, 1 to 8; 16 where the codes are the weights themselves, as float16 or bfloat16
    std::size_t group, groups;  // columns that share a scale, and how many such there are in a row
    Numbers scale, shift;
    enum Shift { none, zero, offset } shifted;
    bool whole;        // table[c] = c - table[0]
    bool bfloat;       // of 16 bits
    float table[256];  // repeated where there are fewer than 16 codes
};

// Without linkage: what one processor's flags compile must not serve another.
namespace {

inline const std::uint8_t* row_of(const PackedWeight& w, std::size_t i) {
    return i < w.copied ? w.codes + i * w.row_bytes : w.end + (i - w.copied) * w.row_bytes;
}

// Chunks of a row, the last one ragged perhaps.
inline std::size_t chunks_of(const PackedWeight& w) { return (w.columns + CHUNK - 1) / CHUNK; }

// Floats that packed_multiply and packed_decode need to work in.
inline std::size_t scratch_of(const PackedWeight& w) { return 8 * w.groups; }

}  // namespace

// Rows [first, last) of y = x W^T, y being (tokens, rows). `x` is what enter() made. The sum of an output does not
// depend on how many tokens there are.
struct PackedProduct {
    const float* x;
    std::size_t tokens;
    float* y;
};

#define LOWBIT_PACKED(isa)                                                                                          \
    namespace isa {                                                                                                 \
    void packed_enter(const PackedWeight& w, const float* x, std::size_t tokens, float* to);                        \
    void packed_multiply(const PackedWeight& w, std::size_t first, std::size_t last, const PackedProduct& p,        \
                         float* scratch);                                                                           \
    void packed_decode(const PackedWeight& w, std::size_t first, std::size_t last, float* to, float* scratch);      \
    }
LOWBIT_PACKED(portable)
LOWBIT_PACKED(avx2)
LOWBIT_PACKED(avx512)
LOWBIT_PACKED(vbmi)
LOWBIT_PACKED(neon)
#undef LOWBIT_PACKED

}  // namespace lowbit
