#include "stream.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "parallel.h"

namespace lowbit {

namespace {

constexpr std::uint8_t MAGIC[4] = {'L', 'B', 'E', 'C'};
constexpr std::uint16_t VERSION = 1;
constexpr std::size_t HEAD = 32, PANEL = 6, TABLE = 3 + STATES * 6 / 8;
constexpr std::size_t MAX_ROWS = std::size_t(1) << 40, MAX_WIDTH = std::size_t(1) << 24;
constexpr std::size_t MAX_SEGMENT = std::size_t(1) << 28;  // steps times lanes: positions stay below 32 bits

[[noreturn]] void refuse(const char* why) { throw std::invalid_argument(why); }

// Bytes that are read once, in order, and never past their end.
class Reader {
public:
    Reader(const std::uint8_t* at, const std::uint8_t* end) : at_(at), end_(end) {}
    std::size_t left() const { return std::size_t(end_ - at_); }
    const std::uint8_t* take(std::size_t n) {
        if (n > left()) refuse("the stream is truncated");
        at_ += n;
        return at_ - n;
    }
    std::uint64_t integer(int bytes) {
        const std::uint8_t* p = take(std::size_t(bytes));
        std::uint64_t value = 0;
        for (int i = 0; i < bytes; ++i) value |= std::uint64_t(p[i]) << (8 * i);
        return value;
    }
    std::uint64_t varint() {  // seven bits a byte, the least significant first; at most 35 bits
        std::uint64_t value = 0;
        for (int shift = 0; shift < 35; shift += 7) {
            const std::uint8_t byte = *take(1);
            value |= std::uint64_t(byte & 127) << shift;
            if (byte < 128) return value;
        }
        refuse("a number of more than 35 bits");
    }

private:
    const std::uint8_t *at_, *end_;
};

using Bytes = std::vector<std::uint8_t>;

void put(Bytes& out, std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out.push_back(std::uint8_t(value >> (8 * i)));
}

void put_varint(Bytes& out, std::uint64_t value) {
    for (; value >= 128; value >>= 7) out.push_back(std::uint8_t(value | 128));
    out.push_back(std::uint8_t(value));
}

// Bits appended least significant first, at most 56 at once; the last byte is filled with zeros.
class BitWriter {
public:
    explicit BitWriter(Bytes& out) : out_(out) {}
    ~BitWriter() { if (n_) out_.push_back(std::uint8_t(word_)); }
    void put(std::uint64_t value, int bits) {
        word_ |= value << n_;
        for (n_ += bits; n_ >= 8; n_ -= 8, word_ >>= 8) out_.push_back(std::uint8_t(word_));
    }

private:
    Bytes& out_;
    std::uint64_t word_ = 0;
    int n_ = 0;
};

// The encoder's view of a table: states are counted from 128 to 255. From state x, symbol s leaves
// (x + bits[s]) >> 16 bits to be read, and goes on in next[first[s] + the rest of x].
struct Encoder {
    std::array<std::uint32_t, SYMBOLS> bits{};
    std::array<int, SYMBOLS> first{};
    std::array<std::uint8_t, STATES> next{};
    std::uint8_t likeliest = 0;

    explicit Encoder(const Table& table) {
        std::array<int, SYMBOLS> count{}, begin{};
        for (const std::uint8_t s : table.symbol) ++count[s];
        for (std::size_t s = 1; s < SYMBOLS; ++s) begin[s] = begin[s - 1] + count[s - 1];
        for (std::size_t s = 0; s < SYMBOLS; ++s) {
            if (!count[s]) continue;
            std::uint32_t most = 0;  // bits left by the last states; the first ones, below f << most, leave one less
            while (count[s] << most < STATES) ++most;
            bits[s] = (most << 16) - (std::uint32_t(count[s]) << most);
            first[s] = begin[s] - count[s];
        }
        for (int i = 0; i < STATES; ++i) next[std::size_t(begin[table.symbol[i]]++)] = std::uint8_t(i);
        likeliest = std::uint8_t(std::max_element(count.begin(), count.end()) - count.begin());
    }
};

struct Encoded {
    Bytes head, data;  // its entry in the directory, and what Segment points to
};

// Symbols of 64 lanes a step, raw bits as planes, and the list of exceptions.
struct Split {
    Bytes symbols, raw, exceptions;
};

Split split(const std::int16_t* codes, std::size_t stride, std::size_t rows, const Panel& panel, const Table& table,
            std::uint8_t padding) {
    const std::size_t steps = panel.steps(), shift = table.shift;
    Split out{Bytes(rows * steps * LANES, padding), Bytes(rows * steps * shift * 8), {}};
    std::size_t expected = 0;  // position after the last exception
    for (std::size_t r = 0; r < rows; ++r) {
        const std::int16_t* row = codes + r * stride;
        std::uint8_t* to = out.symbols.data() + r * steps * LANES;
        for (std::size_t c = 0; c < panel.width; ++c) {
            const int high = (row[c] >> shift) - table.low, symbol = std::clamp(high, 0, int(table.last));
            to[c] = std::uint8_t(symbol);
            if (high == symbol) continue;
            const std::size_t position = r * panel.width + c;
            const std::uint64_t e = exception_code(high < 0, std::uint64_t(std::abs(high - symbol)));
            put_varint(out.exceptions, (position - expected) << 3 | std::min(e, EXCEPTION_ESCAPE));
            if (e >= EXCEPTION_ESCAPE) put_varint(out.exceptions, e - EXCEPTION_ESCAPE);
            expected = position + 1;
        }
        for (std::size_t c = 0; shift && c < panel.width; ++c) {
            std::uint8_t* byte = out.raw.data() + (r * steps + c / LANES) * shift * 8 + c % LANES / 8;
            for (std::size_t j = 0; j < shift; ++j) byte[8 * j] |= std::uint8_t((row[c] >> j & 1) << (c % 8));
        }
    }
    return out;
}

Encoded encode_segment(const std::int16_t* codes, std::size_t stride, std::size_t rows, const Panel& panel,
                       const Table& table, const Encoder& encoder) {
    const Split parts = split(codes, stride, rows, panel, table, encoder.likeliest);
    // Backwards from state 0, which the decoder will end in. A word holds what one step reads from one stream.
    const std::size_t words = rows * panel.steps() * STREAMS;
    std::vector<std::uint64_t> word(words);
    Bytes bits(words);
    std::array<std::uint32_t, LANES> state;
    state.fill(STATES);
    for (std::size_t w = words; w-- > 0;) {
        const std::uint8_t* symbol = parts.symbols.data() + w * 8;
        std::uint32_t* lane = state.data() + w % STREAMS * 8;
        int n = 0;
        for (std::size_t i = 0; i < LANES / STREAMS; ++i) {
            const std::uint32_t x = lane[i], leave = (x + encoder.bits[symbol[i]]) >> 16;
            word[w] |= std::uint64_t(x & ((1u << leave) - 1)) << n;
            n += int(leave);
            lane[i] = STATES + encoder.next[std::size_t(encoder.first[symbol[i]] + int(x >> leave))];
        }
        bits[w] = std::uint8_t(n);
    }
    Encoded out;
    {
        BitWriter writer(out.data);
        for (const std::uint32_t x : state) writer.put(x - STATES, 7);
    }
    out.data.insert(out.data.end(), parts.exceptions.begin(), parts.exceptions.end());
    out.data.insert(out.data.end(), parts.raw.begin(), parts.raw.end());
    put_varint(out.head, parts.exceptions.size());
    out.data.reserve(out.data.size() + words * 7 + STREAMS);
    for (std::size_t stream = 0; stream < STREAMS; ++stream) {
        const std::size_t before = out.data.size();
        {
            BitWriter writer(out.data);
            for (std::size_t w = stream; w < words; w += STREAMS) writer.put(word[w], bits[w]);
        }
        put_varint(out.head, out.data.size() - before);
    }
    return out;
}

Table plan_panel(const std::int16_t* codes, std::size_t rows, std::size_t stride, const Panel& panel) {
    std::vector<std::uint64_t> counts(1 << 16);
    for (std::size_t r = 0; r < rows; ++r) {
        const std::int16_t* row = codes + r * stride + panel.column;
        for (std::size_t c = 0; c < panel.width; ++c) ++counts[std::size_t(row[c] - INT16_MIN)];
    }
    return plan(counts.data(), counts.size(), INT16_MIN).table;
}

std::vector<Panel> make_panels(std::size_t columns, const std::vector<std::size_t>& widths) {
    std::vector<Panel> panels;
    std::size_t column = 0;
    for (std::size_t i = 0; i < widths.size(); ++i) {
        if (widths[i] == 0 || widths[i] > columns - column || widths[i] > MAX_WIDTH) refuse("panels do not fill the columns");
        if (widths[i] % LANES && i + 1 < widths.size()) refuse("a panel before the last is no multiple of 64 columns");
        panels.push_back({column, widths[i], 0});
        column += widths[i];
    }
    if (column != columns) refuse("panels do not fill the columns");
    return panels;
}

}  // namespace

Stream Stream::parse(const std::uint8_t* data, std::size_t size) {
    Reader in(data, data + size);
    if (std::memcmp(in.take(4), MAGIC, 4)) refuse("it does not begin with LBEC");
    if (in.integer(2) != VERSION) refuse("it is of another version");
    Stream out;
    const std::size_t tables = in.integer(2), panels = in.integer(4);
    out.block = in.integer(4);
    out.rows = in.integer(8);
    out.columns = in.integer(8);
    if (out.rows > MAX_ROWS || (out.rows && !out.block)) refuse("a number of rows that cannot be");
    out.block = std::min(out.block, out.rows);  // what is allocated for a block must be there
    if (panels > in.left() / PANEL) refuse("the stream is truncated");
    std::vector<std::size_t> widths(panels);
    std::vector<std::uint16_t> numbers(panels);
    for (std::size_t i = 0; i < panels; ++i) {
        widths[i] = in.integer(4);
        numbers[i] = std::uint16_t(in.integer(2));
        if (numbers[i] >= tables) refuse("a panel without its table");
    }
    out.panels = make_panels(out.columns, widths);
    if (tables > in.left() / TABLE) refuse("the stream is truncated");
    out.tables.resize(tables);
    for (Table& t : out.tables) {
        t.low = std::int16_t(in.integer(2));
        t.shift = std::uint8_t(in.integer(1));
        for (int i = 0; i < STATES; i += 4) {
            const std::uint64_t four = in.integer(3);
            for (int j = 0; j < 4; ++j) t.symbol[i + j] = four >> (6 * j) & 63;
        }
        t.derive();
        if (const char* why = t.problem()) refuse(why);
    }
    const std::size_t blocks = out.rows ? (out.rows - 1) / out.block + 1 : 0;
    if (panels && blocks > in.left() / (1 + STREAMS + START_BYTES) / panels) refuse("the stream is truncated");
    out.segments.reserve(blocks * panels);
    for (std::size_t p = 0; p < panels; ++p) {
        out.panels[p].table = numbers[p];
        if (std::min(out.block, out.rows) * out.panels[p].steps() > MAX_SEGMENT / LANES) refuse("a segment that is too long");
        for (std::size_t row = 0; row < out.rows; row += out.block) {
            Segment s{};
            s.panel = p, s.row = row, s.rows = std::min(out.block, out.rows - row);
            s.exception_bytes = in.varint();
            for (std::size_t& length : s.length) length = in.varint();
            out.segments.push_back(s);
        }
    }
    for (Segment& s : out.segments) {
        s.start = in.take(START_BYTES);
        s.exceptions = in.take(s.exception_bytes);
        s.raw = in.take(s.rows * out.steps(s) * out.table(s).shift * 8);
        std::size_t bytes = 0;
        for (const std::size_t length : s.length) bytes += length;
        s.streams = in.take(bytes);
    }
    if (in.left()) refuse("bytes follow the last segment");
    out.end = data + size;
    return out;
}

std::vector<Exception> exceptions(const Stream& stream, const Segment& segment) {
    const Panel& panel = stream.panels[segment.panel];
    const Table& table = stream.table(segment);
    const std::int64_t lowest = INT16_MIN >> table.shift, highest = INT16_MAX >> table.shift;
    Reader in(segment.exceptions, segment.exceptions + segment.exception_bytes);
    std::vector<Exception> out;
    for (std::uint64_t position = 0; in.left(); ++position) {
        const std::uint64_t first = in.varint();
        std::uint64_t code = first & 7;
        if (code == EXCEPTION_ESCAPE) code += in.varint();
        position += first >> 3;
        if (position >= segment.rows * panel.width) refuse("an exception outside its segment");
        const std::int64_t distance = std::int64_t(code / 2 + 1);
        const std::int64_t high = code & 1 ? table.low - distance : table.low + table.last + distance;
        if (high < lowest || high > highest) refuse("an exception beyond 16 bits");
        const std::int64_t correction = code & 1 ? -distance : distance;
        out.push_back({std::size_t(position / panel.width), std::size_t(position % panel.width),
                       int(correction * (std::int64_t(1) << table.shift))});
    }
    return out;
}

std::vector<std::uint8_t> encode(const std::int16_t* codes, std::size_t rows, std::size_t columns,
                                 const std::vector<std::size_t>& widths, std::size_t segment, int threads) {
    if (rows > MAX_ROWS) refuse("too many rows");
    std::vector<Panel> panels = make_panels(columns, widths);
    if (panels.size() > UINT16_MAX) refuse("more than 65535 panels");
    std::vector<Table> planned(panels.size()), tables;
    parallel(panels.size(), threads, [&](std::size_t p) { planned[p] = plan_panel(codes, rows, columns, panels[p]); });
    std::size_t widest = 1, padded = 1;
    for (std::size_t p = 0; p < panels.size(); ++p) {
        const auto same = std::find(tables.begin(), tables.end(), planned[p]);
        panels[p].table = std::uint16_t(same - tables.begin());
        if (same == tables.end()) tables.push_back(planned[p]);
        widest = std::max(widest, panels[p].steps() * LANES);
        padded += panels[p].steps() * LANES;
    }
    // Segments of the asked size in the mean, all panels cut at the same rows, and blocks of equal height, so that the
    // segments of a panel can be decoded in step.
    segment = std::clamp(segment, std::size_t(1), MAX_SEGMENT / LANES);
    const std::size_t wanted = segment * std::max(panels.size(), std::size_t(1)) / padded;
    const std::size_t most = std::clamp(wanted, std::size_t(1), MAX_SEGMENT / widest);
    std::size_t blocks = rows ? (rows - 1) / most + 1 : 0;
    const std::size_t block = blocks ? (rows - 1) / blocks + 1 : 0;
    blocks = block ? (rows - 1) / block + 1 : 0;

    const std::vector<Encoder> encoders(tables.begin(), tables.end());
    std::vector<Encoded> parts(panels.size() * blocks);
    parallel(parts.size(), threads, [&](std::size_t i) {
        const Panel& panel = panels[i / blocks];
        const std::size_t row = i % blocks * block;
        parts[i] = encode_segment(codes + row * columns + panel.column, columns, std::min(block, rows - row), panel,
                                  tables[panel.table], encoders[panel.table]);
    });

    Bytes out(MAGIC, MAGIC + 4);
    put(out, VERSION, 2);
    put(out, tables.size(), 2);
    put(out, panels.size(), 4);
    put(out, block, 4);
    put(out, rows, 8);
    put(out, columns, 8);
    for (const Panel& p : panels) put(out, p.width, 4), put(out, p.table, 2);
    for (const Table& t : tables) {
        put(out, std::uint16_t(t.low), 2);
        put(out, t.shift, 1);
        BitWriter writer(out);
        for (const std::uint8_t symbol : t.symbol) writer.put(symbol, 6);
    }
    for (const Encoded& part : parts) out.insert(out.end(), part.head.begin(), part.head.end());
    for (const Encoded& part : parts) out.insert(out.end(), part.data.begin(), part.data.end());
    return out;
}

}  // namespace lowbit
