// Random matrices through the coder, and their streams with altered bytes, on every instruction set: what went in must
// come out, and altered bytes must be refused or decode to the same on each. By hand, with AddressSanitizer:
//     cmake -S . -B build-fuzz -DLOWBIT_FUZZ=ON && cmake --build build-fuzz --target fuzz && build-fuzz/fuzz 60
// The argument is the number of seconds.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.h"
#include "kernels.h"
#include "stream.h"

using namespace lowbit;

namespace {

using Codes = std::vector<std::int16_t>;

// The codes, or the reason of the refusal. The blob lies in memory of its own size, so that reading past it is seen.
std::string outcome(const std::vector<std::uint8_t>& blob, const Kernels& isa, Codes& codes) {
    const std::vector<std::uint8_t> exact(blob);
    try {
        const Stream stream = Stream::parse(exact.data(), exact.size());
        if (stream.rows * stream.columns > 1 << 20) return "large";
        codes.assign(stream.rows * stream.columns, 0);
        decode(stream, 0, stream.rows, codes.data(), 1, isa);
        return "";
    } catch (const std::invalid_argument& error) {
        codes.clear();
        return error.what();
    }
}

void check(bool good, const char* what, const Kernels& isa, long round) {
    if (good) return;
    std::printf("%s on %s in round %ld\n", what, isa.name, round);
    std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    const auto begin = std::chrono::steady_clock::now();
    std::mt19937 random(1);
    const auto below = [&](std::size_t n) { return std::size_t(random()) % n; };
    long rounds = 0, altered = 0, refused = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
        std::vector<std::size_t> widths;
        for (std::size_t i = below(3); i > 0; --i) widths.push_back(64 * (1 + below(3)));
        widths.push_back(1 + below(150));
        std::size_t columns = 0;
        for (const std::size_t w : widths) columns += w;
        const std::size_t rows = 1 + below(40);
        const float sigma = std::exp(float(below(1000)) / 100 - 1);
        std::normal_distribution<float> normal(0, sigma);
        Codes codes(rows * columns);
        for (std::int16_t& c : codes) c = std::int16_t(std::clamp(std::round(normal(random)), -32768.f, 32767.f));
        for (std::size_t i = below(4); i > 0; --i) codes[below(codes.size())] = std::int16_t(random());
        const auto blob = encode(codes.data(), rows, columns, widths, 64 << below(12), 1);
        Codes out, expected;
        for (const Kernels* isa : available()) {
            check(outcome(blob, *isa, out).empty() && out == codes, "a round trip failed", *isa, rounds);
        }
        for (int i = 0; i < 40; ++i, ++altered) {
            std::vector<std::uint8_t> bad = blob;
            for (std::size_t n = 1 + below(3); n > 0; --n) bad[below(bad.size())] = std::uint8_t(random());
            if (below(8) == 0) bad.resize(below(bad.size()));
            const std::string first = outcome(bad, *available()[0], expected);
            refused += !first.empty();
            for (const Kernels* isa : available()) {
                check(outcome(bad, *isa, out) == first && out == expected, "another outcome", *isa, rounds);
            }
        }
        ++rounds;
    }
    std::printf("%ld matrices, %ld altered streams, %ld refused; instruction sets:", rounds, altered, refused);
    for (const Kernels* isa : available()) std::printf(" %s", isa->name);
    std::printf("\n");
}
