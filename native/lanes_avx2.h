// One step with AVX2 and BMI2. A table of 128 bytes is looked up in eight parts of 16; `pdep` spreads the next bits of
// a stream over its eight lanes, as many to each as its mask has, and `popcnt` tells how many those were.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "decode.h"

namespace lowbit {

namespace {

struct Lanes {
    struct Symbols {
        __m256i half[2];
    };

    // For each state its symbol, and its base and mask in one byte: 2 * base has more than `bits` low zeros, of which
    // the top one is set as a mark. The mark alone gives the mask, the rest the base.
    //
    // Part k holds the difference (xor) to part k - 1. A shuffle gives zero for a negative index, so an index that is
    // lowered by 16 from part to part collects exactly the differences up to its own part.
    struct Codebook {
        alignas(16) std::uint8_t symbol[STATES], mark[STATES];
        explicit Codebook(const Table& t) {
            for (int i = 0; i < STATES; ++i) {
                symbol[i] = t.symbol[i];
                mark[i] = std::uint8_t(2 * t.base[i] + (1 << t.bits[i]));
            }
            for (int i = STATES - 1; i >= 16; --i) symbol[i] ^= symbol[i - 16], mark[i] ^= mark[i - 16];
        }
    };

    struct State {
        __m256i state[2];
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

    static std::uint64_t read(State& s, int stream, std::uint64_t mask) {
        std::uint64_t word;
        std::memcpy(&word, s.bytes + (s.at[stream] >> 3), 8);
        word >>= s.at[stream] & 7;
        s.at[stream] += std::uint64_t(_mm_popcnt_u64(mask));
        return _pdep_u64(word, mask);
    }

    static __m256i part(const std::uint8_t* table, int k) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table) + k));
    }

    static Symbols step(const Codebook& codebook, State& s) {
        Symbols out;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            __m256i index = s.state[h];
            __m256i symbol = _mm256_shuffle_epi8(part(codebook.symbol, 0), index);
            __m256i mark = _mm256_shuffle_epi8(part(codebook.mark, 0), index);
#pragma GCC unroll 8
            for (int k = 1; k < STATES / 16; ++k) {
                index = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
                symbol = _mm256_xor_si256(symbol, _mm256_shuffle_epi8(part(codebook.symbol, k), index));
                mark = _mm256_xor_si256(mark, _mm256_shuffle_epi8(part(codebook.mark, k), index));
            }
            out.half[h] = symbol;
            const __m256i less = _mm256_sub_epi8(mark, _mm256_set1_epi8(1));
            const __m256i mask = _mm256_andnot_si256(mark, less);
            const __m256i base = _mm256_and_si256(_mm256_srli_epi16(_mm256_and_si256(mark, less), 1), _mm256_set1_epi8(127));
            const __m128i low = _mm256_castsi256_si128(mask), high = _mm256_extracti128_si256(mask, 1);
            const std::uint64_t a = read(s, 4 * h, std::uint64_t(_mm_cvtsi128_si64(low)));
            const std::uint64_t b = read(s, 4 * h + 1, std::uint64_t(_mm_extract_epi64(low, 1)));
            const std::uint64_t c = read(s, 4 * h + 2, std::uint64_t(_mm_cvtsi128_si64(high)));
            const std::uint64_t d = read(s, 4 * h + 3, std::uint64_t(_mm_extract_epi64(high, 1)));
            const __m256i bits = _mm256_set_epi64x((long long)d, (long long)c, (long long)b, (long long)a);
            s.state[h] = _mm256_or_si256(base, bits);
        }
        return out;
    }

    // Bytes 255 where a plane's bit is set, for the 32 lanes of a half.
    static __m256i lanes_of(const std::uint8_t* plane, int half) {
        std::int32_t bits;
        std::memcpy(&bits, plane + 4 * half, 4);
        const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
        return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    }

    static void put(std::int8_t* to, const Symbols& symbols, int low, int shift, const std::uint8_t* planes) {
        for (int h = 0; h < 2; ++h) {
            __m256i code = _mm256_add_epi8(symbols.half[h], _mm256_set1_epi8(char(low)));
            for (int j = shift - 1; j >= 0; --j) {  // code = 2 * code + bit, from the highest plane down
                code = _mm256_sub_epi8(_mm256_add_epi8(code, code), lanes_of(planes + 8 * j, h));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + h, code);
        }
    }

    static void put(std::int16_t* to, const Symbols& symbols, int low, int shift, const std::uint8_t* planes) {
        for (int h = 0; h < 2; ++h) {
            __m256i a = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(symbols.half[h]));
            __m256i b = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(symbols.half[h], 1));
            a = _mm256_add_epi16(a, _mm256_set1_epi16(short(low)));
            b = _mm256_add_epi16(b, _mm256_set1_epi16(short(low)));
            for (int j = shift - 1; j >= 0; --j) {
                const __m256i set = lanes_of(planes + 8 * j, h);
                a = _mm256_sub_epi16(_mm256_add_epi16(a, a), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(set)));
                b = _mm256_sub_epi16(_mm256_add_epi16(b, b), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(set, 1)));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 2 * h, a);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 2 * h + 1, b);
        }
    }
};

}  // namespace

}  // namespace lowbit
