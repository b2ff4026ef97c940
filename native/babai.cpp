// A block of columns rounded to whole numbers, each making up for the errors of those before it among them
// (lowbit.methods.columns.lattice). Rows are independent: a run of them stays in the cache for the whole block.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "parallel.h"

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

namespace {

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Factor = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Steps = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kRun = 128;  // rows at a time: a block of 32 columns of them is 16 KiB
constexpr float kTop = 32767.0f;

// Columns lie one after another, `rows` floats each: aims[j], errors[j] (the weights, before), numbers[j].
WIDEST void round_run(float* aims, float* errors, int16_t* numbers, size_t rows, size_t count, const float* factor,
                      size_t columns, const float* steps, size_t start, size_t stop) {
    for (size_t j = start; j < stop; ++j) {
        float* aim = aims + j * rows;
        float* error = errors + j * rows;
        int16_t* number = numbers + j * rows;
        for (size_t i = start; i < j; ++i) {
            const float f = factor[j * columns + i];
            const float* before = errors + i * rows;
            for (size_t r = 0; r < count; ++r) aim[r] += f * before[r];
        }
        const float step = steps[j];
        for (size_t r = 0; r < count; ++r) {
            const float value = std::nearbyint(std::min(std::max(aim[r] / step, -kTop), kTop));
            number[r] = int16_t(value);
            error[r] -= value * step;
        }
    }
}

void round_block(Matrix aims, Matrix errors, Numbers numbers, Factor factor, Steps steps, size_t start, size_t stop,
                 int threads) {
    const size_t columns = aims.shape(0), rows = aims.shape(1);
    const bool fits = errors.shape(0) == columns && errors.shape(1) == rows && numbers.shape(0) == columns &&
                      numbers.shape(1) == rows && factor.shape(0) == columns && factor.shape(1) == columns &&
                      steps.shape(0) == columns && start <= stop && stop <= columns;
    if (!fits) throw std::invalid_argument("sizes disagree");
    float *a = aims.data(), *e = errors.data();
    int16_t* n = numbers.data();
    const float *f = factor.data(), *s = steps.data();
    nb::gil_scoped_release free;
    lowbit::parallel((rows + kRun - 1) / kRun, threads, [&](size_t run) {
        const size_t first = run * kRun, count = std::min(kRun, rows - first);
        round_run(a + first, e + first, n + first, rows, count, f, columns, s, start, stop);
    });
}

}  // namespace

void bind_babai(nb::module_& m) {
    m.def("round_block", &round_block, nb::arg("aims"), nb::arg("errors"), nb::arg("numbers"), nb::arg("factor"),
          nb::arg("steps"), nb::arg("start"), nb::arg("stop"), nb::arg("threads"));
}
