// Symbols to codes in memory, with AVX-512BW.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lowbit {

namespace {

inline std::uint64_t plane_at(const std::uint8_t* planes, int j) {
    std::uint64_t plane;
    std::memcpy(&plane, planes + 8 * j, 8);
    return plane;
}

// code = 2 * code + bit, from the highest plane down.
inline void put_codes(std::int8_t* to, __m512i symbols, int low, int shift, const std::uint8_t* planes) {
    __m512i code = _mm512_add_epi8(symbols, _mm512_set1_epi8(char(low)));
    for (int j = shift - 1; j >= 0; --j) {
        code = _mm512_add_epi8(code, code);
        code = _mm512_mask_add_epi8(code, plane_at(planes, j), code, _mm512_set1_epi8(1));
    }
    _mm512_storeu_si512(to, code);
}

inline void put_codes(std::int16_t* to, __m512i symbols, int low, int shift, const std::uint8_t* planes) {
    const __m512i one = _mm512_set1_epi16(1), first = _mm512_set1_epi16(short(low));
    __m512i a = _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(symbols)), first);
    __m512i b = _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(symbols, 1)), first);
    for (int j = shift - 1; j >= 0; --j) {
        const std::uint64_t plane = plane_at(planes, j);
        a = _mm512_add_epi16(a, a);
        b = _mm512_add_epi16(b, b);
        a = _mm512_mask_add_epi16(a, std::uint32_t(plane), a, one);
        b = _mm512_mask_add_epi16(b, std::uint32_t(plane >> 32), b, one);
    }
    _mm512_storeu_si512(to, a);
    _mm512_storeu_si512(to + 32, b);
}

}  // namespace

}  // namespace lowbit
