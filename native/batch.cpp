#include "batch.h"

#include <algorithm>
#include <cstring>

namespace lowbit {

std::vector<Group> groups(const Stream& stream, std::size_t first, std::size_t last, int threads) {
    std::vector<Group> out;
    if (first >= last) return out;
    const std::size_t blocks = stream.panels.empty() ? 0 : stream.segments.size() / stream.panels.size();
    const std::size_t from = first / stream.block, count = (last - 1) / stream.block + 1 - from;
    const std::size_t panels = stream.panels.size(), workers = std::size_t(std::max(threads, 1));
    const std::size_t filled = (count + SETS - 1) / SETS;                 // groups a panel, as full as can be
    const std::size_t shared = panels ? (workers + panels - 1) / panels : 1;  // groups a panel that give all workers one
    const std::size_t parts = std::min(count, std::max(filled, shared));
    for (std::size_t p = 0; p < panels; ++p) {
        for (std::size_t i = 0; i < parts; ++i) {
            const std::size_t a = count * i / parts, b = count * (i + 1) / parts;
            out.push_back({p * blocks + from + a, int(b - a)});
        }
    }
    return out;
}

OpenBatch::OpenBatch(const Stream& stream, const Group& group) {
    const Segment* segments = &stream.segments[group.first];
    batch_.table = &stream.table(segments[0]);
    batch_.steps = stream.steps(segments[0]);
    batch_.sets = group.count;
    for (int k = 0; k < group.count; ++k) {
        const Segment& s = segments[k];
        Cursor& cursor = batch_.cursor[k];
        std::size_t bytes = 0;
        for (std::size_t i = 0; i < STREAMS; ++i) {
            cursor.at[i] = bytes * 8;
            bytes += s.length[i];
            cursor.end[i] = bytes * 8;
        }
        for (int i = 0; i < LANES; ++i) {
            const std::uint8_t* p = s.start + i * 7 / 8;
            const int shift = i * 7 % 8, two = p[0] | (shift > 1 ? p[1] << 8 : 0);
            cursor.state[i] = std::uint8_t(two >> shift & 127);
        }
        cursor.raw = s.raw;
        cursor.rows = s.rows;
        cursor.bytes = s.streams;
        if (std::size_t(stream.end - s.streams) < bytes + slack(batch_.steps)) {
            copies_[k].assign(bytes + slack(batch_.steps), 0);
            std::memcpy(copies_[k].data(), s.streams, bytes);
            cursor.bytes = copies_[k].data();
        }
    }
}

bool OpenBatch::complete() const {
    for (int k = 0; k < batch_.sets; ++k) {
        const Cursor& c = batch_.cursor[k];
        for (const std::uint8_t state : c.state) {
            if (state) return false;
        }
        for (int i = 0; i < STREAMS; ++i) {
            if ((c.at[i] + 7) / 8 * 8 != c.end[i]) return false;
            if (c.at[i] % 8 && c.bytes[c.at[i] / 8] >> (c.at[i] % 8)) return false;  // what fills the last byte is zero
        }
    }
    return true;
}

}  // namespace lowbit
