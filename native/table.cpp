#include "table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace lowbit {

namespace {

using Frequencies = std::array<int, SYMBOLS>;

struct Bin {
    int value;
    double count;
};

int floor_log2(unsigned x) {
    int log = 0;
    while (x >>= 1) ++log;
    return log;
}

// States per symbol that minimise sum -p log2(f / 128): each next state goes where it gains most, which is optimal
// since gains fall with f. A symbol that occurs has at least one.
Frequencies frequencies(const std::vector<double>& p) {
    static const auto gains = [] {
        std::array<double, STATES + 1> g{};
        for (int f = 1; f <= STATES; ++f) g[f] = std::log2((f + 1.0) / f);
        return g;
    }();
    Frequencies f{};
    std::array<double, SYMBOLS> gain{};
    int left = STATES;
    for (std::size_t s = 0; s < p.size(); ++s) {
        if (p[s] > 0) f[s] = 1, --left, gain[s] = p[s] * gains[1];
    }
    for (; left > 0; --left) {
        const auto s = std::max_element(gain.begin(), gain.begin() + p.size()) - gain.begin();
        gain[s] = p[s] * gains[++f[s]];
    }
    return f;
}

double cross_entropy(const std::vector<double>& p, const Frequencies& f) {
    double bits = 0;
    for (std::size_t s = 0; s < p.size(); ++s) {
        if (p[s] > 0) bits -= p[s] * std::log2(f[s] / double(STATES));
    }
    return bits;
}

// The order of states: number x = f + k of symbol s belongs where the state's own probability, falling as 1 / state,
// matches the symbol's: at 1 / (p ln(1 + 1/x)) (Duda, "Asymmetric numeral systems", arXiv 1311.2540, "tuned" spread).
void spread(Table& table, const std::vector<double>& p, const Frequencies& f) {
    std::vector<std::pair<double, std::uint8_t>> at;
    for (std::size_t s = 0; s < p.size(); ++s) {
        for (int x = f[s]; x < 2 * f[s]; ++x) at.emplace_back(1 / (p[s] * std::log1p(1.0 / x)), std::uint8_t(s));
    }
    std::sort(at.begin(), at.end());
    for (int i = 0; i < STATES; ++i) table.symbol[i] = at[i].second;
    table.derive();
}

// Expected bits a symbol of the encoder's automaton, from the stationary distribution of its states.
double expected_bits(const Table& table, const std::vector<double>& p) {
    struct Move { std::uint8_t from, to; double p; };
    std::vector<Move> moves;
    std::array<double, STATES> bits{}, now{}, next{};
    for (int to = 0; to < STATES; ++to) {  // the states that the decoder reaches from `to` are those the encoder leaves
        const double q = p[table.symbol[to]];
        for (int low = 0; low < 1 << table.bits[to]; ++low) {
            const auto from = std::uint8_t(table.base[to] + low);
            moves.push_back({from, std::uint8_t(to), q});
            bits[from] += q * table.bits[to];
        }
    }
    now.fill(1.0 / STATES);
    double moved = 1;
    for (int i = 0; i < 2000 && moved > 1e-6; ++i) {
        next.fill(0);
        for (const Move& m : moves) next[m.to] += now[m.from] * m.p;
        moved = 0;
        for (int x = 0; x < STATES; ++x) {
            const double mean = (now[x] + next[x]) / 2;  // an automaton may alternate, its mean does not
            moved += std::abs(mean - now[x]);
            now[x] = mean;
        }
    }
    return std::inner_product(now.begin(), now.end(), bits.begin(), 0.0);
}

// Bits of the exception list: a varint of gap * 8 + code, gaps being geometric, and one more for far values.
double exception_bits(const std::vector<Bin>& bins, int first, int last, double total, double outside) {
    if (outside == 0) return 0;
    const double inside = 1 - outside / total;
    const double mean = 16 + 8 * std::pow(inside, 2048) - 8 * (1 - std::pow(inside, 16));
    double bits = outside * mean;
    for (const Bin& b : bins) {
        if (b.value >= first && b.value <= last) continue;
        const bool below = b.value < first;
        const auto code = exception_code(below, std::uint64_t(below ? first - b.value : b.value - last));
        if (code >= EXCEPTION_ESCAPE) bits += b.count * (code < 135 ? 8 : code < 16391 ? 16 : 24);
    }
    return bits;
}

struct Candidate {
    double bits = INFINITY;
    int first = 0;
    std::vector<double> p;
};

// The best range of at most 64 values: the richest window, then narrowed from its poorer edge.
Candidate narrow(const std::vector<Bin>& bins, double total) {
    std::size_t best = 0;
    double richest = -1, mass = 0;
    for (std::size_t i = 0, j = 0; i < bins.size(); mass -= bins[i++].count) {
        while (j < bins.size() && bins[j].value < bins[i].value + SYMBOLS) mass += bins[j++].count;
        if (mass > richest) richest = mass, best = i;
    }
    Candidate found;
    if (richest < total / 4) return found;  // so many exceptions cost more than 16 raw bits
    std::size_t end = best;
    while (end < bins.size() && bins[end].value < bins[best].value + SYMBOLS) ++end;

    double below = 0, above = 0;
    for (std::size_t i = 0; i < best; ++i) below += bins[i].count;
    for (std::size_t i = end; i < bins.size(); ++i) above += bins[i].count;
    for (int patience = 8; best < end && patience > 0; --patience) {
        const int first = bins[best].value, last = bins[end - 1].value;
        std::vector<double> p(std::size_t(last - first + 1), 0.0);
        for (std::size_t i = best; i < end; ++i) p[std::size_t(bins[i].value - first)] = bins[i].count / total;
        p.front() += below / total;
        p.back() += above / total;
        const double bits = total * cross_entropy(p, frequencies(p)) +
                            exception_bits(bins, first, last, total, below + above);
        if (bits < found.bits) found = {bits, first, std::move(p)}, patience = 8;
        if (bins[best].count <= bins[end - 1].count) below += bins[best++].count;
        else above += bins[--end].count;
    }
    return found;
}

}  // namespace

void Table::derive() {
    std::array<int, SYMBOLS> x{};
    last = 0;
    for (int i = 0; i < STATES; ++i) {
        ++x[symbol[i]];
        last = std::max(last, symbol[i]);
    }
    for (int i = 0; i < STATES; ++i) {
        const unsigned number = unsigned(x[symbol[i]]++);
        bits[i] = std::uint8_t(7 - floor_log2(number));
        base[i] = std::uint8_t((number << bits[i]) - STATES);
    }
}

const char* Table::problem() const {
    if (shift > MAX_SHIFT) return "more raw bits than a code has";
    if (std::find(symbol, symbol + STATES, 0) == symbol + STATES) return "an alphabet that does not begin at its low end";
    if (smallest() < INT16_MIN || largest() > INT16_MAX) return "an alphabet beyond 16 bits";
    return nullptr;
}

bool Table::operator==(const Table& other) const {
    return low == other.low && shift == other.shift && !std::memcmp(symbol, other.symbol, STATES);
}

Plan plan(const std::uint64_t* counts, std::size_t n, int lowest) {
    Plan best{{}, INFINITY};
    double total = 0;
    for (std::size_t i = 0; i < n; ++i) total += double(counts[i]);
    if (total == 0) {
        std::memset(best.table.symbol, 0, STATES);
        best.table.derive();
        best.bits = 0;
        return best;
    }
    for (int shift = 0; shift <= MAX_SHIFT; ++shift) {
        std::vector<Bin> bins;
        for (std::size_t i = 0; i < n; ++i) {
            if (!counts[i]) continue;
            const int value = (lowest + int(i)) >> shift;
            if (bins.empty() || bins.back().value != value) bins.push_back({value, 0});
            bins.back().count += double(counts[i]);
        }
        const Candidate c = narrow(bins, total);
        if (c.p.empty()) continue;
        const Frequencies f = frequencies(c.p);
        Plan one{{}, 0};
        one.table.low = std::int16_t(c.first);
        one.table.shift = std::uint8_t(shift);
        spread(one.table, c.p, f);
        one.bits = c.bits + total * (shift + expected_bits(one.table, c.p) - cross_entropy(c.p, f));
        if (one.bits < best.bits) best = one;
        if (bins.size() <= 2) break;  // more raw bits would only replace coded ones
    }
    return best;
}

}  // namespace lowbit
