// Dot products of coded symbols with small signed integers, as the decoding loop yields the symbols.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode.h"

namespace lowbit {

// How the raw bits below the symbols of a table are multiplied. A byte that meets a factor is at most 127, so that two
// of its products fit 16 bits, which the older vector instructions add them in.
enum class Raw {
    none,    // shift = 0
    joined,  // symbol << shift | raw is at most 127: one byte
    apart,   // two bytes, and twice the sums; shift is at most 7
};
constexpr int MAX_JOINED = 127, MAX_APART = 7;

// Sums are exact in 32 bits for panels of up to this many columns: 127 * 127 * 2^17 < 2^31.
constexpr std::size_t MAX_PANEL = std::size_t(1) << 17;

struct Factors {
    const std::int8_t* x;  // (steps, n, 64), aligned to 64 bytes; in [-127, 127], 0 for lanes beyond the panel's width
    int n;                 // vectors that the rows are multiplied by: 2 or 4; with raw bits 2
    Raw raw;
    std::int32_t* sums[SETS];  // of each set (rows, n), for Raw::apart (rows, 2, n): of symbols, of raw bits
};

}  // namespace lowbit
