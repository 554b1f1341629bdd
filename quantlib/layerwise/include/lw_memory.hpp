// Between memory and the units: readers of maps, weights and operands, and the writer of results. Each has a port of its own.
#pragma once
#include "lw_step.hpp"

namespace lw {

inline void burst(const Bus* from, uint32_t address, unsigned words, hls::stream<Bus>& to, Unit unit) {
    (void)unit;
words:
    for (unsigned i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
        LW_COUNT(unit);
        to.write(from[address + i]);
    }
}

// One vector whose channels lie anywhere: entries hold the address of a field, its format and whether there is one.
// Bits 0-8 bit in the word, 9-40 word, 41-47 bits of the field, 48-53 shift, 63 zero; the bias is the step's.
inline void gather(const Step& s, const Bus* maps, uint32_t slot, hls::stream<Bus>& entries, hls::stream<Bus>& xs) {
    Bus line;
words:
    for (unsigned k = 0; k < 4; ++k) {
        const Bus e = entries.read();
    elements:
        for (unsigned i = 0; i < 8; ++i) {
#pragma HLS PIPELINE II = 1
            LW_COUNT(MAPS);
            const uint64_t entry = e.v[i];
            const unsigned bit = unsigned(entry & 511), bits = unsigned(entry >> 41 & 127), shift = unsigned(entry >> 48 & 63);
            const Bus word = maps[resolve(uint32_t(entry >> 9), slot)];
            uint64_t field = word.v[bit / 64] >> (bit % 64);
            if (bits < 64) field &= bits == 2 ? 1 : (uint64_t(1) << bits) - 1;
            if (bits == 2) field += 2 * (word.v[bit / 64] >> (bit % 64 + 32) & 1);
            line.v[i] = entry >> 63 ? 0 : uint64_t(plus(int64_t(field << shift), s.f[BIAS]));
        }
        xs.write(line);
    }
}

template <typename E>
void read_maps(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], const Bus* maps, uint32_t slot, hls::stream<Bus>& entries, hls::stream<Bus>& xs) {
    if (s[KIND] == NONE) return;
    Walk at;
    at.start(s);
    const bool channelwise = s[KIND] == WINDOW || s[KIND] == WHOLE;
tiles:
    for (at.tile = 0; at.tile < s[OUT_HEIGHT]; at.tile += s[TILE_ROWS]) {
        at.clip(s);
        const int groups = s[KIND] == GATHER ? s[GROUPS_OUT] : s[GROUPS_IN];
    groups:
        for (int g = 0; g < groups; ++g) {
            if (s[KIND] == GATHER) {
            vectors:
                for (int k = at.rows * s[OUT_WIDTH]; k > 0; --k) gather(s, maps, slot, entries, xs);
            } else {
                const uint32_t base = resolve(addresses[g], slot);
            rows:
                for (int y = at.from(s); y < at.to(s); ++y) burst(maps, base + uint32_t(y * s[PITCH]), words_of(unsigned(s[WIDTH]), unsigned(s[BITS])), xs, MAPS);
            }
        }
        (void)channelwise;
    }
}

// Words of the weights of one group of outputs; its first and last input group lie in the addresses.
template <typename E> unsigned weight_words(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], int group) {
    return addresses[s[RANGES] + 3 * group + 2];
}

template <typename E>
void read_weights(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], const Bus* weights, hls::stream<Bus>& entries, hls::stream<Bus>& ws) {
    if (s[KIND] == NONE) return;
    uint32_t address = uint32_t(s[WEIGHT_BASE]);
tiles:
    for (int tile = 0; tile < s[OUT_HEIGHT]; tile += s[TILE_ROWS]) {
        const int rows = least(s[TILE_ROWS], s[OUT_HEIGHT] - tile);
        if (s[KIND] != GATHER) address = uint32_t(s[WEIGHT_BASE]);
    groups:
        for (int g = 0; g < s[GROUPS_OUT]; ++g) {
            const unsigned words = s[KIND] == GATHER ? unsigned(rows * s[OUT_WIDTH]) * 4 : weight_words<E>(s, addresses, g);
            if (s[KIND] == GATHER) {
                burst(weights, address, words, entries, WEIGHTS);
            } else {
                burst(weights, address, words, ws, WEIGHTS);
            }
            address += words;
        }
    }
}

// Words of one vector row of a map that a LOAD reads: all of a row segment, or the one vector of a gate.
inline unsigned load_words(const Micro& m, const Walk& at) { return words_of(m.b ? unsigned(at.block_cols) : 1u, unsigned(m.p)); }

template <typename E>
void read_operands(const Step& s, const Micro (&micros)[E::MICROS], const uint32_t (&addresses)[E::ADDRESSES], const Bus* tables, const Bus* maps,
                   uint32_t slot, hls::stream<Bus>& operands) {
    Walk at;
    at.start(s);
    const unsigned table = unsigned(s[TABLE_ROWS]) * E::TABLE_WORDS;
tiles:
    for (at.tile = 0; at.tile < s[OUT_HEIGHT]; at.tile += s[TILE_ROWS]) {
    groups:
        for (at.group = 0; at.group < s[GROUPS_OUT]; ++at.group) {
            at.clip(s);
            burst(tables, uint32_t(s[TABLE_BASE]) + uint32_t(at.group) * table, table, operands, OPERANDS);
            bool more = true;
        blocks:
            while (more) {
            micros:
                for (int k = 0; k < s[MICROS]; ++k) {
                    const Micro& m = micros[k];
                    if (m.code() != LOAD) continue;
                    const uint32_t base = resolve(addresses[m.row + at.group], slot);
                rows:
                    for (int y = 0; y < (m.b ? at.block_rows : 1); ++y) {
                        const int row = at.tile + at.block_row + y;
                        const uint32_t start = m.b ? uint32_t(row * int(m.b)) + words_of(unsigned(at.block_col), unsigned(m.p)) : 0;
                        burst(maps, base + start, load_words(m, at), operands, OPERANDS);
                    }
                }
                more = at.block(s);
            }
        }
    }
}

template <typename E>
void write_results(const Step& s, const Micro (&micros)[E::MICROS], const uint32_t (&addresses)[E::ADDRESSES], Bus* maps, uint32_t slot,
                   hls::stream<Bus>& results) {
    Walk at;
    at.start(s);
tiles:
    for (at.tile = 0; at.tile < s[OUT_HEIGHT]; at.tile += s[TILE_ROWS]) {
    groups:
        for (at.group = 0; at.group < s[GROUPS_OUT]; ++at.group) {
            at.clip(s);
            bool more = true;
        blocks:
            while (more) {
            micros:
                for (int k = 0; k < s[MICROS]; ++k) {
                    const Micro& m = micros[k];
                    if (m.code() != STORE) continue;
                    const uint32_t base = resolve(addresses[m.row + at.group], slot);
                    const unsigned words = words_of(unsigned(at.block_cols), unsigned(m.p)), skip = words_of(unsigned(at.block_col), unsigned(m.p));
                rows:
                    for (int y = 0; y < at.block_rows; ++y) {
                        const uint32_t start = base + uint32_t((at.tile + at.block_row + y) * int(m.b)) + skip;
                    words:
                        for (unsigned i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
                            LW_COUNT(RESULTS);
                            maps[start + i] = results.read();
                        }
                    }
                }
                more = at.block(s);
            }
        }
    }
}

}  // namespace lw
