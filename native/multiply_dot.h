// A running dot product of 64 lanes of bytes in [0, 127] with signed bytes in [-127, 127], exact in 32 bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit {

namespace {

#if defined(__AVX512BW__)

// VPDPBUSD came after AVX-512BW and before VBMI: Skylake lacks it, Cascade Lake has it. It is spelled in assembly, so
// that one file compiled for AVX-512BW holds both.
#if !defined(__AVX512VBMI__)
#define LOWBIT_VNNI_VARIES
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
#endif

inline __m512i symbols_at(const std::int8_t* bytes) { return _mm512_load_si512(bytes); }

template <bool VNNI>
struct Dot {
    __m512i sum;
    void clear() { sum = _mm512_setzero_si512(); }
    void add(__m512i symbols, const std::int8_t* x) {
        if (VNNI) {
            asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(symbols), "m"(*reinterpret_cast<const __m512i*>(x)));
        } else {
            const __m512i pairs = _mm512_maddubs_epi16(symbols, _mm512_load_si512(x));
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
        }
    }
    std::int32_t total() const { return _mm512_reduce_add_epi32(sum); }
};

#elif defined(__AVX2__)

inline Lanes::Symbols symbols_at(const std::int8_t* bytes) {
    const __m256i* p = reinterpret_cast<const __m256i*>(bytes);
    return {{_mm256_load_si256(p), _mm256_load_si256(p + 1)}};
}

template <bool VNNI>
struct Dot {
    __m256i sum;
    void clear() { sum = _mm256_setzero_si256(); }
    void add(const Lanes::Symbols& symbols, const std::int8_t* x) {
        const __m256i* p = reinterpret_cast<const __m256i*>(x);
        const __m256i one = _mm256_set1_epi16(1);
        const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(symbols.half[0], _mm256_load_si256(p)), one);
        const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(symbols.half[1], _mm256_load_si256(p + 1)), one);
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
    }
    std::int32_t total() const {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
        return _mm_cvtsi128_si32(s);
    }
};

#else

inline Lanes::Symbols symbols_at(const std::int8_t* bytes) {
    Lanes::Symbols out;
    std::memcpy(&out, bytes, sizeof out);
    return out;
}

template <bool VNNI>
struct Dot {
    std::int32_t sum;
    void clear() { sum = 0; }
    void add(const Lanes::Symbols& symbols, const std::int8_t* x) {
        std::uint8_t lane[LANES];
        std::memcpy(lane, &symbols, sizeof lane);
        for (int i = 0; i < LANES; ++i) sum += int(lane[i]) * int(x[i]);
    }
    std::int32_t total() const { return sum; }
};

#endif

}  // namespace

}  // namespace lowbit
