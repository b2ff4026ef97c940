// Decoding to memory, compiled once for each processor (LOWBIT_ISA names it).
#include "kernels.h"
#include LOWBIT_LANES

#include <cstring>

namespace lowbit {

namespace {

template <class T>
struct Store {
    const Batch& batch;
    const Target& to;
    const int low, shift;
    T* row_of[SETS] = {};
    const std::uint8_t* raw[SETS] = {};

    Store(const Batch& b, const Target& t) : batch(b), to(t), low(b.table->low), shift(b.table->shift) {}

    void begin(std::size_t row) {
        for (int k = 0; k < batch.sets; ++k) {
            const std::ptrdiff_t r = to.row[k] + std::ptrdiff_t(row);
            const bool wanted = r >= 0 && r < std::ptrdiff_t(to.rows);
            row_of[k] = wanted ? static_cast<T*>(to.out) + std::size_t(r) * to.stride : nullptr;
            raw[k] = batch.cursor[k].raw + row * batch.steps * std::size_t(shift) * 8;
        }
    }

    void step(int set, std::size_t step, Lanes::Symbols symbols) {
        if (!row_of[set]) return;
        const std::uint8_t* planes = raw[set] + step * std::size_t(shift) * 8;
        const std::size_t column = step * LANES;
        if (column + LANES <= to.width) {
            Lanes::put(row_of[set] + column, symbols, low, shift, planes);
        } else {
            T whole[LANES];
            Lanes::put(whole, symbols, low, shift, planes);
            std::memcpy(row_of[set] + column, whole, (to.width - column) * sizeof(T));
        }
    }

    void end(std::size_t) {}
};

template <class T>
bool run(Batch& batch, const Target& to) {
    Store<T> consumer(batch, to);
    return decode<Lanes>(batch, consumer);
}

}  // namespace

namespace LOWBIT_ISA {

bool store(Batch& batch, const Target& to) {
    return to.wide ? run<std::int16_t>(batch, to) : run<std::int8_t>(batch, to);
}

}  // namespace LOWBIT_ISA

}  // namespace lowbit
