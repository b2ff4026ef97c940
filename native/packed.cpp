// Packed weights for Python (lowbit/runtime/kernels/packed.py is the caller): what is checked, and who does which rows.

#include "packed.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "multiply_pool.h"

namespace nb = nanobind;

namespace lowbit {

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Stored = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t PIECE = std::size_t(1) << 15;  // weights that are worth a thread's attention

struct Line {  // of the cache: a vector of inputs that lies in two takes twice as long to read
    alignas(64) float lane[CHUNK];
};

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

class Packed {
public:
    Packed(Bytes codes, std::size_t columns, int bits, std::size_t group, Stored scale, nb::object zero,
           nb::object offset, Values table)
        : codes_(codes), scale_(scale) {
        require(bits >= 1 && bits <= 8 && columns > 0, "no codes have so many bits or columns");
        require(codes.shape(1) == (columns * std::size_t(bits) + 7) / 8, "codes are no packed matrix of these bits and columns");
        require(group >= columns || (group > 0 && group % CHUNK == 0), "groups do not begin at multiples of 16 columns");
        const std::size_t levels = std::size_t(1) << bits;
        require(table.shape(0) >= levels && table.shape(0) <= 256, "the table has not a value for every code");
        w_.codes = codes.data();
        w_.rows = codes.shape(0), w_.columns = columns, w_.row_bytes = codes.shape(1), w_.bits = bits;
        w_.group = group, w_.groups = group >= columns ? 1 : (columns + group - 1) / group;
        w_.scale = numbers(scale);
        require(zero.is_none() || offset.is_none(), "a zero or an offset, not both");
        w_.shifted = !zero.is_none() ? PackedWeight::zero : !offset.is_none() ? PackedWeight::offset : PackedWeight::none;
        if (w_.shifted != PackedWeight::none) {
            shift_ = nb::cast<Stored>(zero.is_none() ? offset : zero);
            w_.shift = numbers(shift_);
        }
        w_.whole = w_.shifted != PackedWeight::zero || table.data()[0] == 0.0f;
        for (std::size_t c = 0; c < 256; ++c) {
            w_.table[c] = table.data()[c % levels];
            if (c < levels) w_.whole = w_.whole && w_.table[c] == float(c) + w_.table[0];
        }
        require(w_.whole || bits < 5 || w_.shifted == PackedWeight::none, "tables of more than 16 values are only scaled");
        w_.copied = w_.rows - std::min(w_.rows, (ROOM + w_.row_bytes - 1) / w_.row_bytes);
        end_.resize((w_.rows - w_.copied) * w_.row_bytes + ROOM);
        std::memcpy(end_.data(), w_.codes + w_.copied * w_.row_bytes, end_.size() - ROOM);
        w_.end = end_.data();
    }

    // y = x W^T, each output summed in the same order whatever the tokens and the threads.
    void multiply(Inputs x, Floats y, int threads) const {
        require(x.shape(1) == w_.columns && y.shape(0) == x.shape(0) && y.shape(1) == w_.rows,
                "x is not (tokens, columns), or y is not (tokens, rows)");
        nb::gil_scoped_release release;
        thread_local std::vector<Line> entered;  // kept: fresh pages at every call would cost more than the product
        entered.resize(std::max(entered.size(), x.shape(0) * chunks_of(w_)));
        float* const in = entered.data()->lane;
        const Kernels& k = kernels();
        k.packed_enter(w_, x.data(), x.shape(0), in);
        const PackedProduct product{in, x.shape(0), y.data()};
        share(0, w_.rows, threads, [&](std::size_t first, std::size_t last, float* scratch) {
            k.packed_multiply(w_, first, last, product, scratch);
        });
    }

    // Rows from `first` on, as many as `out` has, in float32.
    void decode(std::size_t first, Floats out, int threads) const {
        require(out.shape(1) == w_.columns && first <= w_.rows && out.shape(0) <= w_.rows - first, "there are no such rows");
        nb::gil_scoped_release release;
        float* const to = out.data();
        share(first, first + out.shape(0), threads, [&](std::size_t begin, std::size_t end, float* scratch) {
            kernels().packed_decode(w_, begin, end, to + (begin - first) * w_.columns, scratch);
        });
    }

private:
    Numbers numbers(const Stored& from) const {
        require(from.shape(1) == w_.groups && (from.shape(0) == w_.rows || from.shape(0) == 1), "not one number a group");
        Numbers::Type type = Numbers::f32;
        if (from.dtype() == nb::dtype<std::uint8_t>()) {
            type = Numbers::u8;
        } else if (from.dtype().code == std::uint8_t(nb::dlpack::dtype_code::Float) && from.dtype().bits == 16) {
            type = Numbers::f16;
        } else {
            require(from.dtype() == nb::dtype<float>(), "numbers of groups are uint8, float16 or float32");
        }
        return {from.data(), type, from.shape(0) == 1};
    }

    // Calls work(begin, end, scratch) for pieces of the rows [first, last), several a thread.
    template <class Work>
    void share(std::size_t first, std::size_t last, int threads, const Work& work) const {
        const std::size_t rows = last - first, workers = std::size_t(std::max(threads, 1));
        const std::size_t least = std::max<std::size_t>(1, PIECE / w_.columns);
        std::size_t piece = workers == 1 ? rows : std::max(least, rows / (4 * workers));
        piece = std::max<std::size_t>(4, (piece + 3) / 4 * 4);
        spread((rows + piece - 1) / piece, threads, [&](std::size_t i) {
            std::vector<float> scratch(scratch_of(w_));
            work(first + i * piece, std::min(last, first + (i + 1) * piece), scratch.data());
        });
    }

    Bytes codes_;
    Stored scale_, shift_;
    std::vector<std::uint8_t> end_;
    PackedWeight w_{};
};

}  // namespace

}  // namespace lowbit

void bind_packed(nb::module_& m) {
    using lowbit::Packed;
    nb::class_<Packed>(m, "Packed")
        .def(nb::init<lowbit::Bytes, std::size_t, int, std::size_t, lowbit::Stored, nb::object, nb::object,
                      lowbit::Values>(),
             nb::arg("codes"), nb::arg("columns"), nb::arg("bits"), nb::arg("group"), nb::arg("scale"),
             nb::arg("zero").none(), nb::arg("offset").none(), nb::arg("table"))
        .def("multiply", &Packed::multiply, nb::arg("x"), nb::arg("y"), nb::arg("threads"))
        .def("decode", &Packed::decode, nb::arg("first"), nb::arg("out"), nb::arg("threads"));
}
