// The entropy coder as Python sees it (lowbit/codec/stream.py is its only caller).

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "decoder.h"
#include "kernels.h"
#include "stream.h"

namespace nb = nanobind;

namespace lowbit {

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Blob = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

Bytes to_numpy(std::vector<std::uint8_t>&& bytes) {
    auto* owned = new std::vector<std::uint8_t>(std::move(bytes));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<std::uint8_t>*>(p); });
    return Bytes(owned->data(), {owned->size()}, owner);
}

Bytes encode_matrix(Matrix<const std::int16_t> codes, const std::vector<std::size_t>& widths, std::size_t segment,
                    int threads) {
    std::vector<std::uint8_t> out;
    {
        nb::gil_scoped_release release;
        out = encode(codes.data(), codes.shape(0), codes.shape(1), widths, segment, threads);
    }
    return to_numpy(std::move(out));
}

std::pair<std::size_t, std::size_t> shape(Blob blob) {
    nb::gil_scoped_release release;
    const Stream stream = Stream::parse(blob.data(), blob.size());
    return {stream.rows, stream.columns};
}

// Rows [first, first + rows) into `out`. Bytes wrap where a code does not fit 8 bits.
template <class T>
void decode_into(Blob blob, std::size_t first, Matrix<T> out, int threads) {
    nb::gil_scoped_release release;
    const Stream stream = Stream::parse(blob.data(), blob.size());
    const std::size_t rows = out.shape(0);
    if (first > stream.rows || rows > stream.rows - first || out.shape(1) != stream.columns) {
        throw std::invalid_argument("its shape is not the expected one");
    }
    decode(stream, first, rows, out.data(), threads, kernels());
}

// The least and the largest code that a stream's tables and exceptions allow.
std::pair<int, int> range(Blob blob) {
    nb::gil_scoped_release release;
    const Stream stream = Stream::parse(blob.data(), blob.size());
    int least = 0, largest = 0;
    for (const Table& t : stream.tables) {
        least = std::min(least, t.smallest());
        largest = std::max(largest, t.largest());
    }
    for (const Segment& s : stream.segments) {
        const Table& t = stream.table(s);
        for (const Exception& e : exceptions(stream, s)) {
            if (e.correction < 0) least = std::min(least, t.smallest() + e.correction);
            else largest = std::max(largest, t.largest() + e.correction);
        }
    }
    return {least, largest};
}

using Counts = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::tuple<int, int, Bytes, double> plan_counts(Counts counts, int lowest) {
    const Plan p = plan(counts.data(), counts.size(), lowest);
    return {p.table.low, p.table.shift, to_numpy({p.table.symbol, p.table.symbol + STATES}), p.bits};
}

}  // namespace

}  // namespace lowbit

void bind_codec(nb::module_& m) {
    using namespace lowbit;
    m.def("encode", &encode_matrix, nb::arg("codes"), nb::arg("widths"), nb::arg("segment"), nb::arg("threads"));
    m.def("shape", &shape, nb::arg("stream"));
    m.def("code_range", &range, nb::arg("stream"));
    m.def("decode_int8", &decode_into<std::int8_t>, nb::arg("stream"), nb::arg("first"), nb::arg("out"), nb::arg("threads"));
    m.def("decode_int16", &decode_into<std::int16_t>, nb::arg("stream"), nb::arg("first"), nb::arg("out"), nb::arg("threads"));
    m.def("plan", &plan_counts, nb::arg("counts"), nb::arg("lowest"));
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* k : available()) names.push_back(k->name);
        return names;
    });
}
