// One step with AVX-512BW and BMI2, for processors without VBMI: as lanes_avx2.h does it, 64 lanes to a register.
#pragma once

#include "avx512_put.h"
#include "decode.h"

namespace lowbit {

namespace {

struct Lanes {
    using Symbols = __m512i;

    // See lanes_avx2.h for the mark and for parts as differences.
    struct Codebook {
        __m512i symbol[STATES / 16], mark[STATES / 16];
        explicit Codebook(const Table& t) {
            alignas(16) std::uint8_t symbols[STATES], marks[STATES];
            for (int i = 0; i < STATES; ++i) {
                symbols[i] = t.symbol[i];
                marks[i] = std::uint8_t(2 * t.base[i] + (1 << t.bits[i]));
            }
            for (int i = STATES - 1; i >= 16; --i) symbols[i] ^= symbols[i - 16], marks[i] ^= marks[i - 16];
            for (int k = 0; k < STATES / 16; ++k) {
                symbol[k] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(symbols) + k));
                mark[k] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(marks) + k));
            }
        }
    };

    struct State {
        __m512i state;
        std::uint64_t at[STREAMS];
        const std::uint8_t* bytes;
        void load(const Cursor& c) {
            state = _mm512_loadu_si512(c.state);
            std::memcpy(at, c.at, sizeof at);
            bytes = c.bytes;
        }
        void save(Cursor& c) const {
            _mm512_storeu_si512(c.state, state);
            std::memcpy(c.at, at, sizeof at);
        }
    };

    static long long read(State& s, int stream, std::uint64_t mask) {
        std::uint64_t word;
        std::memcpy(&word, s.bytes + (s.at[stream] >> 3), 8);
        word >>= s.at[stream] & 7;
        s.at[stream] += std::uint64_t(_mm_popcnt_u64(mask));
        return (long long)(_pdep_u64(word, mask));
    }

    static Symbols step(const Codebook& c, State& s) {
        __m512i index = s.state;
        __m512i symbol = _mm512_shuffle_epi8(c.symbol[0], index);
        __m512i mark = _mm512_shuffle_epi8(c.mark[0], index);
#pragma GCC unroll 8
        for (int k = 1; k < STATES / 16; ++k) {
            index = _mm512_sub_epi8(index, _mm512_set1_epi8(16));
            symbol = _mm512_xor_si512(symbol, _mm512_shuffle_epi8(c.symbol[k], index));
            mark = _mm512_xor_si512(mark, _mm512_shuffle_epi8(c.mark[k], index));
        }
        const __m512i less = _mm512_sub_epi8(mark, _mm512_set1_epi8(1));
        const __m512i base = _mm512_srli_epi16(_mm512_and_si512(mark, less), 1);
        alignas(64) std::uint64_t mask[STREAMS];
        _mm512_store_si512(mask, _mm512_andnot_si512(mark, less));
        const __m512i bits = _mm512_set_epi64(read(s, 7, mask[7]), read(s, 6, mask[6]), read(s, 5, mask[5]),
                                              read(s, 4, mask[4]), read(s, 3, mask[3]), read(s, 2, mask[2]),
                                              read(s, 1, mask[1]), read(s, 0, mask[0]));
        s.state = _mm512_ternarylogic_epi64(base, _mm512_set1_epi8(127), bits, 0xEA);  // (base & 127) | bits
        return symbol;
    }

    template <class T>
    static void put(T* to, Symbols symbols, int low, int shift, const std::uint8_t* planes) {
        put_codes(to, symbols, low, shift, planes);
    }
};

}  // namespace

}  // namespace lowbit
