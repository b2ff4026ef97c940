#include "decoder.h"

#include <cstdint>
#include <stdexcept>

#include "batch.h"
#include "parallel.h"

namespace lowbit {

namespace {

template <class T>
void correct(const Stream& stream, const Segment& segment, std::size_t first, std::size_t rows, T* out) {
    const std::size_t column = stream.panels[segment.panel].column;
    for (const Exception& e : exceptions(stream, segment)) {
        const std::size_t row = segment.row + e.row;
        if (row < first || row - first >= rows) continue;
        T& code = out[(row - first) * stream.columns + column + e.column];
        code = T(code + e.correction);
    }
}

}  // namespace

template <class T>
void decode(const Stream& stream, std::size_t first, std::size_t rows, T* out, int threads, const Kernels& isa) {
    const std::vector<Group> work = groups(stream, first, first + rows, threads);
    parallel(work.size(), threads, [&](std::size_t i) {
        OpenBatch open(stream, work[i]);
        const Segment* segments = &stream.segments[work[i].first];
        const Panel& panel = stream.panels[segments[0].panel];
        Target to{out + panel.column, stream.columns, rows, panel.width, {}, sizeof(T) == 2};
        for (int k = 0; k < work[i].count; ++k) to.row[k] = std::ptrdiff_t(segments[k].row) - std::ptrdiff_t(first);
        if (!isa.store(open.batch(), to) || !open.complete()) throw std::invalid_argument("its segments are corrupt");
        for (int k = 0; k < work[i].count; ++k) correct(stream, segments[k], first, rows, out);
    });
}

template void decode(const Stream&, std::size_t, std::size_t, std::int8_t*, int, const Kernels&);
template void decode(const Stream&, std::size_t, std::size_t, std::int16_t*, int, const Kernels&);

}  // namespace lowbit
