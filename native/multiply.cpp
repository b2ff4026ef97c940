// Decoding and multiplying in one pass, compiled once for each processor (LOWBIT_ISA names it): the symbols of a step
// go from the register that they were decoded in into dot products, and only a row's sums reach memory.
#include "kernels.h"
#include LOWBIT_LANES

#include "multiply_dot.h"

namespace lowbit {

namespace {

template <int N, Raw RAW, bool VNNI>
struct Multiply {
    static constexpr int SUMS = RAW == Raw::apart ? 2 * N : N;
    const Batch& batch;
    const Factors& factors;
    const std::int8_t* const x;
    const int shift;
    Dot<VNNI> dot[SETS][SUMS];
    const std::uint8_t* raw[SETS];

    Multiply(const Batch& b, const Factors& f) : batch(b), factors(f), x(f.x), shift(b.table->shift) {}

    void begin(std::size_t row) {
#pragma GCC unroll 8
        for (int k = 0; k < SETS; ++k) {
#pragma GCC unroll 16
            for (int i = 0; i < SUMS; ++i) dot[k][i].clear();
        }
        if (RAW == Raw::none) return;
        for (int k = 0; k < batch.sets; ++k) raw[k] = batch.cursor[k].raw + row * batch.steps * std::size_t(shift) * 8;
    }

    void step(int set, std::size_t step, Lanes::Symbols symbols) {
        const std::int8_t* const factor = x + step * N * LANES;
        if (RAW == Raw::none) {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) dot[set][i].add(symbols, factor + i * LANES);
            return;
        }
        const std::uint8_t* planes = raw[set] + step * std::size_t(shift) * 8;
        alignas(64) std::int8_t bytes[LANES];
        Lanes::put(bytes, RAW == Raw::joined ? symbols : Lanes::Symbols{}, 0, shift, planes);
        const Lanes::Symbols low = symbols_at(bytes);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            if (RAW == Raw::apart) dot[set][i].add(symbols, factor + i * LANES);
            dot[set][SUMS - N + i].add(low, factor + i * LANES);
        }
    }

    void end(std::size_t row) {
        const int sets = batch.together(row);
        for (int k = 0; k < sets; ++k) {
            for (int i = 0; i < SUMS; ++i) factors.sums[k][row * SUMS + std::size_t(i)] = dot[k][i].total();
        }
    }
};

// Flattened: called as a function, a step would load its tables and store its sums every time.
template <int N, Raw RAW>
__attribute__((flatten)) bool run(Batch& batch, const Factors& factors) {
#if defined(LOWBIT_VNNI_VARIES)
    if (!has_vnni()) {
        Multiply<N, RAW, false> consumer(batch, factors);
        return decode<Lanes>(batch, consumer);
    }
#endif
    Multiply<N, RAW, true> consumer(batch, factors);
    return decode<Lanes>(batch, consumer);
}

}  // namespace

namespace LOWBIT_ISA {

bool multiply(Batch& batch, const Factors& factors) {
    switch (factors.raw) {
        case Raw::joined: return run<2, Raw::joined>(batch, factors);
        case Raw::apart: return run<2, Raw::apart>(batch, factors);
        case Raw::none: break;
    }
    return factors.n == 2 ? run<2, Raw::none>(batch, factors) : run<4, Raw::none>(batch, factors);
}

}  // namespace LOWBIT_ISA

}  // namespace lowbit
