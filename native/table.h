// The code of one panel: which integers its 128 states stand for. See docs/reference/stream.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr int STATES = 128;   // states of the automaton: a state is 7 bits
constexpr int SYMBOLS = 64;   // symbols of an alphabet at most: a symbol is 6 bits
constexpr int LANES = 64;     // automata that run side by side: one a column, 64 columns a step
constexpr int STREAMS = 8;    // bit streams of a segment: eight lanes share one
constexpr int MAX_SHIFT = 15;

// A code is ((low + symbol) << shift) | raw, with `shift` raw bits stored as they are. State i stands for
// symbol[i]; leaving it, `bits[i]` bits are read and added to base[i], which gives the next state.
struct Table {
    std::int16_t low = 0;
    std::uint8_t shift = 0;
    std::uint8_t last = 0;  // the largest symbol; symbols 0 and `last` are the edges that exceptions are coded as
    std::uint8_t symbol[STATES];
    std::uint8_t base[STATES];
    std::uint8_t bits[STATES];

    // Fills base, bits and last from symbol: the k-th state of a symbol with f states is number f + k of it.
    void derive();
    // Why no stream may hold this table, or null.
    const char* problem() const;
    int smallest() const { return low * (1 << shift); }
    int largest() const { return (low + last + 1) * (1 << shift) - 1; }
    bool operator==(const Table& other) const;
};

struct Plan {
    Table table;
    double bits;  // what the counted codes will take, exceptions included, tables and segment heads not
};

// The cheapest table for codes counted in counts[i] = occurrences of the value lowest + i. Cost about a millisecond.
Plan plan(const std::uint64_t* counts, std::size_t n, int lowest);

// Exceptions: what a code outside the alphabet costs. Its symbol is the nearest edge; `distance` steps beyond it.
constexpr std::uint64_t EXCEPTION_ESCAPE = 7;
inline std::uint64_t exception_code(bool below, std::uint64_t distance) { return 2 * (distance - 1) + below; }

}  // namespace lowbit
