// What bounds decode and multiply: the step of native/lanes_vbmi.h with its parts left out one by one.
//
//     g++ -std=c++20 -O3 -march=native benchmarks/fused_limit.cpp -o /tmp/fused_limit && taskset -c 0 /tmp/fused_limit
//
// All data lies in the first cache, so no figure here depends on memory. A line a variant: nanoseconds a step of 64
// symbols with one, two and four independent groups of streams (few: bound by latency; many: by the ports), the best of
// fifteen. Needs AVX-512 VBMI and VNNI.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

enum Refill { none, load, gather };

struct Part {
    bool sums;       // where each lane's field begins
    Refill refill;   // the words that fields are cut from
    bool products;   // two products of bytes a step, the inputs from cache
    bool half;       // 64 states: one-register lookups
};

struct Tables {
    __m512i symbol[2], base[2], bits[2], masks;
};

template <int K, Part P>
static double run(const Tables& t, const std::uint8_t* bytes, const std::int8_t* x, int steps) {
    __m512i state[K], at[K], low[K], high[K];
    for (int k = 0; k < K; ++k) {
        state[k] = _mm512_set1_epi8(static_cast<char>(17 * k & 63));
        low[k] = high[k] = _mm512_setzero_si512();
    }
    const auto look = [](const __m512i (&table)[2], __m512i s) {
        return P.half ? _mm512_permutexvar_epi8(s, table[0]) : _mm512_permutex2var_epi8(table[0], s, table[1]);
    };
    const auto started = std::chrono::steady_clock::now();
    for (int i = 0; i < steps; ++i) {
        if (i % 64 == 0) {  // back to the start before a stream has left its 512 bytes
            for (int k = 0; k < K; ++k) at[k] = _mm512_setr_epi64(0, 4096, 8192, 12288, 16384, 20480, 24576, 28672);
        }
        const __m512i* in = reinterpret_cast<const __m512i*>(x + 128 * (i % 64));
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            const __m512i symbol = look(t.symbol, state[k]), base = look(t.base, state[k]);
            const __m512i bits = look(t.bits, state[k]);
            const __m512i mask = _mm512_shuffle_epi8(t.masks, bits);
            __m512i begin = bits, sum = bits, word = state[k];
            if (P.sums) {
                sum = _mm512_mullo_epi64(bits, _mm512_set1_epi64(0x0101010101010101));
                begin = _mm512_slli_epi64(sum, 8);
            }
            if (P.refill == gather) {
                const __m512i near = _mm512_i64gather_epi64(_mm512_srli_epi64(at[k], 3), bytes, 1);
                word = _mm512_srlv_epi64(near, _mm512_and_si512(at[k], _mm512_set1_epi64(7)));
            } else if (P.refill == load) {
                word = _mm512_loadu_si512(bytes + 64 * (i % 64));
            }
            const __m512i field = _mm512_multishift_epi64_epi8(begin, word);
            state[k] = _mm512_ternarylogic_epi64(base, field, mask, 0xF8);
            at[k] = _mm512_add_epi64(at[k], _mm512_srli_epi64(sum, 56));
            if (P.products) {
                low[k] = _mm512_dpbusd_epi32(low[k], symbol, _mm512_loadu_si512(in));
                high[k] = _mm512_dpbusd_epi32(high[k], symbol, _mm512_loadu_si512(in + 1));
            } else {
                low[k] = _mm512_xor_si512(low[k], symbol);
            }
        }
    }
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - started;
    for (int k = 0; k < K; ++k) {  // what was computed is used
        volatile std::int64_t sink = _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(low[k], high[k]), at[k]));
        (void)sink;
    }
    return took.count() / (static_cast<double>(steps) * K);
}

template <Part P>
static void show(const char* name, const Tables& t, const std::uint8_t* bytes, const std::int8_t* x) {
    double best[3] = {1e9, 1e9, 1e9};
    for (int round = 0; round < 15; ++round) {
        const double now[3] = {run<1, P>(t, bytes, x, 200000), run<2, P>(t, bytes, x, 100000), run<4, P>(t, bytes, x, 50000)};
        for (int i = 0; i < 3; ++i) best[i] = now[i] < best[i] ? now[i] : best[i];
    }
    std::printf("{\"step\": \"%s\", \"ns_1\": %.2f, \"ns_2\": %.2f, \"ns_4\": %.2f, \"gweights_s\": %.1f}\n", name, best[0],
                best[1], best[2], 64 / (best[0] < best[1] ? (best[0] < best[2] ? best[0] : best[2])
                                                          : (best[1] < best[2] ? best[1] : best[2])));
}

int main() {
    std::mt19937 random(1);
    std::vector<std::uint8_t> bytes(1 << 13);
    std::vector<std::int8_t> x(1 << 14);
    for (auto& b : bytes) b = static_cast<std::uint8_t>(random());
    for (auto& v : x) v = static_cast<std::int8_t>(random());
    alignas(64) std::uint8_t symbol[128], base[128], bits[128];
    for (int i = 0; i < 128; ++i) {  // as a table of 2.6 bits a symbol has them: fields of 1 to 5 bits
        symbol[i] = static_cast<std::uint8_t>(random() % 15);
        bits[i] = static_cast<std::uint8_t>(1 + random() % 5 % 4);
        base[i] = static_cast<std::uint8_t>((random() & 63) >> bits[i] << bits[i]);
    }
    Tables t;
    for (int i = 0; i < 2; ++i) {
        t.symbol[i] = _mm512_load_si512(symbol + 64 * i);
        t.base[i] = _mm512_load_si512(base + 64 * i);
        t.bits[i] = _mm512_load_si512(bits + 64 * i);
    }
    t.masks = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, 0, 0, 0, 0, 0, 0, 0, 0));
    show<Part{false, none, false, false}>("three lookups and a mask", t, bytes.data(), x.data());
    show<Part{true, none, false, false}>("and sums of bit counts", t, bytes.data(), x.data());
    show<Part{true, load, false, false}>("and words by one load (not a decoder)", t, bytes.data(), x.data());
    show<Part{true, gather, false, false}>("and words by gather: decoding", t, bytes.data(), x.data());
    show<Part{true, gather, true, false}>("and two products: the whole step", t, bytes.data(), x.data());
    show<Part{true, load, true, false}>("the whole step, words by one load", t, bytes.data(), x.data());
    show<Part{true, gather, true, true}>("the whole step, 64 states", t, bytes.data(), x.data());
    show<Part{true, load, true, true}>("the whole step, 64 states, words by one load", t, bytes.data(), x.data());
    return 0;
}
