// Norms and attention for few tokens, compiled once for each processor (LOWBIT_ISA names it).
#include "step.h"

#include <cmath>
#include <cstring>

#include "packed_lanes.h"

namespace lowbit {

namespace {

// e^x to about 1e-7 of itself for x <= 0, in operations that a loop over an array has for all lanes at once.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: sums with it are whole
    const float n = (x * 1.44269504f + round) - round;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const std::int32_t bits = (std::int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return e * power;
}

// Scores of G queries that share keys, for all columns; the sum of each is of its own columns in their order.
template <int G>
void scores(const Attention& a, const float* q, const float* keys, float* to) {
    const std::size_t chunks = a.size / CHUNK;
    for (std::size_t j = 0; j < a.width; ++j, keys += a.keys.column) {
        Floats sum[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g] = Floats::all(0);
        for (std::size_t c = 0; c < chunks; ++c) {
            const Floats key = Floats::load(keys + c * CHUNK);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) sum[g].add_product(Floats::load(q + std::size_t(g) * a.size + c * CHUNK), key);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) to[std::size_t(g) * a.width + j] = sum[g].sum() * a.scale;
    }
}

// Weights of columns, not below zero, in place of scores; returns 1 / their sum.
float softmax(float* s, const std::uint8_t* mask, std::size_t width) {
    float most = -INFINITY;
    for (std::size_t j = 0; j < width; ++j) {
        if (mask && !mask[j]) s[j] = -INFINITY;
        most = s[j] > most ? s[j] : most;
    }
    for (std::size_t j = 0; j < width; ++j) s[j] = exponential(s[j] - most);
    float sum = 0;
    for (std::size_t j = 0; j < width; ++j) {
        if (mask && !mask[j]) s[j] = 0;
        sum += s[j];
    }
    return 1 / sum;
}

// Up to four chunks of the outputs of G queries, from the chunk `first` on.
template <int G, int N>
void mix(const Attention& a, const float* weights, const float* values, const float* scale, std::size_t first, float* y) {
    Floats sum[G][N];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[g][n] = Floats::all(0);
    }
    values += first * CHUNK;
    for (std::size_t j = 0; j < a.width; ++j, values += a.values.column) {
        Floats value[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) value[n] = Floats::load(values + n * CHUNK);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            const Floats weight = Floats::all(weights[std::size_t(g) * a.width + j]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[g][n].add_product(weight, value[n]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
        const Floats by = Floats::all(scale[g]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) (sum[g][n] * by).store(y + std::size_t(g) * a.size + (first + std::size_t(n)) * CHUNK);
    }
}

template <int G>
void queries(const Attention& a, std::size_t row, std::size_t head, std::size_t first, float* scratch) {
    const std::size_t at = ((row * a.heads + head) * a.group + first) * a.size, chunks = a.size / CHUNK;
    scores<G>(a, a.q + at, a.keys.data + row * a.keys.row + head * a.keys.head, scratch);
    float scale[G];
    const std::uint8_t* mask = a.mask ? a.mask + row * a.mask_row : nullptr;
    for (int g = 0; g < G; ++g) scale[g] = softmax(scratch + std::size_t(g) * a.width, mask, a.width);
    const float* values = a.values.data + row * a.values.row + head * a.values.head;
    std::size_t c = 0;
    for (; c + 4 <= chunks; c += 4) mix<G, 4>(a, scratch, values, scale, c, a.y + at);
    for (; c < chunks; ++c) mix<G, 1>(a, scratch, values, scale, c, a.y + at);
}

}  // namespace

namespace LOWBIT_ISA {

void norm(const Norm& n) {
    const std::size_t whole = n.columns / CHUNK * CHUNK;
    for (std::size_t i = 0; i < n.rows; ++i) {
        const float* x = n.x + i * n.columns;
        float* y = n.y + i * n.columns;
        Floats squares = Floats::all(0);
        for (std::size_t c = 0; c < whole; c += CHUNK) {
            const Floats in = Floats::load(x + c);
            squares.add_product(in, in);
        }
        float sum = squares.sum();
        for (std::size_t c = whole; c < n.columns; ++c) sum += x[c] * x[c];
        const float by = 1 / std::sqrt(sum / float(n.columns) + n.epsilon);
        for (std::size_t c = 0; c < n.columns; ++c) y[c] = x[c] * by * (n.weight[c] + n.shift);
    }
}

void silu(float* gate, const float* up, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const float g = gate[i], e = exponential(g < 0 ? g : -g);
        gate[i] = g * ((g < 0 ? e : 1.0f) / (1.0f + e)) * up[i];
    }
}

void attend(const Attention& a, std::size_t row, std::size_t head, float* scratch) {
    std::size_t g = 0;
    for (; g + 4 <= a.group; g += 4) queries<4>(a, row, head, g, scratch);
    switch (a.group - g) {
        case 3: return queries<3>(a, row, head, g, scratch);
        case 2: return queries<2>(a, row, head, g, scratch);
        case 1: return queries<1>(a, row, head, g, scratch);
    }
}

}  // namespace LOWBIT_ISA

}  // namespace lowbit
