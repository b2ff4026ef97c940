// One step with AVX-512 VBMI: 64 lanes are the bytes of a register, and eight of them, a qword, share a stream. A sum
// over each qword tells where each lane's field begins, and one instruction cuts all 64 of them out.
#pragma once

#include "avx512_put.h"
#include "decode.h"

namespace lowbit {

namespace {

struct Lanes {
    using Symbols = __m512i;

    struct Codebook {
        __m512i symbol[2], base[2], bits[2], masks;
        explicit Codebook(const Table& t) {
            for (int i = 0; i < 2; ++i) {
                symbol[i] = _mm512_loadu_si512(t.symbol + 64 * i);
                base[i] = _mm512_loadu_si512(t.base + 64 * i);
                bits[i] = _mm512_loadu_si512(t.bits + 64 * i);
            }
            masks = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, 0, 0, 0, 0, 0, 0, 0, 0));
        }
    };

    struct State {
        __m512i state, at;
        const std::uint8_t* bytes;
        void load(const Cursor& c) {
            state = _mm512_loadu_si512(c.state);
            at = _mm512_loadu_si512(c.at);
            bytes = c.bytes;
        }
        void save(Cursor& c) const {
            _mm512_storeu_si512(c.state, state);
            _mm512_storeu_si512(c.at, at);
        }
    };

    static Symbols step(const Codebook& c, State& s) {
        const __m512i symbol = _mm512_permutex2var_epi8(c.symbol[0], s.state, c.symbol[1]);
        const __m512i base = _mm512_permutex2var_epi8(c.base[0], s.state, c.base[1]);
        const __m512i bits = _mm512_permutex2var_epi8(c.bits[0], s.state, c.bits[1]);
        const __m512i mask = _mm512_shuffle_epi8(c.masks, bits);
#if defined(LOWBIT_SUM_BY_SHIFTS)
        __m512i sum = _mm512_add_epi8(bits, _mm512_slli_epi64(bits, 8));
        sum = _mm512_add_epi8(sum, _mm512_slli_epi64(sum, 16));
        sum = _mm512_add_epi8(sum, _mm512_slli_epi64(sum, 32));
#else
        const __m512i sum = _mm512_mullo_epi64(bits, _mm512_set1_epi64(0x0101010101010101));  // of lanes 0..i
#endif
        const __m512i begin = _mm512_slli_epi64(sum, 8);
        const __m512i near = _mm512_i64gather_epi64(_mm512_srli_epi64(s.at, 3), s.bytes, 1);
        const __m512i word = _mm512_srlv_epi64(near, _mm512_and_si512(s.at, _mm512_set1_epi64(7)));
        const __m512i field = _mm512_multishift_epi64_epi8(begin, word);
        s.state = _mm512_ternarylogic_epi64(base, field, mask, 0xF8);  // base | (field & mask)
        s.at = _mm512_add_epi64(s.at, _mm512_srli_epi64(sum, 56));
        return symbol;
    }

    template <class T>
    static void put(T* to, Symbols symbols, int low, int shift, const std::uint8_t* planes) {
        put_codes(to, symbols, low, shift, planes);
    }
};

}  // namespace

}  // namespace lowbit
