// One token's small operations for Python (lowbit/runtime/decoding/ is the caller). Arguments are addresses of float32
// numbers that the caller has checked and keeps: wrapping a tensor takes longer than most of these operations.

#include "step.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "multiply_pool.h"
#include "products.h"

namespace nb = nanobind;

namespace lowbit {

namespace {

using Address = std::uintptr_t;

constexpr std::size_t WORK = std::size_t(1) << 17;  // products that are worth a second thread

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

void norm(Address x, Address weight, Address y, std::size_t rows, std::size_t columns, float epsilon, float shift) {
    kernels().norm({at<const float>(x), at<const float>(weight), at<float>(y), rows, columns, epsilon, shift});
}

// Cosines and sines of the first `turned` numbers of a head: (rows, turned), or one row for all.
struct Angles {
    const float *cos, *sin;
    std::size_t turned;
    bool one_row;
};

// Rotates x (rows, heads, size) in place: pairs are halves apart, as x * cos + rotate_half(x) * sin has them, each
// operation rounded.
void rotate(float* x, const Angles& by, std::size_t rows, std::size_t heads, std::size_t size) {
    const std::size_t half = by.turned / 2;
    for (std::size_t row = 0; row < rows; ++row) {
        const float* c = by.cos + (by.one_row ? 0 : row * by.turned);
        const float* s = by.sin + (by.one_row ? 0 : row * by.turned);
        for (std::size_t head = 0; head < heads; ++head, x += size) {
            for (std::size_t i = 0; i < half; ++i) {
                const float first = x[i], second = x[half + i];
                x[i] = first * c[i] + -second * s[i];
                x[half + i] = second * c[half + i] + first * s[half + i];
            }
        }
    }
}

// Queries, keys and values of rows of one token, the first two rotated: three blocks (rows, heads, size) of y.
void turned(nb::tuple weights, nb::tuple biases, Address x, std::size_t inputs, Address y, std::size_t outputs,
            Address cos, Address sin, std::size_t turned, bool one_row, std::size_t size, int threads) {
    const Products products(weights, biases, inputs, outputs);
    if (products.factors.size() != 3 || turned % 2 || turned > size) throw std::invalid_argument("no such heads");
    for (const Products::Factor& f : products.factors) {
        if (f.w->rows % size) throw std::invalid_argument("rows are no whole heads");
    }
    nb::gil_scoped_release release;
    float* out = at<float>(y);
    products.run(at<const float>(x), out, threads);
    for (int i = 0; i < 2; ++i) {
        const std::size_t heads = products.factors[i].w->rows / size;
        rotate(out, {at<const float>(cos), at<const float>(sin), turned, one_row}, products.tokens, heads, size);
        out += products.tokens * heads * size;
    }
}

// softmax(q k^T * scale) v, times the weight: q is (rows, heads * group, size), keys and values (address, strides of
// rows, heads and columns) of (rows, heads, width, size), mask (rows, width) of bytes or 0, y (rows, outputs). Neither the
// other rows nor threads change a result.
void attend(Address q, nb::tuple keys, nb::tuple values, Address mask, std::size_t mask_row, std::size_t rows,
            std::size_t heads, std::size_t group, std::size_t width, std::size_t size, float scale, nb::tuple weight,
            nb::tuple bias, Address y, std::size_t outputs, int threads) {
    if (size == 0 || size % CHUNK || width == 0) throw std::invalid_argument("heads are of multiples of 16 numbers");
    const std::size_t numbers = rows * heads * group * size;
    const Products products(weight, bias, numbers, outputs);
    if (products.tokens != rows) throw std::invalid_argument("the weight does not take all heads of a row");
    const auto seen = [](const nb::tuple& t) {
        return Seen{at<const float>(nb::cast<Address>(t[0])), nb::cast<std::size_t>(t[1]), nb::cast<std::size_t>(t[2]),
                    nb::cast<std::size_t>(t[3])};
    };
    thread_local std::vector<float> attended;
    attended.resize(std::max(attended.size(), numbers));
    const Attention a{at<const float>(q), seen(keys), seen(values), at<const std::uint8_t>(mask), mask_row,
                      attended.data(), rows, heads, group, width, size, scale};
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    spread(rows * heads, 2 * numbers * width > WORK ? threads : 1, [&](std::size_t i) {
        thread_local std::vector<float> scratch;
        scratch.resize(std::max(scratch.size(), 4 * a.width));
        k.attend(a, i / a.heads, i % a.heads, scratch.data());
    });
    products.run(a.y, at<float>(y), threads);
}

// down(silu(gate(x)) * up(x)); `weights` are gate and up.
void gated(nb::tuple weights, nb::tuple biases, nb::tuple weight, nb::tuple bias, Address x, std::size_t inputs,
           Address y, std::size_t outputs, int threads) {
    std::size_t rows = 0;
    const Products down(weight, bias, 0, 0);
    if (weights.size() == 2) rows = 2 * down.factors[0].w->columns;
    const std::size_t tokens = outputs / down.factors[0].w->rows, middle = tokens * rows;
    const Products both(weights, biases, inputs, middle), last(weight, bias, middle / 2, outputs);
    if (both.factors.size() != 2 || both.factors[0].w->rows != both.factors[1].w->rows || both.tokens != tokens) {
        throw std::invalid_argument("a gate, and as many others");
    }
    nb::gil_scoped_release release;
    thread_local std::vector<float> between;
    between.resize(std::max(between.size(), middle));
    float* const gate = between.data();
    both.run(at<const float>(x), gate, threads);
    kernels().silu(gate, gate + middle / 2, middle / 2);
    last.run(gate, at<float>(y), threads);
}

}  // namespace

}  // namespace lowbit

void bind_step(nb::module_& m) {
    m.def("norm", &lowbit::norm, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("rows"), nb::arg("columns"),
          nb::arg("epsilon"), nb::arg("shift"));
    m.def("turned", &lowbit::turned, nb::arg("weights"), nb::arg("biases"), nb::arg("x"), nb::arg("inputs"),
          nb::arg("y"), nb::arg("outputs"), nb::arg("cos"), nb::arg("sin"), nb::arg("turned"), nb::arg("one_row"),
          nb::arg("size"), nb::arg("threads"));
    m.def("attend", &lowbit::attend, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("mask"),
          nb::arg("mask_row"), nb::arg("rows"), nb::arg("heads"), nb::arg("group"), nb::arg("width"), nb::arg("size"),
          nb::arg("scale"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"), nb::arg("outputs"), nb::arg("threads"));
    m.def("gated", &lowbit::gated, nb::arg("weights"), nb::arg("biases"), nb::arg("weight"), nb::arg("bias"),
          nb::arg("x"), nb::arg("inputs"), nb::arg("y"), nb::arg("outputs"), nb::arg("threads"));
}
