// One step with NEON. A table of 128 bytes is two lookups of 64 in registers; the eight lanes of a stream are the words
// of a register, into which the two bytes around each lane's field are shuffled and shifted down.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "decode.h"

namespace lowbit {

namespace {

struct Lanes {
    struct Symbols {
        uint8x16_t quarter[4];
    };

    struct Codebook {
        uint8x16x4_t symbol[2], base[2], bits[2];
        explicit Codebook(const Table& t) {
            for (int i = 0; i < 2; ++i) {
                symbol[i] = vld1q_u8_x4(t.symbol + 64 * i);
                base[i] = vld1q_u8_x4(t.base + 64 * i);
                bits[i] = vld1q_u8_x4(t.bits + 64 * i);
            }
        }
    };

    struct State {
        uint8x16_t state[4];
        std::uint64_t at[STREAMS];
        const std::uint8_t* bytes;
        void load(const Cursor& c) {
            std::memcpy(state, c.state, sizeof state);
            std::memcpy(at, c.at, sizeof at);
            bytes = c.bytes;
        }
        void save(Cursor& c) const {
            std::memcpy(c.state, state, sizeof state);
            std::memcpy(c.at, at, sizeof at);
        }
    };

    // Entries of a table of 128 bytes: an index beyond a half gives zero from it.
    static uint8x16_t look_up(const uint8x16x4_t* table, uint8x16_t index) {
        return vorrq_u8(vqtbl4q_u8(table[0], index), vqtbl4q_u8(table[1], vsubq_u8(index, vdupq_n_u8(64))));
    }

    // The fields of a stream's eight lanes, at most seven bits each; higher bits are arbitrary. `sums` has in byte i
    // the bits of lanes 0..i.
    static uint8x8_t fields(State& s, int stream, std::uint64_t sums) {
        std::uint64_t word;
        std::memcpy(&word, s.bytes + (s.at[stream] >> 3), 8);
        word >>= s.at[stream] & 7;
        s.at[stream] += sums >> 56;
        const uint16x8_t begin = vmovl_u8(vcreate_u8(sums << 8));
        const uint16x8_t byte = vshrq_n_u16(begin, 3);
        const uint16x8_t two = vaddq_u16(vorrq_u16(byte, vshlq_n_u16(byte, 8)), vdupq_n_u16(0x0100));
        const uint8x16_t window = vcombine_u8(vcreate_u8(word), vcreate_u8(0));
        const uint16x8_t around = vreinterpretq_u16_u8(vqtbl1q_u8(window, vreinterpretq_u8_u16(two)));
        const int16x8_t down = vnegq_s16(vreinterpretq_s16_u16(vandq_u16(begin, vdupq_n_u16(7))));
        return vmovn_u16(vshlq_u16(around, down));
    }

    static Symbols step(const Codebook& c, State& s) {
        Symbols out;
        for (int q = 0; q < 4; ++q) {
            const uint8x16_t bits = look_up(c.bits, s.state[q]), base = look_up(c.base, s.state[q]);
            out.quarter[q] = look_up(c.symbol, s.state[q]);
            const uint8x16_t mask = vsubq_u8(vshlq_u8(vdupq_n_u8(1), vreinterpretq_s8_u8(bits)), vdupq_n_u8(1));
            const uint64x2_t words = vreinterpretq_u64_u8(bits);
            constexpr std::uint64_t ONES = 0x0101010101010101;
            const uint8x8_t low = fields(s, 2 * q, vgetq_lane_u64(words, 0) * ONES);
            const uint8x8_t high = fields(s, 2 * q + 1, vgetq_lane_u64(words, 1) * ONES);
            s.state[q] = vaddq_u8(base, vandq_u8(vcombine_u8(low, high), mask));
        }
        return out;
    }

    template <class T>
    static void put(T* to, const Symbols& symbols, int low, int shift, const std::uint8_t* planes) {
        std::uint8_t lane[LANES];
        for (int q = 0; q < 4; ++q) vst1q_u8(lane + 16 * q, symbols.quarter[q]);
        if (shift == 0) {
            for (int i = 0; i < LANES; ++i) to[i] = T(lane[i] + low);
            return;
        }
        int code[LANES];
        for (int i = 0; i < LANES; ++i) code[i] = (lane[i] + low) * (1 << shift);
        for (int j = 0; j < shift; ++j) {
            std::uint64_t plane;
            std::memcpy(&plane, planes + 8 * j, 8);
            for (int i = 0; i < LANES; ++i) code[i] |= int(plane >> i & 1) << j;
        }
        for (int i = 0; i < LANES; ++i) to[i] = T(code[i]);
    }
};

}  // namespace

}  // namespace lowbit
