// The decoder's loop, the same for every processor and for whatever is done with the symbols.
//
// A `Lanes` type (lanes_*.h) decodes one step, 64 symbols, with the instructions of one processor. A consumer says what
// happens to them: it stores them (store.cpp), or multiplies and adds. Up to SETS segments of one panel run side by
// side, since one alone waits for its own tables most of the time.
//
// A consumer C has, all inlined into the loop, with `set` < SETS a constant there:
//     void begin(std::size_t row);                                      once a row, before its first step
//     void step(int set, std::size_t step, Lanes::Symbols symbols);     lane i is column 64 * step + i of the panel
//     void end(std::size_t row);                                        once a row, after its last step
// `row` counts from the first row of each set's segment; the sets 0 .. batch.together(row)-1 take part. Symbols of
// lanes beyond the panel's width are arbitrary. A code is ((low + symbol) << shift) | raw; the raw bits of a step are
// `shift` words of 64 bits at cursor.raw + 8 * shift * (row * steps + step), bit i of word j being bit j of lane i.
// Exceptions are not applied here: add their corrections afterwards (stream.h, exceptions()).
//
// Files that include this are compiled once for each processor, with its flags. They must not use functions of the
// standard library that the linker could share with the portable rest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "table.h"

namespace lowbit {

constexpr int SETS = 6;

// Where the decoder of a segment stands.
struct Cursor {
    const std::uint8_t* bytes;     // the eight streams; slack(steps) bytes after their end may be read
    std::uint64_t at[STREAMS];     // the next bit of each, counted from `bytes`
    std::uint64_t end[STREAMS];    // the bit after its last byte
    std::uint8_t state[LANES];
    const std::uint8_t* raw;
    std::size_t rows;
};

// Segments of one panel, decoded in step. Only the last block of a panel may have fewer rows, so `rows` never rises.
struct Batch {
    const Table* table;
    std::size_t steps;  // of a row
    int sets;
    Cursor cursor[SETS];

    int together(std::size_t row) const {
        int n = sets;
        while (n > 0 && cursor[n - 1].rows <= row) --n;
        return n;
    }
};

// Rows between two checks that no stream was overrun, and how far one can be overrun until then: eight lanes of at most
// seven bits are seven bytes a step.
constexpr std::size_t rows_unchecked(std::size_t steps) { return steps >= 64 ? 1 : 64 / steps; }
constexpr std::size_t slack(std::size_t steps) { return 7 * steps * rows_unchecked(steps) + 8; }

namespace {  // every file has its own, compiled with its own flags

inline bool overrun(const Cursor& cursor) {
    bool beyond = false;
    for (int i = 0; i < STREAMS; ++i) beyond |= cursor.at[i] > cursor.end[i];
    return beyond;
}

template <class Lanes, int K, class Consumer>
bool decode_rows(Batch& batch, std::size_t row, std::size_t last, Consumer& consumer) {
    const typename Lanes::Codebook codebook(*batch.table);
    const std::size_t steps = batch.steps, chunk = rows_unchecked(steps);
    typename Lanes::State state[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) state[k].load(batch.cursor[k]);
    while (row < last) {
        const std::size_t stop = last - row < chunk ? last : row + chunk;
        for (; row < stop; ++row) {
            consumer.begin(row);
            for (std::size_t t = 0; t < steps; ++t) {
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) consumer.step(k, t, Lanes::step(codebook, state[k]));
            }
            consumer.end(row);
        }
        bool beyond = false;
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            state[k].save(batch.cursor[k]);
            beyond |= overrun(batch.cursor[k]);
        }
        if (beyond) return false;
    }
    return true;
}

// Decodes all rows of a batch into the consumer. False if a stream was overrun.
template <class Lanes, class Consumer>
bool decode(Batch& batch, Consumer& consumer) {
    std::size_t row = 0;
    for (int n; (n = batch.together(row)) > 0;) {
        const std::size_t last = batch.cursor[n - 1].rows;
        bool good = false;
        switch (n) {
            case 1: good = decode_rows<Lanes, 1>(batch, row, last, consumer); break;
            case 2: good = decode_rows<Lanes, 2>(batch, row, last, consumer); break;
            case 3: good = decode_rows<Lanes, 3>(batch, row, last, consumer); break;
            case 4: good = decode_rows<Lanes, 4>(batch, row, last, consumer); break;
            case 5: good = decode_rows<Lanes, 5>(batch, row, last, consumer); break;
            case 6: good = decode_rows<Lanes, 6>(batch, row, last, consumer); break;
        }
        if (!good) return false;
        row = last;
    }
    return true;
}

}  // namespace

}  // namespace lowbit
