// One step in plain C++.
#pragma once

#include <cstring>

#include "decode.h"

namespace lowbit {

namespace {

inline std::uint64_t load64(const std::uint8_t* p) {
    std::uint64_t word;
    std::memcpy(&word, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

struct Lanes {
    struct Symbols {
        std::uint8_t lane[LANES];
    };

    struct Codebook {
        struct Entry { std::uint8_t symbol, base, bits, mask; } entry[STATES];
        explicit Codebook(const Table& t) {
            for (int i = 0; i < STATES; ++i) {
                entry[i] = {t.symbol[i], t.base[i], t.bits[i], std::uint8_t((1 << t.bits[i]) - 1)};
            }
        }
    };

    struct State {
        std::uint8_t state[LANES];
        std::uint64_t at[STREAMS];
        const std::uint8_t* bytes;
        void load(const Cursor& c) {
            std::memcpy(state, c.state, sizeof state);
            std::memcpy(at, c.at, sizeof at);
            bytes = c.bytes;
        }
        void save(Cursor& c) const {
            std::memcpy(c.state, state, sizeof state);
            std::memcpy(c.at, at, sizeof at);
        }
    };

    static Symbols step(const Codebook& codebook, State& s) {
        Symbols out;
        for (int i = 0; i < STREAMS; ++i) {
            std::uint64_t word = load64(s.bytes + (s.at[i] >> 3)) >> (s.at[i] & 7);
            std::uint64_t read = 0;
            for (int j = 0; j < LANES / STREAMS; ++j) {
                std::uint8_t& state = s.state[i * 8 + j];
                const typename Codebook::Entry e = codebook.entry[state];
                out.lane[i * 8 + j] = e.symbol;
                state = std::uint8_t(e.base + (word & e.mask));
                word >>= e.bits;
                read += e.bits;
            }
            s.at[i] += read;
        }
        return out;
    }

    template <class T>
    static void put(T* to, const Symbols& symbols, int low, int shift, const std::uint8_t* planes) {
        if (shift == 0) {
            for (int i = 0; i < LANES; ++i) to[i] = T(symbols.lane[i] + low);
            return;
        }
        int code[LANES];
        for (int i = 0; i < LANES; ++i) code[i] = (symbols.lane[i] + low) * (1 << shift);
        for (int j = 0; j < shift; ++j) {
            const std::uint64_t plane = load64(planes + 8 * j);
            for (int i = 0; i < LANES; ++i) code[i] |= int(plane >> i & 1) << j;
        }
        for (int i = 0; i < LANES; ++i) to[i] = T(code[i]);
    }
};

}  // namespace

}  // namespace lowbit
