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
#include "products.h"

namespace nb = nanobind;

namespace lowbit {

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Stored = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t PIECE = std::size_t(1) << 15;  // weights that are worth a thread's attention

constexpr float ONE = 1;

struct Line {  // of the cache: a vector of inputs that lies in two takes twice as long to read
    alignas(64) float lane[CHUNK];
};

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// How many rows are one piece of work: several pieces a thread, each worth its attention.
std::size_t rows_apiece(std::size_t rows, std::size_t columns, int threads) {
    const std::size_t workers = std::size_t(std::max(threads, 1)), least = std::max<std::size_t>(1, PIECE / columns);
    const std::size_t piece = workers == 1 ? rows : std::max(least, rows / (4 * workers));
    return std::max<std::size_t>(4, (piece + 3) / 4 * 4);
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
        copy_end();
    }

    // Weights of 16 bits, multiplied as they are.
    explicit Packed(Stored numbers) : scale_(numbers) {
        const nb::dlpack::dtype type = numbers.dtype();
        w_.bfloat = type.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat);
        require(type.bits == 16 && (w_.bfloat || type.code == std::uint8_t(nb::dlpack::dtype_code::Float)),
                "weights that are not packed are float16 or bfloat16");
        require(numbers.shape(1) > 0, "there are no columns");
        w_.codes = static_cast<const std::uint8_t*>(numbers.data());
        w_.rows = numbers.shape(0), w_.columns = numbers.shape(1), w_.row_bytes = 2 * w_.columns, w_.bits = 16;
        w_.group = w_.columns, w_.groups = 1;
        w_.scale = {&ONE, Numbers::f32, true};
        copy_end();
    }

    const PackedWeight& weight() const { return w_; }

    // Rows from `first` on, as many as `out` has, in float32.
    void decode(std::size_t first, Floats out, int threads) const {
        require(out.shape(1) == w_.columns && first <= w_.rows && out.shape(0) <= w_.rows - first, "there are no such rows");
        nb::gil_scoped_release release;
        float* const to = out.data();
        const std::size_t rows = out.shape(0), piece = rows_apiece(rows, w_.columns, threads);
        spread((rows + piece - 1) / piece, threads, [&](std::size_t i) {
            std::vector<float> scratch(scratch_of(w_));
            const std::size_t begin = first + i * piece, end = std::min(first + rows, begin + piece);
            kernels().packed_decode(w_, begin, end, to + (begin - first) * w_.columns, scratch.data());
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

    // Rows whose chunks could be read past the end of the codes are read from a copy.
    void copy_end() {
        w_.copied = w_.rows - std::min(w_.rows, (ROOM + w_.row_bytes - 1) / w_.row_bytes);
        end_.resize((w_.rows - w_.copied) * w_.row_bytes + ROOM);
        std::memcpy(end_.data(), w_.codes + w_.copied * w_.row_bytes, end_.size() - ROOM);
        w_.end = end_.data();
    }

    Bytes codes_;
    Stored scale_, shift_;
    std::vector<std::uint8_t> end_;
    PackedWeight w_{};
};

struct Piece {
    const PackedWeight* w;
    std::size_t first, last;
    PackedProduct product;
};

// What packed_multiply() is in Python.
void multiply_at(nb::tuple weights, nb::tuple biases, std::uintptr_t x, std::size_t inputs, std::uintptr_t y,
                 std::size_t outputs, int threads) {
    const Products products(weights, biases, inputs, outputs);
    nb::gil_scoped_release release;
    products.run(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), threads);
}

}  // namespace

Products::Products(nb::tuple weights, nb::tuple biases, std::size_t inputs, std::size_t outputs) {
    require(weights.size() == biases.size() && weights.size() > 0, "not one bias a weight");
    std::size_t rows = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const auto bias = nb::cast<std::uintptr_t>(biases[i]);
        factors.push_back({&nb::cast<const Packed&>(weights[i]).weight(), reinterpret_cast<const float*>(bias)});
        require(factors[i].w->columns == factors[0].w->columns, "the weights have not the same columns");
        rows += factors[i].w->rows;
    }
    const std::size_t columns = factors[0].w->columns;
    tokens = inputs / columns;
    require(inputs % columns == 0, "x is not (tokens, columns)");
    require(outputs == tokens * rows, "y is not (tokens, rows)");
}

void Products::run(const float* x, float* y, int threads) const {
    const Kernels& k = kernels();
    std::size_t rows = 0;
    for (const Factor& f : factors) rows += f.w->rows;
    const PackedWeight& first = *factors[0].w;
    const std::size_t lines = tokens * chunks_of(first), piece = rows_apiece(rows, first.columns, threads);
    thread_local std::vector<Line> entered;  // kept: fresh pages at every call would cost more than the product
    thread_local std::vector<Piece> pieces;
    entered.resize(std::max(entered.size(), 2 * lines));
    pieces.clear();
    float* in[2] = {};  // four-bit weights may meet their inputs in another order
    float* out = y;
    for (const Factor& f : factors) {
        float*& order = in[f.w->bits == 4];
        if (!order) {
            order = entered[f.w->bits == 4 ? lines : 0].lane;
            k.packed_enter(*f.w, x, tokens, order);
        }
        for (std::size_t row = 0; row < f.w->rows; row += piece) {
            pieces.push_back({f.w, row, std::min(f.w->rows, row + piece), {order, tokens, out}});
        }
        out += tokens * f.w->rows;
    }
    const Piece* all = pieces.data();
    spread(pieces.size(), threads, [&, all](std::size_t i) {
        const Piece& p = all[i];
        thread_local std::vector<float> scratch;
        scratch.resize(std::max(scratch.size(), scratch_of(*p.w)));
        k.packed_multiply(*p.w, p.first, p.last, p.product, scratch.data());
    });
    for (const Factor& f : factors) {
        for (std::size_t t = 0; t < tokens; ++t, y += f.w->rows) {
            for (std::size_t i = 0; f.bias && i < f.w->rows; ++i) y[i] += f.bias[i];
        }
    }
}

}  // namespace lowbit

void bind_packed(nb::module_& m) {
    using lowbit::Packed;
    nb::class_<Packed>(m, "Packed")
        .def(nb::init<lowbit::Bytes, std::size_t, int, std::size_t, lowbit::Stored, nb::object, nb::object,
                      lowbit::Values>(),
             nb::arg("codes"), nb::arg("columns"), nb::arg("bits"), nb::arg("group"), nb::arg("scale"),
             nb::arg("zero").none(), nb::arg("offset").none(), nb::arg("table"))
        .def(nb::init<lowbit::Stored>(), nb::arg("numbers"))
        .def("decode", &Packed::decode, nb::arg("first"), nb::arg("out"), nb::arg("threads"));
    m.def("packed_multiply", &lowbit::multiply_at, nb::arg("weights"), nb::arg("biases"), nb::arg("x"),
          nb::arg("inputs"), nb::arg("y"), nb::arg("outputs"), nb::arg("threads"));
}
