// 16 columns of a packed row at once: their codes, and floats. Codes of up to four bits may carry higher bits that are
// of no meaning: look_up() and whole() ignore them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "packed.h"

namespace lowbit {

namespace {

#if defined(__AVX512BW__)

constexpr int ROWS = 4, TOKENS = 8;  // multiplied together: as many as there are registers for

struct Floats {
    __m512 v;
    static Floats all(float x) { return {_mm512_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Floats half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
    static Floats bfloat(const void* p) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    Floats first(int n) const { return {_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }
    friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
    void add_product(Floats a, Floats b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
};

using Codes = __m512i;

// Of four-bit codes, lanes 0, 2, 4, ... have columns 0 to 7, the others 8 to 15: one word spread over all lanes costs
// no instruction, two words in halves would. Inputs enter that order; others than products leave it.
template <int BITS>
inline Codes codes_at(const std::uint8_t* p) {
    if (BITS == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if (BITS == 4) {
        long long word;
        std::memcpy(&word, p, 8);
        const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        return _mm512_srlv_epi32(_mm512_set1_epi64(word), shift);
    }
    if (BITS < 3) {
        int word;
        std::memcpy(&word, p, 4);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_srlv_epi32(_mm512_set1_epi32(word), BITS == 1 ? lane : _mm512_add_epi32(lane, lane));
    }
    alignas(64) std::uint8_t byte[64];
    alignas(64) std::int32_t shift[16];
    for (int i = 0; i < 16; ++i) {  // constants to the compiler
        for (int k = 0; k < 4; ++k) byte[4 * i + k] = std::uint8_t(i * BITS / 8 + k);
        shift[i] = i * BITS % 8;
    }
    const __m512i row = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(row, _mm512_load_si512(byte)), _mm512_load_si512(shift));
}

template <int BITS>
inline Floats whole(Codes c) {
    return {_mm512_cvtepi32_ps(BITS == 8 ? c : _mm512_and_si512(c, _mm512_set1_epi32((1 << BITS) - 1)))};
}

inline Floats look_up(Codes c, Floats table) { return {_mm512_permutexvar_ps(c, table.v)}; }

template <int BITS>
inline Floats gather(Codes c, const float* table) {
    const __m512i at = BITS == 8 ? c : _mm512_and_si512(c, _mm512_set1_epi32((1 << BITS) - 1));
    return {_mm512_i32gather_ps(at, table, 4)};
}

template <int BITS>
inline Floats entered(Floats f) {
    if (BITS != 4) return f;
    const __m512i from = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return {_mm512_permutexvar_ps(from, f.v)};
}

template <int BITS>
inline Floats ordered(Floats f) {
    if (BITS != 4) return f;
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return {_mm512_permutexvar_ps(from, f.v)};
}

#elif defined(__AVX2__)

constexpr int ROWS = 2, TOKENS = 2;

struct Floats {
    __m256 a, b;
    static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Floats load(const float* p, int n) {
        float whole[CHUNK] = {};
        std::memcpy(whole, p, std::size_t(n) * sizeof(float));
        return load(whole);
    }
    static Floats half(const void* p) {
        const __m128i* h = static_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
    }
    static __m256 eight(const __m128i* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
    }
    static Floats bfloat(const void* p) {
        const __m128i* h = static_cast<const __m128i*>(p);
        return {eight(h), eight(h + 1)};
    }
    void store(float* p) const { _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b); }
    Floats first(int n) const {
        float lanes[CHUNK];
        store(lanes);
        return load(lanes, n);
    }
    float sum() const {
        const __m256 s = _mm256_add_ps(a, b);
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }
    friend Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    friend Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    friend Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    void add_product(Floats x, Floats y) { a = _mm256_fmadd_ps(x.a, y.a, a), b = _mm256_fmadd_ps(x.b, y.b, b); }
};

struct Codes {
    __m256i a, b;
};

template <int BITS>
inline __m256i eight_at(const std::uint8_t* p) {
    if (BITS == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if (BITS <= 4) {
        int word;
        std::memcpy(&word, p, 4);
        return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_mullo_epi32(lane, _mm256_set1_epi32(BITS)));
    }
    alignas(32) std::uint8_t byte[32];
    alignas(32) std::int32_t shift[8];
    for (int i = 0; i < 8; ++i) {  // constants to the compiler
        for (int k = 0; k < 4; ++k) byte[4 * i + k] = std::uint8_t(i * BITS / 8 + k);
        shift[i] = i * BITS % 8;
    }
    const __m256i row = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i at = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(row, at), _mm256_load_si256(reinterpret_cast<const __m256i*>(shift)));
}

template <int BITS>
inline Codes codes_at(const std::uint8_t* p) { return {eight_at<BITS>(p), eight_at<BITS>(p + BITS)}; }

template <int BITS>
inline Codes masked(Codes c) {
    const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
    return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
}

template <int BITS>
inline Floats whole(Codes c) {
    c = masked<BITS>(c);
    return {_mm256_cvtepi32_ps(c.a), _mm256_cvtepi32_ps(c.b)};
}

inline __m256 eight_of(__m256i c, Floats table) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28));  // its sign chooses the half
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, c), _mm256_permutevar8x32_ps(table.b, c), upper);
}

inline Floats look_up(Codes c, Floats table) { return {eight_of(c.a, table), eight_of(c.b, table)}; }

template <int BITS>
inline Floats gather(Codes c, const float* table) {
    c = masked<BITS>(c);
    return {_mm256_i32gather_ps(table, c.a, 4), _mm256_i32gather_ps(table, c.b, 4)};
}

template <int BITS>
inline Floats entered(Floats f) { return f; }

template <int BITS>
inline Floats ordered(Floats f) { return f; }

#else

constexpr int ROWS = 1, TOKENS = 1;

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest < 0x0400u) {  // a multiple of 2^-24
        const float small = float(rest) * 5.9604644775390625e-8f;
        return sign ? -small : small;
    }
    const std::uint32_t bits = sign | (rest >= 0x7C00u ? 0x7F800000u | (rest & 0x3FFu) << 13 : (rest << 13) + 0x38000000u);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

struct Floats {
    float lane[CHUNK];
    template <class F>
    static Floats of(F f) {
        Floats out;
        for (int i = 0; i < CHUNK; ++i) out.lane[i] = f(i);
        return out;
    }
    static Floats all(float x) { return of([=](int) { return x; }); }
    static Floats load(const float* p) { return of([=](int i) { return p[i]; }); }
    static Floats load(const float* p, int n) { return of([=](int i) { return i < n ? p[i] : 0.0f; }); }
    static Floats half(const void* p) {
        std::uint16_t h[CHUNK];
        std::memcpy(h, p, sizeof h);
        return of([&](int i) { return half_to_float(h[i]); });
    }
    static Floats bfloat(const void* p) {
        std::uint16_t h[CHUNK];
        std::memcpy(h, p, sizeof h);
        return of([&](int i) {
            const std::uint32_t bits = std::uint32_t(h[i]) << 16;
            float out;
            std::memcpy(&out, &bits, 4);
            return out;
        });
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
    Floats first(int n) const { return load(lane, n); }
    float sum() const {
        float s[CHUNK];
        store(s);
        for (int n = CHUNK / 2; n; n /= 2) {
            for (int i = 0; i < n; ++i) s[i] += s[i + n];
        }
        return s[0];
    }
    friend Floats operator+(const Floats& x, const Floats& y) { return of([&](int i) { return x.lane[i] + y.lane[i]; }); }
    friend Floats operator-(const Floats& x, const Floats& y) { return of([&](int i) { return x.lane[i] - y.lane[i]; }); }
    friend Floats operator*(const Floats& x, const Floats& y) { return of([&](int i) { return x.lane[i] * y.lane[i]; }); }
    void add_product(const Floats& x, const Floats& y) {
        for (int i = 0; i < CHUNK; ++i) lane[i] += x.lane[i] * y.lane[i];
    }
};

struct Codes {
    std::uint8_t lane[CHUNK];
};

template <int BITS>
inline Codes codes_at(const std::uint8_t* p) {
    Codes out;
    for (int half = 0; half < 2; ++half) {
        std::uint64_t word = 0;
        for (int k = 0; k < BITS; ++k) word |= std::uint64_t(p[half * BITS + k]) << (8 * k);
        for (int i = 0; i < 8; ++i) out.lane[8 * half + i] = std::uint8_t(word >> (i * BITS) & ((1 << BITS) - 1));
    }
    return out;
}

template <int BITS>
inline Floats whole(const Codes& c) { return Floats::of([&](int i) { return float(c.lane[i]); }); }

inline Floats look_up(const Codes& c, const Floats& table) { return Floats::of([&](int i) { return table.lane[c.lane[i]]; }); }

template <int BITS>
inline Floats gather(const Codes& c, const float* table) { return Floats::of([&](int i) { return table[c.lane[i]]; }); }

template <int BITS>
inline Floats entered(const Floats& f) { return f; }

template <int BITS>
inline Floats ordered(const Floats& f) { return f; }

#endif

}  // namespace

}  // namespace lowbit
