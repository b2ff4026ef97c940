// Fields of coded tensors back into the records that they came from (lowbit/codec/fields.py has the layouts, splits
// them, and is their only caller). Plain loops, compiled for several processors where the compiler can; without the
// interpreter's lock.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LOWBIT_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define LOWBIT_CLONES
#endif

namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

using Field = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

LOWBIT_CLONES void bf16(const uint8_t* exponent, const uint8_t* rest, uint16_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        out[i] = uint16_t(exponent[i] << 7 | (rest[i] & 0x80) << 8 | (rest[i] & 0x7F));
    }
}

LOWBIT_CLONES void fp16(const uint8_t* high, const uint8_t* low, uint16_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const unsigned h = high[i];
        out[i] = uint16_t(((h >> 1 & 0x7C) | (h & 4) << 5 | (h & 3)) << 8 | low[i]);
    }
}

LOWBIT_CLONES void fp32(const uint8_t* exponent, const uint8_t* rest, const uint8_t* middle, const uint8_t* low,
                        uint32_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t r = rest[i];
        out[i] = uint32_t(exponent[i]) << 23 | (r & 0x80) << 24 | (r & 0x7F) << 16 | uint32_t(middle[i]) << 8 | low[i];
    }
}

// Codes of 1, 2 or 4 bits: byte i holds code i of each of the 8 / bits planes.
template <int BITS>
LOWBIT_CLONES void whole(const uint8_t* codes, uint8_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        unsigned byte = codes[i];
        for (int k = 1; k < 8 / BITS; ++k) byte |= unsigned(codes[size_t(k) * n + i]) << (k * BITS);
        out[i] = uint8_t(byte);
    }
}

// Codes of 3, 5, 6 or 7 bits: `BITS` bytes, least significant first, hold code i of each of eight planes.
template <int BITS>
LOWBIT_CLONES void groups(const uint8_t* codes, uint8_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        uint64_t word = 0;
        for (int k = 0; k < 8; ++k) word |= uint64_t(codes[size_t(k) * n + i]) << (k * BITS);
        for (int b = 0; b < BITS; ++b) out[size_t(BITS) * i + size_t(b)] = uint8_t(word >> (8 * b));
    }
}

void require(bool fits) {
    if (!fits) throw std::invalid_argument("fields and what they are joined to are not of one length");
}

void join_bf16(Field exponent, Field rest, Out<uint16_t> out) {
    require(exponent.size() == out.size() && rest.size() == out.size());
    nb::gil_scoped_release unlocked;
    bf16(exponent.data(), rest.data(), out.data(), out.size());
}

void join_fp16(Field high, Field low, Out<uint16_t> out) {
    require(high.size() == out.size() && low.size() == out.size());
    nb::gil_scoped_release unlocked;
    fp16(high.data(), low.data(), out.data(), out.size());
}

void join_fp32(Field exponent, Field rest, Field middle, Field low, Out<uint32_t> out) {
    const size_t n = out.size();
    require(exponent.size() == n && rest.size() == n && middle.size() == n && low.size() == n);
    nb::gil_scoped_release unlocked;
    fp32(exponent.data(), rest.data(), middle.data(), low.data(), out.data(), n);
}

void pack_bits(Field codes, Out<uint8_t> out, int bits) {
    const bool divides = bits == 1 || bits == 2 || bits == 4;
    require(bits >= 1 && bits <= 7 && (divides || out.size() % size_t(bits) == 0));
    const size_t n = divides ? out.size() : out.size() / size_t(bits);
    require(codes.size() == n * size_t(divides ? 8 / bits : 8));
    nb::gil_scoped_release unlocked;
    const auto pack = bits == 1   ? whole<1>
                      : bits == 2 ? whole<2>
                      : bits == 4 ? whole<4>
                      : bits == 3 ? groups<3>
                      : bits == 5 ? groups<5>
                      : bits == 6 ? groups<6>
                                  : groups<7>;
    pack(codes.data(), out.data(), n);
}

}  // namespace

void bind_fields(nb::module_& module) {
    using namespace nb::literals;
    module.def("join_bf16", &join_bf16, "exponent"_a, "rest"_a, "out"_a, "Words of sign, exponent and mantissa.");
    module.def("join_fp16", &join_fp16, "high"_a, "low"_a, "out"_a, "Words of an exponent with its sign, and a mantissa.");
    module.def("join_fp32", &join_fp32, "exponent"_a, "rest"_a, "middle"_a, "low"_a, "out"_a, "Words of four fields.");
    module.def("pack_bits", &pack_bits, "codes"_a, "out"_a, "bits"_a, "Planes of codes of a few bits, packed densely.");
}
