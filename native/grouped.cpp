// Weights in few bits, multiplied where they lie: a row is unpacked a group at a time, never as a whole matrix.
//
// A row is a little-endian stream of `bits`-bit codes (1-8, as lowbit.formats.pack lays them out). A weight is
// (table[code] - zero) * scale in float32, in this order of operations, so that it is the very number that the
// plain decode in Python gives; only the order of the sum differs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif
#define INLINE __attribute__((always_inline)) inline  // into every clone, so that it is compiled for its processor

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kRun = 64;  // codes unpacked at a time: whole bytes of any width

struct Weight {
    const uint8_t* codes;
    size_t row_bytes;
    size_t columns;
    unsigned bits;
    size_t group;
    const float* scale;  // (rows, groups)
    const float* zero;   // the same, or null
    float table[256];
    bool integers;  // table[c] = c - origin
    float origin;
    size_t groups() const { return (columns + group - 1) / group; }
};

INLINE void unpack(const uint8_t* bytes, unsigned bits, uint8_t* codes) {
    if (bits == 4) {
        for (size_t i = 0; i < kRun / 2; ++i) {
            codes[2 * i] = bytes[i] & 15;
            codes[2 * i + 1] = bytes[i] >> 4;
        }
    } else if (bits == 8) {
        std::memcpy(codes, bytes, kRun);
    } else {
        const uint64_t mask = (1u << bits) - 1;
        for (size_t i = 0; i < kRun / 8; ++i) {
            uint64_t word;
            std::memcpy(&word, bytes + i * bits, 8);
            for (unsigned k = 0; k < 8; ++k) codes[8 * i + k] = static_cast<uint8_t>((word >> (k * bits)) & mask);
        }
    }
}

// Columns [start, start + n) of a row, n <= kRun and within one group.
INLINE void decode_run(const Weight& w, size_t row, size_t start, const uint8_t* codes, size_t n, float* to) {
    size_t at = row * w.groups() + start / w.group;
    const float scale = w.scale[at], zero = w.zero ? w.zero[at] : 0.0f;
    if (w.integers) {
        const float origin = w.zero ? zero : w.origin;
        for (size_t j = 0; j < n; ++j) to[j] = (static_cast<float>(codes[j]) - origin) * scale;
    } else if (w.zero) {
        for (size_t j = 0; j < n; ++j) to[j] = (w.table[codes[j]] - zero) * scale;
    } else {
        for (size_t j = 0; j < n; ++j) to[j] = w.table[codes[j]] * scale;
    }
}

// A whole row: runs of 64 codes, each in pieces that end where a group ends.
INLINE void decode_row(const Weight& w, size_t row, float* to) {
    uint8_t codes[kRun];
    const uint8_t* from = w.codes + row * w.row_bytes;
    for (size_t start = 0; start < w.columns; start += kRun) {
        size_t first = start * w.bits / 8, left = w.row_bytes - first;
        if (left >= kRun * w.bits / 8 + 8) {
            unpack(from + first, w.bits, codes);
        } else {  // words are read whole: the end of a row from a copy
            uint8_t end[kRun + 8] = {};
            std::memcpy(end, from + first, std::min(left, kRun * w.bits / 8));
            unpack(end, w.bits, codes);
        }
        size_t end = std::min(start + kRun, w.columns);
        for (size_t at = start; at < end;) {
            size_t stop = std::min(end, (at / w.group + 1) * w.group);
            if (stop - at == kRun)
                decode_run(w, row, at, codes, kRun, to + at);
            else
                decode_run(w, row, at, codes + (at - start), stop - at, to + at);
            at = stop;
        }
    }
}

INLINE float dot(const float* a, const float* b, size_t n) {
    float lanes[32] = {};
    size_t j = 0;
    for (; j + 32 <= n; j += 32)
        for (size_t k = 0; k < 32; ++k) lanes[k] += a[j + k] * b[j + k];
    float sum = 0;
    for (float lane : lanes) sum += lane;
    for (; j < n; ++j) sum += a[j] * b[j];
    return sum;
}

WIDEST void decode_rows(const Weight& w, size_t first, size_t last, float* to) {
    for (size_t row = first; row < last; ++row) decode_row(w, row, to + row * w.columns);
}

WIDEST void multiply_rows(const Weight& w, size_t first, size_t last, const float* x, size_t tokens, size_t rows,
                          float* y, float* scratch) {
    for (size_t row = first; row < last; ++row) {
        decode_row(w, row, scratch);
        for (size_t t = 0; t < tokens; ++t) y[t * rows + row] = dot(scratch, x + t * w.columns, w.columns);
    }
}

// Four bits in groups of a multiple of 32 take a shorter way. A byte holds an even column and the odd one after it, so
// inputs come as their even and odd columns; (table - zero) * scale is 16 numbers a group, looked up by a permutation.
struct Halves {
    std::vector<float> values;  // of each token: all even columns, then all odd ones
    size_t columns;
    Halves(const float* x, size_t tokens, size_t n) : values(tokens * n), columns(n) {
        for (size_t t = 0; t < tokens; ++t)
            for (size_t j = 0; j < n; ++j) values[t * n + (j & 1) * (n / 2) + j / 2] = x[t * n + j];
    }
    const float* even(size_t t) const { return values.data() + t * columns; }
    const float* odd(size_t t) const { return even(t) + columns / 2; }
};

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes the undefined operands in its intrinsics for ours
template <int T>
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))) void nibbles_avx512(const Weight& w, size_t row,
                                                                                   const Halves& x, size_t t, size_t rows,
                                                                                   float* y) {
    __m512 sum[T];
    for (int k = 0; k < T; ++k) sum[k] = _mm512_setzero_ps();
    const __m512 table = _mm512_loadu_ps(w.table);
    const uint8_t* from = w.codes + row * w.row_bytes;
    size_t at = row * w.groups();
    for (size_t j = 0; j < w.columns / 2; ++at) {
        __m512 values = w.zero ? _mm512_sub_ps(table, _mm512_set1_ps(w.zero[at])) : table;
        values = _mm512_mul_ps(values, _mm512_set1_ps(w.scale[at]));
        for (size_t end = j + w.group / 2; j < end; j += 16) {
            __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
            __m512 even = _mm512_permutexvar_ps(pair, values);  // reads the lower four bits of an index
            __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), values);
            for (int k = 0; k < T; ++k) {
                sum[k] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x.even(t + k) + j), sum[k]);
                sum[k] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x.odd(t + k) + j), sum[k]);
            }
        }
    }
    for (int k = 0; k < T; ++k) y[(t + k) * rows + row] = _mm512_reduce_add_ps(sum[k]);
}

template <int T>
__attribute__((target("avx2,fma"))) void nibbles_avx2(const Weight& w, size_t row, const Halves& x, size_t t,
                                                      size_t rows, float* y) {
    __m256 sum[T];
    for (int k = 0; k < T; ++k) sum[k] = _mm256_setzero_ps();
    const __m256 lower = _mm256_loadu_ps(w.table), upper = _mm256_loadu_ps(w.table + 8);
    const uint8_t* from = w.codes + row * w.row_bytes;
    size_t at = row * w.groups();
    for (size_t j = 0; j < w.columns / 2; ++at) {
        const __m256 zero = _mm256_set1_ps(w.zero ? w.zero[at] : 0.0f), scale = _mm256_set1_ps(w.scale[at]);
        const __m256 low = _mm256_mul_ps(_mm256_sub_ps(lower, zero), scale);
        const __m256 high = _mm256_mul_ps(_mm256_sub_ps(upper, zero), scale);
        const auto look_up = [&](__m256i index) __attribute__((target("avx2,fma"), always_inline)) {
            __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign chooses the half
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), bit3);
        };
        for (size_t end = j + w.group / 2; j < end; j += 8) {
            __m256i pair = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + j)));
            __m256 even = look_up(pair), odd = look_up(_mm256_srli_epi32(pair, 4));
            for (int k = 0; k < T; ++k) {
                sum[k] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x.even(t + k) + j), sum[k]);
                sum[k] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x.odd(t + k) + j), sum[k]);
            }
        }
    }
    for (int k = 0; k < T; ++k) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, sum[k]);
        y[(t + k) * rows + row] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
                                  ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    }
}

#pragma GCC diagnostic pop

using Nibbles = void (*)(const Weight&, size_t, const Halves&, size_t, size_t, float*);
struct Way {
    Nibbles one, four;  // for one token and for four at once
};

// The widest that this processor runs, or nothing.
Way nibbles() {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return {nibbles_avx512<1>, nibbles_avx512<4>};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {nibbles_avx2<1>, nibbles_avx2<4>};
    return {nullptr, nullptr};
}
#else
struct Way {
    void (*one)(const Weight&, size_t, const Halves&, size_t, size_t, float*);
    decltype(one) four;
};
Way nibbles() { return {nullptr, nullptr}; }
#endif

Weight weight_of(const Bytes& codes, size_t columns, unsigned bits, size_t group, const Floats& scale,
                 const nb::object& zero, const Table& table) {
    size_t rows = codes.shape(0);
    if (bits < 1 || bits > 8 || group < 1 || codes.shape(1) != (columns * bits + 7) / 8)
        throw std::invalid_argument("codes are no packed matrix of these bits and columns");
    if (table.shape(0) < (size_t(1) << bits) || table.shape(0) > 256) throw std::invalid_argument("table too short");
    Weight w{codes.data(), codes.shape(1), columns, bits, group, scale.data(), nullptr, {}, true, 0.0f};
    if (scale.shape(0) != rows || scale.shape(1) != w.groups()) throw std::invalid_argument("a scale a group");
    if (!zero.is_none()) {
        auto z = nb::cast<Floats>(zero);
        if (z.shape(0) != rows || z.shape(1) != w.groups()) throw std::invalid_argument("a zero a group");
        w.zero = z.data();
    }
    std::memcpy(w.table, table.data(), table.shape(0) * sizeof(float));
    w.origin = -w.table[0];
    for (size_t c = 0; c < (size_t(1) << bits); ++c) w.integers &= w.table[c] == static_cast<float>(c) - w.origin;
    if (w.zero && w.origin != 0.0f) w.integers = false;
    return w;
}

// work(first, last) over pieces of the rows; small, so that a thread that was interrupted holds up little.
template <typename Work>
void share(size_t rows, int threads, Work work) {
    const size_t piece = std::max<size_t>(32, rows / 32);
    lowbit::parallel((rows + piece - 1) / piece, threads,
                     [&](size_t i) { work(i * piece, std::min(rows, (i + 1) * piece)); });
}

void decode(const Bytes& codes, size_t columns, unsigned bits, size_t group, const Floats& scale,
            const nb::object& zero, const Table& table, Out& out, int threads) {
    Weight w = weight_of(codes, columns, bits, group, scale, zero, table);
    if (out.shape(0) != codes.shape(0) || out.shape(1) != columns) throw std::invalid_argument("out is not (rows, columns)");
    float* to = out.data();
    size_t rows = codes.shape(0);
    nb::gil_scoped_release free;
    share(rows, threads, [&](size_t first, size_t last) { decode_rows(w, first, last, to); });
}

void multiply(const Floats& x, const Bytes& codes, size_t columns, unsigned bits, size_t group, const Floats& scale,
              const nb::object& zero, const Table& table, Out& y, int threads) {
    Weight w = weight_of(codes, columns, bits, group, scale, zero, table);
    size_t rows = codes.shape(0), tokens = x.shape(0);
    if (x.shape(1) != columns || y.shape(0) != tokens || y.shape(1) != rows)
        throw std::invalid_argument("x is (tokens, columns), y (tokens, rows)");
    const float* from = x.data();
    float* to = y.data();
    nb::gil_scoped_release free;
    const Way way = nibbles();
    if (way.one && bits == 4 && columns % 32 == 0 && (group % 32 == 0 && columns % group == 0)) {
        const Halves halves(from, tokens, columns);
        share(rows, threads, [&](size_t first, size_t last) {
            for (size_t row = first; row < last; ++row) {
                size_t t = 0;
                for (; t + 4 <= tokens; t += 4) way.four(w, row, halves, t, rows, to);
                for (; t < tokens; ++t) way.one(w, row, halves, t, rows, to);
            }
        });
        return;
    }
    share(rows, threads, [&](size_t first, size_t last) {
        std::vector<float> scratch(columns);
        multiply_rows(w, first, last, from, tokens, rows, to, scratch.data());
    });
}

}  // namespace

void bind_grouped(nb::module_& m) {
    m.def("grouped_decode", &decode, nb::arg("codes"), nb::arg("columns"), nb::arg("bits"), nb::arg("group"),
          nb::arg("scale"), nb::arg("zero").none(), nb::arg("table"), nb::arg("out"), nb::arg("threads"));
    m.def("grouped_multiply", &multiply, nb::arg("x"), nb::arg("codes"), nb::arg("columns"), nb::arg("bits"),
          nb::arg("group"), nb::arg("scale"), nb::arg("zero").none(), nb::arg("table"), nb::arg("y"),
          nb::arg("threads"));
}
