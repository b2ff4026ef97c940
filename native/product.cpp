// Products with coded matrices that are never decoded to memory (lowbit/codec/product.py is its only caller).

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "batch.h"
#include "kernels.h"
#include "multiply_pool.h"
#include "stream.h"

namespace nb = nanobind;

namespace lowbit {

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A factor x of 16 bits is BASE * high + low with both in [-127, 127].
constexpr int BASE = 255, LARGEST = BASE * 127 + 127;

struct Aligned {  // whole cache lines
    alignas(64) std::int8_t lane[LANES];
};

// Some tokens' factors as the loop wants them, and what makes codes of symbols: sums of each panel's factors.
struct Packed {
    std::size_t tokens, n;  // vectors: of each token its high bytes, then its low ones
    std::vector<Aligned> x;         // panel by panel (steps, n)
    std::vector<std::size_t> at;    // where each panel begins
    std::vector<std::int64_t> sum;  // (panels, n)
    std::int64_t value(std::size_t panel, std::size_t column, std::size_t i) const {
        return x[at[panel] + column / LANES * n + i].lane[column % LANES];
    }
};

struct Correction {
    std::uint32_t row, column;  // within the segment
    std::int32_t by;
};

class Product {
public:
    explicit Product(Vector<std::uint8_t> blob) : blob_(blob), stream_(Stream::parse(blob.data(), blob.size())) {
        blocks_ = stream_.panels.empty() ? 0 : stream_.segments.size() / stream_.panels.size();
        first_.push_back(0);
        for (const Segment& s : stream_.segments) {
            for (const Exception& e : exceptions(stream_, s)) {
                corrections_.push_back({std::uint32_t(e.row), std::uint32_t(e.column), e.correction});
            }
            first_.push_back(corrections_.size());
        }
        corrections_.shrink_to_fit();
        for (const Table& t : stream_.tables) fits_ = fits_ && t.shift <= MAX_APART, raw_ = raw_ || t.shift > 0;
        for (const Panel& p : stream_.panels) fits_ = fits_ && p.width <= MAX_PANEL;
    }

    std::pair<std::size_t, std::size_t> shape() const { return {stream_.rows, stream_.columns}; }
    bool fits() const { return fits_; }
    std::size_t exceptions_held() const { return corrections_.size(); }

    // out = x N^T, exactly. Every |x| is at most LARGEST.
    void multiply(Matrix<const std::int16_t> x, Matrix<std::int64_t> out, int threads) const {
        check(x.shape(0), x.shape(1), out.shape(0), out.shape(1));
        nb::gil_scoped_release release;
        const std::size_t rows = stream_.rows;
        run(x.data(), x.shape(0), threads,
            [&](std::size_t token, std::size_t row, std::int64_t y) { out.data()[token * rows + row] = y; });
    }

    // out = gain * (x[order] * step) N^T with each token's entered x rounded to 2 * LARGEST + 1 levels.
    void linear(Matrix<const float> x, Vector<std::int32_t> order, Vector<float> step, Vector<float> gain,
                Matrix<float> out, int threads) const {
        check(x.shape(0), x.shape(1), out.shape(0), out.shape(1));
        const std::size_t rows = stream_.rows, columns = stream_.columns, tokens = x.shape(0);
        if (order.size() != columns || step.size() != columns || gain.size() != rows) {
            throw std::invalid_argument("order, step or gain are not as long as the matrix is wide or high");
        }
        nb::gil_scoped_release release;
        for (std::size_t c = 0; c < columns; ++c) {
            if (order.data()[c] < 0 || std::size_t(order.data()[c]) >= columns) throw std::invalid_argument("a column that is none");
        }
        std::vector<std::int16_t> rounded(tokens * columns);
        std::vector<double> scale(tokens);
        std::vector<float> entered(columns);
        for (std::size_t t = 0; t < tokens; ++t) {
            const float* from = x.data() + t * columns;
            for (std::size_t c = 0; c < columns; ++c) entered[c] = from[order.data()[c]] * step.data()[c];
            scale[t] = round(entered.data(), columns, rounded.data() + t * columns);
        }
        run(rounded.data(), tokens, threads, [&](std::size_t token, std::size_t row, std::int64_t y) {
            out.data()[token * rows + row] = float(double(y) * (scale[token] * double(gain.data()[row])));
        });
    }

private:
    [[noreturn]] static void corrupt() { throw std::invalid_argument("its segments are corrupt"); }

    void check(std::size_t tokens, std::size_t columns, std::size_t out_tokens, std::size_t rows) const {
        if (!fits_) throw std::invalid_argument("it has more raw bits or wider panels than can be multiplied");
        if (columns != stream_.columns || rows != stream_.rows || tokens != out_tokens) {
            throw std::invalid_argument("its shape is not the expected one");
        }
    }

    // The nearest whole numbers to x / scale, ties to even, with the scale that makes the largest LARGEST; NaN for a
    // vector that is not finite.
    static double round(const float* x, std::size_t n, std::int16_t* out) {
        std::uint32_t bits = 0;  // of the largest magnitude: as whole numbers they are in the same order
        for (std::size_t i = 0; i < n; ++i) {
            std::uint32_t b;
            std::memcpy(&b, x + i, 4);
            bits = std::max(bits, b & 0x7FFFFFFFu);
        }
        float largest;
        std::memcpy(&largest, &bits, 4);
        if (!(largest <= 3.4e38f)) {
            std::fill_n(out, n, std::int16_t(0));
            return std::nan("");
        }
        const double scale = std::max(double(largest), 1e-30) / LARGEST;
        const float inverse = float(1 / scale);
        for (std::size_t i = 0; i < n; ++i) {
            const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: its last bit is worth one
            std::int32_t b;
            std::memcpy(&b, &shifted, 4);
            out[i] = std::int16_t(b - 0x4B400000);
        }
        return scale;
    }

    Packed pack(const std::int16_t* x, std::size_t tokens) const {
        Packed p;
        p.tokens = tokens, p.n = 2 * tokens;
        std::size_t steps = 0;
        for (const Panel& panel : stream_.panels) {
            p.at.push_back(steps * p.n);
            steps += panel.steps();
        }
        p.x.resize(steps * p.n);  // zeros
        p.sum.assign(stream_.panels.size() * p.n, 0);
        for (std::size_t k = 0; k < stream_.panels.size(); ++k) {
            const Panel& panel = stream_.panels[k];
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::int16_t* from = x + t * stream_.columns + panel.column;
                Aligned* to = &p.x[p.at[k]] + 2 * t;
                std::int64_t* sum = &p.sum[k * p.n + 2 * t];
                for (std::size_t c = 0; c < panel.width; c += LANES, from += LANES, to += p.n) {
                    const int lanes = int(std::min(panel.width - c, std::size_t(LANES)));
                    int high_sum = 0, low_sum = 0;
                    for (int i = 0; i < lanes; ++i) {
                        const int high = (from[i] + 127 + 128 * BASE) / BASE - 128, low = from[i] - BASE * high;
                        to[0].lane[i] = std::int8_t(high), high_sum += high;
                        to[1].lane[i] = std::int8_t(low), low_sum += low;
                    }
                    sum[0] += high_sum, sum[1] += low_sum;
                }
            }
        }
        return p;
    }

    // Calls put(token, row, y) for every element of x N^T, from many threads.
    template <class Put>
    void run(const std::int16_t* x, std::size_t tokens, int threads, const Put& put) const {
        int most = 0;
        for (std::size_t i = 0; i < tokens * stream_.columns; ++i) most = std::max(most, std::abs(int(x[i])));
        if (most > LARGEST) throw std::invalid_argument("a factor is beyond 32512");
        const std::size_t workers = std::size_t(std::max(threads, 1));
        std::size_t parts = (blocks_ + SETS - 1) / SETS;
        parts = std::min(blocks_, (parts + workers - 1) / workers * workers);  // the same number for every thread
        for (std::size_t first = 0, n; first < tokens; first += n) {
            n = std::min(tokens - first, std::size_t(raw_ ? 1 : 2));
            const Packed packed = pack(x + first * stream_.columns, n);
            spread(parts, threads, [&](std::size_t i) {
                const std::size_t a = blocks_ * i / parts, b = blocks_ * (i + 1) / parts;
                multiply_blocks(packed, a, int(b - a),
                                [&](std::size_t token, std::size_t row, std::int64_t y) { put(first + token, row, y); });
            });
        }
    }

    // All panels of a few blocks of rows.
    template <class Put>
    void multiply_blocks(const Packed& p, std::size_t block, int count, const Put& put) const {
        const std::size_t n = p.n, height = stream_.block;
        std::vector<std::int32_t> sums(SETS * height * 2 * n);
        std::vector<std::int64_t> total(std::size_t(count) * height * n);  // (blocks, rows, n)
        for (std::size_t k = 0; k < stream_.panels.size(); ++k) {
            const Group group{k * blocks_ + block, count};
            const Table& table = stream_.table(stream_.segments[group.first]);
            const std::int64_t unit = std::int64_t(1) << table.shift;
            const Raw raw = !table.shift ? (raw_ ? Raw::joined : Raw::none)
                            : (table.last + 1) * unit - 1 <= MAX_JOINED ? Raw::joined : Raw::apart;
            Factors factors{p.x[p.at[k]].lane, int(n), raw, {}};
            for (int s = 0; s < count; ++s) factors.sums[s] = &sums[std::size_t(s) * height * 2 * n];
            OpenBatch open(stream_, group);
            if (!kernels().multiply(open.batch(), factors) || !open.complete()) corrupt();
            for (int s = 0; s < count; ++s) {
                const std::size_t segment = group.first + std::size_t(s), rows = stream_.segments[segment].rows;
                std::int64_t* to = &total[std::size_t(s) * height * n];
                const std::int32_t* from = factors.sums[s];
                for (std::size_t r = 0; r < rows; ++r) {
                    for (std::size_t i = 0; i < n; ++i) {
                        const std::int64_t codes =
                            raw == Raw::apart ? from[2 * r * n + i] * unit + from[(2 * r + 1) * n + i] : from[r * n + i];
                        to[r * n + i] += codes + table.low * unit * p.sum[k * n + i];
                    }
                }
                for (std::size_t e = first_[segment]; e < first_[segment + 1]; ++e) {
                    const Correction& c = corrections_[e];
                    for (std::size_t i = 0; i < n; ++i) to[c.row * n + i] += c.by * p.value(k, c.column, i);
                }
            }
        }
        for (int s = 0; s < count; ++s) {
            const Segment& segment = stream_.segments[block + std::size_t(s)];
            const std::int64_t* from = &total[std::size_t(s) * height * n];
            for (std::size_t r = 0; r < segment.rows; ++r, from += n) {
                for (std::size_t t = 0; t < p.tokens; ++t) {
                    put(t, segment.row + r, from[2 * t] * BASE + from[2 * t + 1]);
                }
            }
        }
    }

    Vector<std::uint8_t> blob_;
    Stream stream_;
    std::size_t blocks_ = 0;
    std::vector<Correction> corrections_;
    std::vector<std::size_t> first_;  // of each segment, in corrections_
    bool fits_ = true, raw_ = false;
};

}  // namespace

}  // namespace lowbit

void bind_product(nb::module_& m) {
    using lowbit::Product;
    nb::class_<Product>(m, "Product")
        .def(nb::init<lowbit::Vector<std::uint8_t>>(), nb::arg("stream"))
        .def_prop_ro("shape", &Product::shape)
        .def_prop_ro("fits", &Product::fits)
        .def_prop_ro("exceptions", &Product::exceptions_held)
        .def("multiply", &Product::multiply, nb::arg("x"), nb::arg("out"), nb::arg("threads"))
        .def("linear", &Product::linear, nb::arg("x"), nb::arg("order"), nb::arg("step"), nb::arg("gain"),
             nb::arg("out"), nb::arg("threads"));
}
