// Products of one input with several packed weights, for whoever has them from Python.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <vector>

#include "packed.h"

namespace lowbit {

// x W^T + bias for each weight, in one parallel region: for each a block (tokens, rows) of y. Every output is summed in
// the same order whatever the tokens, the threads and the other weights are.
struct Products {
    struct Factor {
        const PackedWeight* w;
        const float* bias;  // or null
    };
    std::vector<Factor> factors;
    std::size_t tokens;

    // `biases` are addresses, or 0. Throws std::invalid_argument where so many inputs and outputs are no such products.
    Products(nanobind::tuple weights, nanobind::tuple biases, std::size_t inputs, std::size_t outputs);

    void run(const float* x, float* y, int threads) const;  // wants no GIL
};

}  // namespace lowbit
