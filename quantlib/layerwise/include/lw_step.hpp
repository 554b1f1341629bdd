// What all units share: the word of the bus, the fields of a step, storage formats, and the walk over tiles and blocks.
#pragma once
#include "ql.hpp"

// A pragma that names a macro (UG1399, "Using #define with pragmas"). The macros say where memories lie; engine.hpp defines them.
#define LW_TEXT(...) _Pragma(#__VA_ARGS__)
#define LW_PRAGMA(...) LW_TEXT(__VA_ARGS__)
#ifndef LW_REGISTERS
#define LW_REGISTERS bram
#define LW_LANE_TILE bram
#define LW_WINDOW_TILE bram
#define LW_TABLE lutram
#define LW_ROW_WORDS 1
#endif

namespace lw {

const unsigned LANES = 32;  // channels of a vector

struct Bus {
    uint64_t v[8];
};

// Units, in the order of the counters.
enum Unit { PROGRAM, MAPS, WEIGHTS, OPERANDS, COMPUTE, FINISH, RESULTS, UNITS };

// What the simulation counts: words on a port, iterations of a unit's loops.
#ifdef __SYNTHESIS__
#define LW_COUNT(unit)
#else
inline uint64_t* counters() {
    static uint64_t all[UNITS] = {};
    return all;
}
#define LW_COUNT(unit) ++lw::counters()[unit]
#endif

// Where the vectors of a step come from.
enum Kind { NONE, XNOR, MULTIPLY, WINDOW, WHOLE, GATHER };
// What a window does with its taps, and what MULTIPLY does with its sums.
enum Mode { MAC, SUM, MAX, SATURATE };
// Operations of the finishing unit.
enum Code { LOAD, STORE, LUT, SEARCH, AFFINE, SCALE, ADD, PRODUCT, PERMUTE };
const int64_t JOINED = 1 << 8;  // with a code: in one pass with the operation before it, or with the vectors as they arrive

// Fields of a step, 64 words of 64 bits; docs/layerwise.md says what each holds.
enum Field {
    KIND, MODE, GROUPS_IN, HEIGHT, WIDTH, BITS, SHIFT, BIAS, PITCH, LAST_IN,
    GROUPS_OUT, OUT_HEIGHT, OUT_WIDTH, LAST_OUT, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, TOP, LEFT, DILATION_H, DILATION_W,
    TILE_ROWS, TOGETHER, BLOCK_ROWS, BLOCK_COLS, WEIGHT_BASE, HEAD_WORDS, MASKED, RANGES,
    MERGE, MSB, LSB, FRACTION_IN, MERGE_SHIFT, LOW, HIGH, HALF,
    TABLE_BASE, TABLE_ROWS, MICROS, ADDRESSES, RECEIVES, FIELDS
};
const unsigned STEP_WORDS = 8, STEP_FIELDS = 64;
static_assert(FIELDS <= STEP_FIELDS, "a step has 64 fields");

struct Step {
    int64_t f[STEP_FIELDS];
    int operator[](Field k) const { return int(f[k]); }
};

// A map in memory: n = (field << shift) + bias, fields of `bits` bits (1 and 2: bit planes of 32 channels).
struct Format {
    int bits, shift;
    int64_t bias;
};

// One operation of the finishing unit: eight fields, one word of the bus.
struct Micro {
    int64_t word, to, a, b, row, p, q, r;
    int code() const { return int(word & (JOINED - 1)); }
    bool joined() const { return (word & JOINED) != 0; }
    Format format() const { return {int(p), int(q), r}; }
};

// Bus words of `cols` vectors side by side, and words (or vectors) per transfer: the beats of one vector.
inline unsigned words_of(unsigned cols, unsigned bits) { return (cols * bits + 15) / 16; }
inline unsigned beats_of(unsigned bits) { return bits > 16 ? bits / 16 : 1; }

inline int64_t times(int64_t a, int64_t b) { return int64_t(uint64_t(a) * uint64_t(b)); }  // padding channels hold any bits
inline int64_t plus(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }
inline int64_t turned(int64_t field, const Format& f) { return plus(int64_t(uint64_t(field) << f.shift), f.bias); }

template <typename E> struct Vector {
    ap_int<E::VALUE_BITS> v[LANES];
};

// Takes vectors out of the words of a row of a map, one beat per call.
template <typename E> struct Unpacker {
    Bus word;
    unsigned slot;
    Vector<E> value;

    void start() { slot = 0; }
    bool take(const Format& f, hls::stream<Bus>& in) {
#pragma HLS INLINE
        const unsigned bits = unsigned(f.bits), per = bits > 16 ? bits / 16 : 16 / bits;
        if (bits > 16 || slot == 0) word = in.read();
        if (bits > 16) {
            const unsigned lanes = 512 / bits;
            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                if (p / lanes == slot) {
                    const unsigned k = p % lanes;
                    const uint64_t field = bits == 32 ? (word.v[k / 2 % 8] >> (k % 2 * 32)) & 0xffffffffu : word.v[k % 8];
                    value.v[p] = turned(int64_t(field), f);
                }
            }
        } else if (bits <= 2) {
            const unsigned at = slot * bits;  // planes of 32 bits
            const uint32_t low = uint32_t(word.v[at / 2] >> (at % 2 * 32)), high = bits == 2 ? uint32_t(word.v[at / 2] >> 32) : 0;
            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                value.v[p] = turned((low >> p & 1) + 2 * (high >> p & 1), f);
            }
        } else {
            const uint64_t mask = (uint64_t(1) << bits) - 1;
            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                const unsigned bit = (slot * LANES + p) * bits;
                value.v[p] = turned(int64_t(word.v[bit / 64] >> (bit % 64) & mask), f);
            }
        }
        if (++slot < per) return bits <= 16;
        slot = 0;
        return true;
    }
};

// Puts vectors into the words of a row, one beat per call; `flush` ends a row.
template <typename E> struct Packer {
    Bus word;
    unsigned slot;

    void clear() {
        for (unsigned k = 0; k < 8; ++k) {
#pragma HLS UNROLL
            word.v[k] = 0;
        }
    }
    void start() {
        slot = 0;
        clear();
    }
    // Writes beat `beat` of a vector.
    void put(const Format& f, const Vector<E>& x, unsigned beat, hls::stream<Bus>& out) {
#pragma HLS INLINE
        const unsigned bits = unsigned(f.bits), lanes = bits > 16 ? 512 / bits : LANES;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            if (p / lanes != beat) continue;
            const uint64_t field = uint64_t(plus(int64_t(x.v[p]), -f.bias) >> f.shift), k = p % lanes;
            if (bits == 64) {
                word.v[k] = field;
            } else if (bits <= 2) {
                const unsigned at = slot * bits;
                word.v[at / 2] |= (field & 1) << (at % 2 * 32 + p);
                if (bits == 2) word.v[at / 2] |= (field >> 1 & 1) << (32 + p);
            } else {
                const unsigned bit = unsigned((bits > 16 ? k : slot * LANES + p) * bits);
                word.v[bit / 64] |= (field & ((uint64_t(1) << (bits % 64)) - 1)) << (bit % 64);
            }
        }
        ++slot;
        if (bits > 16 || slot == 16 / bits) {
            out.write(word);
            start();
        }
    }
    void flush(hls::stream<Bus>& out) {
        if (slot) out.write(word);
        start();
    }
};

inline int least(int a, int b) { return a < b ? a : b; }

// Tiles of output rows; in each the groups of 32 output channels; in each blocks of rows and columns. Every unit walks alike.
struct Walk {
    int tile, rows, group, block_row, block_col, block_rows, block_cols;

    void start(const Step& s) {
        tile = group = block_row = block_col = 0;
        clip(s);
    }
    void clip(const Step& s) {
        rows = least(s[TILE_ROWS], s[OUT_HEIGHT] - tile);
        block_rows = least(s[BLOCK_ROWS], rows - block_row);
        block_cols = least(s[BLOCK_COLS], s[OUT_WIDTH] - block_col);
    }
    // To the next block; false when it begins another group.
    bool block(const Step& s) {
        block_col += s[BLOCK_COLS];
        if (block_col >= s[OUT_WIDTH]) {
            block_col = 0;
            block_row += s[BLOCK_ROWS];
        }
        const bool more = block_row < rows;
        if (!more) block_row = 0;
        clip(s);
        return more;
    }
    // The input rows of the tile, clipped to the map.
    int first(const Step& s) const { return tile * s[STRIDE_H] - s[TOP]; }
    int from(const Step& s) const { return first(s) > 0 ? first(s) : 0; }
    int to(const Step& s) const { return least((tile + rows - 1) * s[STRIDE_H] - s[TOP] + (s[KERNEL_H] - 1) * s[DILATION_H] + 1, s[HEIGHT]); }
};

// Addresses with the top bit set are relative to the slot of the image.
const uint32_t IN_SLOT = 0x80000000u;
inline uint32_t resolve(uint32_t address, uint32_t slot) { return address & IN_SLOT ? slot + (address & ~IN_SLOT) : address; }

}  // namespace lw
