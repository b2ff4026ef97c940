// CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected): the checksum of every extent of a coded file.
//
// Two paths with the same results: the SSE4.2 instruction where the processor has it (chosen at run time), in three
// interleaved lanes since it has three cycles of latency and one of throughput, and eight tables of 256 words elsewhere
// ("slicing by eight": Kounavis and Berry, A Systematic Approach to Building High Performance Software-Based CRC
// Generators, 2005).

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // reflected
constexpr size_t kLane = 4096;                 // bytes of one lane of the interleaved loop

using Table = std::array<uint32_t, 256>;

constexpr std::array<Table, 8> make_tables() {
    std::array<Table, 8> tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
        tables[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
    return tables;
}

constexpr auto kTables = make_tables();

uint32_t portable(uint32_t crc, const uint8_t* data, size_t size) {
    for (; size >= 8; data += 8, size -= 8) {
        crc ^= uint32_t(data[0]) | uint32_t(data[1]) << 8 | uint32_t(data[2]) << 16 | uint32_t(data[3]) << 24;
        crc = kTables[7][crc & 0xFF] ^ kTables[6][(crc >> 8) & 0xFF] ^ kTables[5][(crc >> 16) & 0xFF] ^
              kTables[4][crc >> 24] ^ kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^
              kTables[0][data[7]];
    }
    for (; size; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFF];
    return crc;
}

#if defined(__x86_64__)

// The effect of kLane zero bytes on a checksum is linear over bits: four tables hold it for the four bytes of a state.
std::array<Table, 4> make_shift() {
    static const std::array<uint8_t, kLane> zeros{};
    std::array<Table, 4> shift{};
    std::array<uint32_t, 32> of_bit{};
    for (int bit = 0; bit < 32; ++bit) of_bit[bit] = portable(1u << bit, zeros.data(), kLane);
    for (uint32_t k = 0; k < 4; ++k)
        for (uint32_t byte = 0; byte < 256; ++byte)
            for (uint32_t bit = 0; bit < 8; ++bit)
                if (byte >> bit & 1) shift[k][byte] ^= of_bit[8 * k + bit];
    return shift;
}

const std::array<Table, 4> kShift = make_shift();

uint32_t past_a_lane(uint32_t crc) {
    return kShift[0][crc & 0xFF] ^ kShift[1][(crc >> 8) & 0xFF] ^ kShift[2][(crc >> 16) & 0xFF] ^ kShift[3][crc >> 24];
}

uint64_t word(const uint8_t* data) {
    uint64_t value;
    std::memcpy(&value, data, 8);
    return value;
}

__attribute__((target("sse4.2"))) uint32_t sse42(uint32_t start, const uint8_t* data, size_t size) {
    uint64_t crc = start;
    for (; size >= 3 * kLane; data += 3 * kLane, size -= 3 * kLane) {
        uint64_t second = 0, third = 0;
        for (size_t i = 0; i < kLane; i += 8) {
            crc = _mm_crc32_u64(crc, word(data + i));
            second = _mm_crc32_u64(second, word(data + kLane + i));
            third = _mm_crc32_u64(third, word(data + 2 * kLane + i));
        }
        crc = past_a_lane(uint32_t(crc)) ^ second;
        crc = past_a_lane(uint32_t(crc)) ^ third;
    }
    for (; size >= 8; data += 8, size -= 8) crc = _mm_crc32_u64(crc, word(data));
    uint32_t rest = uint32_t(crc);
    for (; size; ++data, --size) rest = _mm_crc32_u8(rest, *data);
    return rest;
}

bool has_sse42() {
    static const bool found = __builtin_cpu_supports("sse4.2");
    return found;
}

#endif

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint32_t crc32c(Bytes bytes, uint32_t before, bool tables) {
    const uint8_t* data = bytes.data();
    const size_t size = bytes.size();
    nb::gil_scoped_release unlocked;
    const uint32_t start = ~before;
#if defined(__x86_64__)
    if (!tables && has_sse42()) return ~sse42(start, data, size);
#endif
    return ~portable(start, data, size);
}

}  // namespace

void bind_checksum(nb::module_& module) {
    using namespace nb::literals;
    module.def("crc32c", &crc32c, "bytes"_a, "before"_a = 0u, "tables"_a = false,
               "CRC-32C of bytes that follow others with the checksum `before`; `tables` forces the portable path.");
}
