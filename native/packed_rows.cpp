// Products with packed weights, and their decoding, compiled once for each processor (LOWBIT_ISA names it). Codes are
// unpacked in registers: what is read from memory is the codes and the scales, once for all tokens.
#include "packed_lanes.h"

namespace lowbit {

namespace {

// How codes of BITS become values. Up to four bits, 16 values a group are scaled once and looked up by a permutation;
// wider ones are whole numbers or gathered, and scaled one by one. Sixteen are the weight itself.
enum class Way { table, whole, gather, half, bfloat };

constexpr std::size_t BAND = std::size_t(1) << 17;  // bytes of codes

template <int BITS, Way WAY>
struct Group {
    Floats table, scale, zero, offset;
    const float* values;

    void set(const PackedWeight& w, const float* of_scale, const float* of_shift) {
        if (BITS == 16) return;
        scale = Floats::all(*of_scale);
        if (WAY == Way::table) {
            table = Floats::load(w.table);
            if (w.shifted == PackedWeight::zero) table = table - Floats::all(*of_shift);
            table = table * scale;
            if (w.shifted == PackedWeight::offset) table = table + Floats::all(*of_shift);
        } else {
            zero = Floats::all(w.shifted == PackedWeight::zero ? *of_shift : -w.table[0]);
            offset = Floats::all(w.shifted == PackedWeight::offset ? *of_shift : -0.0f);  // x + -0 is x, for every x
            values = w.table;
        }
    }

    Floats at(const std::uint8_t* p) const {
        if constexpr (WAY == Way::half) {
            return Floats::half(p);
        } else if constexpr (WAY == Way::bfloat) {
            return Floats::bfloat(p);
        } else {
            const Codes codes = codes_at<BITS>(p);
            if (WAY == Way::table) return look_up(codes, table);
            if (WAY == Way::whole) return (whole<BITS>(codes) - zero) * scale + offset;
            return gather<BITS>(codes, values) * scale;
        }
    }
};

inline void to_floats(const std::uint16_t* from, std::size_t n, float* to) {
    if (n < CHUNK) {
        std::uint16_t few[CHUNK] = {};
        float floats[CHUNK];
        for (std::size_t i = 0; i < n; ++i) few[i] = from[i];
        Floats::half(few).store(floats);
        for (std::size_t i = 0; i < n; ++i) to[i] = floats[i];
        return;
    }
    for (std::size_t i = 0; i + CHUNK < n; i += CHUNK) Floats::half(from + i).store(to + i);
    Floats::half(from + n - CHUNK).store(to + n - CHUNK);  // the last ones: some of them again
}

// The numbers of some rows as floats, one a group: where they lie, or written to `to`. Rows are `stride` apart.
struct Converted {
    const float* floats;
    std::size_t stride;

    Converted(const Numbers& n, std::size_t row, std::size_t rows, std::size_t groups, float* to)
        : floats(to), stride(n.one_row ? 0 : groups) {
        const std::size_t first = row * stride, count = n.one_row ? groups : rows * groups;
        if (n.type == Numbers::f32) {
            floats = static_cast<const float*>(n.data) + first;
        } else if (n.type == Numbers::f16) {
            to_floats(static_cast<const std::uint16_t*>(n.data) + first, count, to);
        } else {
            const std::uint8_t* from = static_cast<const std::uint8_t*>(n.data) + first;
            for (std::size_t i = 0; i < count; ++i) to[i] = float(from[i]);
        }
    }
};

// The scales and shifts of some rows. Where there are no shifts, the scales stand in for them and are not looked at.
struct Scales {
    Converted scale, shift;
    Scales(const PackedWeight& w, std::size_t row, std::size_t rows, float* scratch)
        : scale(w.scale, row, rows, w.groups, scratch),
          shift(w.shifted == PackedWeight::none ? scale
                                                : Converted(w.shift, row, rows, w.groups, scratch + rows * w.groups)) {}
};

// The outputs of R rows for T tokens: a weight is made once for the T tokens, an input read once for the R rows.
template <int BITS, Way WAY, int R, int T>
void multiply(const PackedWeight& w, std::size_t row, const float* x, float* y, float* scratch) {
    const Scales scales(w, row, R, scratch);
    const float* const scale = scales.scale.floats;
    const float* const shift = scales.shift.floats;
    const std::size_t apart = scales.scale.stride, shift_apart = scales.shift.stride;
    const std::uint8_t* codes[R];
    for (int r = 0; r < R; ++r) codes[r] = row_of(w, row + std::size_t(r));
    Floats sum[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[r][t] = Floats::all(0);
    }
    Group<BITS, WAY> group[R];
    const std::size_t stride = chunks_of(w) * CHUNK, whole = w.columns / CHUNK;
    std::size_t c = 0, end = 0;
    const std::size_t groups = w.groups, each = w.group / CHUNK;
    for (std::size_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            group[r].set(w, scale + std::size_t(r) * apart + g, shift + std::size_t(r) * shift_apart + g);
        }
        for (end = g + 1 < groups ? end + each : whole; c < end; ++c) {
            Floats weight[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weight[r] = group[r].at(codes[r] + c * 2 * BITS);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const Floats in = Floats::load(x + std::size_t(t) * stride + c * CHUNK);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[r][t].add_product(weight[r], in);
            }
        }
    }
    const int tail = int(w.columns % CHUNK);
    if (tail) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {  // what lies behind a row must not be multiplied: it may be no number
            const Floats weight = ordered<BITS>(group[r].at(codes[r] + whole * 2 * BITS)).first(tail);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                sum[r][t].add_product(weight, Floats::load(x + std::size_t(t) * stride + whole * CHUNK));
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[std::size_t(t) * w.rows + row + std::size_t(r)] = sum[r][t].sum();
    }
}

template <int BITS, Way WAY, int R, int T>
void rows(const PackedWeight& w, std::size_t first, std::size_t last, const float* x, float* y, float* scratch) {
    std::size_t row = first;
    for (; row + R <= last; row += R) multiply<BITS, WAY, R, T>(w, row, x, y, scratch);
    for (; row < last; ++row) multiply<BITS, WAY, 1, T>(w, row, x, y, scratch);
}

// The inputs of few tokens stay in the first-level cache while they meet all rows of a band, whose codes stay in the second.
template <int BITS, Way WAY>
struct Multiply {
    static void run(const PackedWeight& w, std::size_t first, std::size_t last, const PackedProduct& p, float* scratch) {
        const std::size_t stride = chunks_of(w) * CHUNK, band = ROWS * (1 + BAND / (ROWS * w.row_bytes));
        for (std::size_t row = first; row < last; row += band) {
            const std::size_t end = row + band < last ? row + band : last;
            std::size_t t = 0;
            const auto take = [&](auto rows, std::size_t n) {
                for (; t + n <= p.tokens; t += n) rows(w, row, end, p.x + t * stride, p.y + t * w.rows, scratch);
            };
            if constexpr (TOKENS >= 8) take(rows<BITS, WAY, ROWS / 2, 8>, 8);
            if constexpr (TOKENS >= 4) take(rows<BITS, WAY, ROWS, 4>, 4);
            if constexpr (TOKENS >= 2) take(rows<BITS, WAY, ROWS, 2>, 2);
            take(rows<BITS, WAY, ROWS, 1>, 1);
        }
    }
};

template <int BITS, Way WAY>
struct Decode {
    static void run(const PackedWeight& w, std::size_t first, std::size_t last, float* to, float* scratch) {
        Group<BITS, WAY> group;
        for (std::size_t row = first; row < last; ++row, to += w.columns) {
            const std::uint8_t* codes = row_of(w, row);
            const Scales scales(w, row, 1, scratch);
            std::size_t c = 0, end = 0;
            for (std::size_t g = 0; g < w.groups; ++g) {
                group.set(w, scales.scale.floats + g, scales.shift.floats + g);
                for (end = g + 1 < w.groups ? end + w.group / CHUNK : w.columns / CHUNK; c < end; ++c) {
                    ordered<BITS>(group.at(codes + c * 2 * BITS)).store(to + c * CHUNK);
                }
            }
            if (w.columns % CHUNK) {
                float lanes[CHUNK];
                ordered<BITS>(group.at(codes + c * 2 * BITS)).store(lanes);
                std::memcpy(to + c * CHUNK, lanes, w.columns % CHUNK * sizeof(float));
            }
        }
    }
};

// Calls Do<BITS, WAY>::run for the bits and the table of `w`.
template <template <int, Way> class Do, class... Arguments>
void choose(const PackedWeight& w, const Arguments&... arguments) {
    const auto wide = [&](auto whole, auto gather) { w.whole ? whole(w, arguments...) : gather(w, arguments...); };
    switch (w.bits) {
        case 1: return Do<1, Way::table>::run(w, arguments...);
        case 2: return Do<2, Way::table>::run(w, arguments...);
        case 3: return Do<3, Way::table>::run(w, arguments...);
        case 4: return Do<4, Way::table>::run(w, arguments...);
        case 5: return wide(Do<5, Way::whole>::run, Do<5, Way::gather>::run);
        case 6: return wide(Do<6, Way::whole>::run, Do<6, Way::gather>::run);
        case 16: return w.bfloat ? Do<16, Way::bfloat>::run(w, arguments...) : Do<16, Way::half>::run(w, arguments...);
        case 7: return wide(Do<7, Way::whole>::run, Do<7, Way::gather>::run);
        default: return wide(Do<8, Way::whole>::run, Do<8, Way::gather>::run);
    }
}

}  // namespace

namespace LOWBIT_ISA {

// Inputs in the order of the lanes that they meet, with zeros behind them; the columns of a ragged end as they are.
void packed_enter(const PackedWeight& w, const float* x, std::size_t tokens, float* to) {
    const std::size_t whole = w.columns / CHUNK * CHUNK;
    for (std::size_t t = 0; t < tokens; ++t, x += w.columns, to += chunks_of(w) * CHUNK) {
        std::memcpy(to, x, w.columns * sizeof(float));
        std::memset(to + w.columns, 0, (chunks_of(w) * CHUNK - w.columns) * sizeof(float));
        if (w.bits != 4) continue;
        for (std::size_t c = 0; c < whole; c += CHUNK) entered<4>(Floats::load(x + c)).store(to + c);
    }
}

void packed_multiply(const PackedWeight& w, std::size_t first, std::size_t last, const PackedProduct& p, float* scratch) {
    choose<Multiply>(w, first, last, p, scratch);
}

void packed_decode(const PackedWeight& w, std::size_t first, std::size_t last, float* to, float* scratch) {
    choose<Decode>(w, first, last, to, scratch);
}

}  // namespace LOWBIT_ISA

}  // namespace lowbit
