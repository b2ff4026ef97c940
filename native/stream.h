// A stream of entropy-coded integers: its parsed form, and the encoder. docs/reference/stream.md specifies the bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "table.h"

namespace lowbit {

constexpr std::size_t START_BYTES = LANES * 7 / 8;  // start states of a segment, seven bits each

// A run of columns that share a table.
struct Panel {
    std::size_t column, width;
    std::uint16_t table;
    std::size_t steps() const { return (width + LANES - 1) / LANES; }
};

// A panel within a block of rows: decodable alone. All pointers lie in the blob, and so do the bytes they promise.
struct Segment {
    std::size_t panel, row, rows;
    const std::uint8_t* start;       // 56 bytes
    const std::uint8_t* exceptions;  // exception_bytes
    std::size_t exception_bytes;
    const std::uint8_t* raw;      // rows * steps * shift words of 64 bits: bit planes, bit i for lane i
    const std::uint8_t* streams;  // the eight streams, one after the other
    std::array<std::size_t, STREAMS> length;
};

struct Stream {
    std::size_t rows = 0, columns = 0, block = 0;  // block: rows of a segment
    std::vector<Panel> panels;
    std::vector<Table> tables;
    std::vector<Segment> segments;  // panel by panel, each from the first row to the last
    const std::uint8_t* end = nullptr;

    // Checks every size against `size` before it is used. Throws std::invalid_argument for bytes that are no stream.
    // Keeps pointers into `data`.
    static Stream parse(const std::uint8_t* data, std::size_t size);
    const Table& table(const Segment& s) const { return tables[panels[s.panel].table]; }
    std::size_t steps(const Segment& s) const { return panels[s.panel].steps(); }
};

struct Exception {
    std::size_t row, column;  // within the segment
    int correction;           // to be added to the decoded code
};

// The exceptions of a segment, by position. Throws std::invalid_argument for positions or values out of range.
std::vector<Exception> exceptions(const Stream& stream, const Segment& segment);

// The blob of a matrix of codes. Widths must be positive, multiples of 64 but for the last, and sum to columns.
std::vector<std::uint8_t> encode(const std::int16_t* codes, std::size_t rows, std::size_t columns,
                                 const std::vector<std::size_t>& widths, std::size_t segment, int threads);

}  // namespace lowbit
