// The units that make sums over windows: signs by XNOR and popcount, products on lanes, and windows channel by channel.
#pragma once
#include "lw_sweep.hpp"

namespace lw {

inline int popcount(uint32_t x) {
#pragma HLS INLINE
#ifdef QL_SYNTHESIS_BODIES
    int n = 0;
    for (unsigned i = 0; i < 32; ++i) {
#pragma HLS UNROLL
        n += int(x >> i & 1);
    }
    return n;
#else
    return __builtin_popcount(x);
#endif
}

// Signs times signs: 32 inputs and 32 outputs of ROWS rows per term, one or two planes. +1 is a set bit.
template <typename E> struct Xnor {
    static const unsigned ROWS = E::XNOR_ROWS, BANKS = E::XNOR_BANKS, IN = LANES, OUT = LANES, HALVES = E::HALVES;
    static const bool CHANNELWISE = false;
    uint64_t tile[BANKS][E::XNOR_TILE];  // high plane above the low one
    uint32_t sign[HALVES][E::XNOR_WEIGHTS][LANES], mask[HALVES][E::XNOR_MASKS][LANES];
    int32_t gate[HALVES][LANES], held_gate[LANES];
    ap_int<E::XNOR_BITS> high[ROWS][LANES], low[ROWS][LANES], held_high[ROWS][LANES], held_low[ROWS][LANES];
    Bus word;
    unsigned slot;

    // Where the memories lie and which of their words are read side by side.
    void layout() {
#pragma HLS INLINE
#pragma HLS ARRAY_PARTITION variable = tile dim = 1 complete
#pragma HLS ARRAY_RESHAPE variable = sign dim = 3 complete
#pragma HLS ARRAY_RESHAPE variable = mask dim = 3 complete
#pragma HLS ARRAY_PARTITION variable = gate dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = held_gate dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = high dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = low dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = held_high dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = held_low dim = 0 complete
    }
    void row() { slot = 0; }
    bool keep(unsigned bank, unsigned at, const Step& s, hls::stream<Bus>& xs) {
#pragma HLS INLINE
        const unsigned bits = unsigned(s[BITS]);
        if (slot == 0) word = xs.read();
        const uint64_t both = word.v[slot * bits / 2];
        tile[bank][at] = bits == 2 ? both : both >> (slot % 2 * 32) << 32;
        if (++slot == 16 / bits) slot = 0;
        return true;
    }
    void take(unsigned half, unsigned i, const Step& s, const Bus& w) {
#pragma HLS INLINE
        const unsigned head = unsigned(s[HEAD_WORDS]), each = s[MASKED] ? 4 : 2;
        const unsigned k = i < head ? i : i - head, part = k % each % 2 * 16, at = k / each;
        for (unsigned p = 0; p < 16; ++p) {
#pragma HLS UNROLL
            const uint32_t bits = uint32_t(w.v[p / 2] >> (p % 2 * 32));
            if (i < head)
                gate[half][part + p] = int32_t(bits);
            else if (k % each < 2)
                sign[half][at][part + p] = bits;
            else
                mask[half][at % E::XNOR_MASKS][part + p] = bits;
        }
        (void)half;
    }
    void clear() {
        for (unsigned r = 0; r < ROWS; ++r) {
#pragma HLS UNROLL
            for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
                high[r][o] = low[r][o] = 0;
            }
        }
    }
    void term(const Step& s, const Term& t) {
#pragma HLS INLINE
        if (t.x < 0 || t.x >= s[WIDTH]) return;
        const uint32_t valid = t.g == s[GROUPS_IN] - 1 && s[LAST_IN] < int(LANES) ? (uint32_t(1) << s[LAST_IN]) - 1 : 0xffffffffu;
        const int all = popcount(valid), top = t.tile * s[STRIDE_H] - s[TOP];
        // one read of every bank: at most one of the rows lies in it
        uint64_t word[BANKS];
#pragma HLS ARRAY_PARTITION variable = word complete
        for (unsigned bank = 0; bank < BANKS; ++bank) {
#pragma HLS UNROLL
            unsigned line = 0;
            for (unsigned r = 0; r < ROWS; ++r) {
#pragma HLS UNROLL
                const unsigned row = unsigned(t.row + int(r) * s[STRIDE_H]);
                if (int(r) < t.rows && row % BANKS == bank && top + int(row) >= 0 && top + int(row) < s[HEIGHT]) line = row / BANKS;
            }
            word[bank] = tile[bank][(line * unsigned(t.stored) + unsigned(t.g)) * unsigned(s[WIDTH]) + unsigned(t.x)];
        }
        for (unsigned r = 0; r < ROWS; ++r) {
#pragma HLS UNROLL
            const int row = t.row + int(r) * s[STRIDE_H];
            if (int(r) >= t.rows || top + row < 0 || top + row >= s[HEIGHT]) continue;
            const uint64_t both = word[unsigned(row) % BANKS];
            const uint32_t a = uint32_t(both >> 32), b = uint32_t(both);
            for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
                const uint32_t m = s[MASKED] ? mask[t.half][t.weight % E::XNOR_MASKS][o] : valid, w = ~sign[t.half][t.weight][o];
                const int n = s[MASKED] ? popcount(m) : all;
                high[r][o] = int(high[r][o]) + 2 * popcount((a ^ w) & m) - n;
                low[r][o] = int(low[r][o]) + 2 * popcount((b ^ w) & m) - n;
            }
        }
    }
    void hold() {
        for (unsigned r = 0; r < ROWS; ++r) {
#pragma HLS UNROLL
            for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
                held_high[r][o] = high[r][o];
                held_low[r][o] = low[r][o];
            }
        }
    }
    void begin(unsigned half) {
        for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
            held_gate[o] = gate[half][o];
        }
    }
    // One plane: the sum. Two planes: 2 * high + low where the gate is open, or the merge in fixed point.
    Vector<E> result(unsigned r, const Step& s) const {
#pragma HLS INLINE
        Vector<E> y;
        for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
            const int m = int(held_high[r][o]), l = m >= held_gate[o] ? int(held_low[r][o]) : 0;
            if (s[BITS] == 1) {
                y.v[o] = m;
            } else if (!s[MERGE]) {
                y.v[o] = 2 * m + l;
            } else {
                const int64_t lo = s.f[LOW], hi = s.f[HIGH], half = s.f[HALF], one = int64_t(1) << s[FRACTION_IN];
                const int64_t t = ql::clamp<int64_t>((s.f[MSB] * ql::clamp<int64_t>(m * one, lo, hi) + half) >> s[MERGE_SHIFT], lo, hi);
                const int64_t sum = t * (int64_t(1) << s[MERGE_SHIFT]) + s.f[LSB] * ql::clamp<int64_t>(l * one, lo, hi) + half;
                y.v[o] = ql::clamp<int64_t>(sum >> s[MERGE_SHIFT], lo, hi);
            }
        }
        return y;
    }
};

// Products on lanes: IN inputs of OUT outputs per term. With SATURATE every product is shifted and every sum clamped, in the order of the channels.
template <typename E> struct Multiply {
    static const unsigned ROWS = 1, BANKS = 1, IN = E::INPUTS, OUT = E::OUTPUTS, HALVES = E::HALVES;
    static const bool CHANNELWISE = false;
    static const unsigned ROW_BITS = IN * OUT * E::WEIGHT_BITS;                    // weights of a term
    static const unsigned ROW_WORDS = ROW_BITS > 512 ? ROW_BITS / 512 : 1;         // in words of the bus,
    static const unsigned WORD_ROWS = ROW_BITS > 512 ? 1 : 512 / ROW_BITS;         // or terms in a word
    ap_int<E::LANE_BITS> tile[1][E::LANE_TILE][LANES];
    Bus weights[HALVES][E::LANE_WEIGHTS];
    ap_int<E::VALUE_BITS> sum[LANES], held[LANES];
    Unpacker<E> unpack;

    // Where the memories lie and which of their words are read side by side.
    void layout() {
#pragma HLS INLINE
#pragma HLS ARRAY_RESHAPE variable = tile dim = 3 complete
        LW_PRAGMA(HLS BIND_STORAGE variable = tile type = ram_2p impl = LW_LANE_TILE)
        LW_PRAGMA(HLS ARRAY_PARTITION variable = weights dim = 2 cyclic factor = LW_ROW_WORDS)
#pragma HLS ARRAY_PARTITION variable = sum dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = held dim = 0 complete
    }
    void row() { unpack.start(); }
    bool keep(unsigned, unsigned at, const Step& s, hls::stream<Bus>& xs) {
#pragma HLS INLINE
        const Format format = {s[BITS], s[SHIFT], s.f[BIAS]};
        if (!unpack.take(format, xs)) return false;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            tile[0][at][p] = int64_t(unpack.value.v[p]);
        }
        return true;
    }
    void take(unsigned half, unsigned i, const Step& s, const Bus& w) {
#pragma HLS INLINE
        weights[half][i] = w;
        (void)s;
    }
    void clear() {
        for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
            sum[o] = 0;
        }
    }
    int64_t weight(unsigned half, unsigned row, unsigned k) const {
#pragma HLS INLINE
        const unsigned bit = row % WORD_ROWS * ROW_BITS % 512 + k * E::WEIGHT_BITS, at = row / WORD_ROWS * ROW_WORDS + bit / 512;
        const uint64_t field = weights[half][at].v[bit % 512 / 64] >> (bit % 64);
        return int64_t(field << (64 - E::WEIGHT_BITS)) >> (64 - E::WEIGHT_BITS);
    }
    void term(const Step& s, const Term& t) {
#pragma HLS INLINE
        const int y = t.row + t.tile * s[STRIDE_H] - s[TOP];
        if (t.x < 0 || t.x >= s[WIDTH] || y < 0 || y >= s[HEIGHT]) return;
        const unsigned at = (unsigned(t.row) * unsigned(t.stored) + unsigned(t.g)) * unsigned(s[WIDTH]) + unsigned(t.x);
        for (unsigned o = 0; o < OUT; ++o) {
#pragma HLS UNROLL
            int64_t dot = 0;
            for (unsigned i = 0; i < IN; ++i) {
#pragma HLS UNROLL
                dot += times(int64_t(tile[0][at][(unsigned(t.c) * IN + i) % LANES]), weight(t.half, t.weight, o * IN + i));
            }
            ap_int<E::VALUE_BITS>& total = sum[(unsigned(t.p) * OUT + o) % LANES];
            total = plus(int64_t(total), dot);
        }
    }
    void hold() {
        for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
            held[o] = sum[o];
        }
    }
    void begin(unsigned) {}
    Vector<E> result(unsigned, const Step&) const {
#pragma HLS INLINE
        Vector<E> y;
        for (unsigned o = 0; o < LANES; ++o) {
#pragma HLS UNROLL
            y.v[o] = held[o];
        }
        return y;
    }
};

// Windows channel by channel, 32 of them and one tap per term: products (a depthwise convolution), sums, maxima; and the dense layer whose sums
// saturate, where a term is one input channel for 32 outputs. A word of weights holds those of one term, or a part of them.
template <typename E> struct Window {
    static const unsigned ROWS = 1, BANKS = 1, IN = LANES, OUT = LANES, HALVES = 1;
    static const bool CHANNELWISE = true;
    static const unsigned TERM_WORDS = E::WINDOW_BITS / 16;
    ap_int<E::LANE_BITS> tile[1][E::WINDOW_TILE][LANES];
    ap_int<E::WINDOW_BITS> weights[E::WINDOW_WEIGHTS][LANES];
    ap_int<E::VALUE_BITS> sum[LANES], held[LANES];
    bool any;
    Unpacker<E> unpack;

    // Where the memories lie and which of their words are read side by side.
    void layout() {
#pragma HLS INLINE
#pragma HLS ARRAY_RESHAPE variable = tile dim = 3 complete
        LW_PRAGMA(HLS BIND_STORAGE variable = tile type = ram_2p impl = LW_WINDOW_TILE)
#pragma HLS ARRAY_RESHAPE variable = weights dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = sum dim = 0 complete
#pragma HLS ARRAY_PARTITION variable = held dim = 0 complete
    }
    void row() { unpack.start(); }
    bool keep(unsigned, unsigned at, const Step& s, hls::stream<Bus>& xs) {
#pragma HLS INLINE
        const Format format = {s[BITS], s[SHIFT], s.f[BIAS]};
        if (!unpack.take(format, xs)) return false;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            tile[0][at][p] = int64_t(unpack.value.v[p]);
        }
        return true;
    }
    void take(unsigned, unsigned i, const Step&, const Bus& w) {
#pragma HLS INLINE
        const unsigned each = LANES / TERM_WORDS;
        for (unsigned p = 0; p < each; ++p) {
#pragma HLS UNROLL
            const unsigned bit = p * E::WINDOW_BITS;
            weights[i / TERM_WORDS][(i % TERM_WORDS * each + p) % LANES] = ap_int<E::WINDOW_BITS>(int64_t(w.v[bit / 64] >> (bit % 64)));
        }
    }
    void clear() {
        any = false;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            sum[p] = 0;
        }
    }
    void term(const Step& s, const Term& t) {
#pragma HLS INLINE
        const int y = t.row + t.tile * s[STRIDE_H] - s[TOP];
        if (t.x < 0 || t.x >= s[WIDTH] || y < 0 || y >= s[HEIGHT]) return;
        const unsigned at = unsigned(t.row) * unsigned(s[WIDTH]) + unsigned(t.x);
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            const int64_t x = int64_t(tile[0][at][p]), before = int64_t(sum[p]);
            if (s[MODE] == MAX)
                sum[p] = any && before > x ? before : x;
            else
                sum[p] = plus(before, s[MODE] == MAC ? times(x, int64_t(weights[t.weight][p])) : x);
        }
        any = true;
    }
    void hold() {
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            held[p] = sum[p];
        }
    }
    void begin(unsigned) {}
    Vector<E> result(unsigned, const Step&) const {
#pragma HLS INLINE
        Vector<E> y;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            y.v[p] = held[p];
        }
        return y;
    }
};

// A window over the whole map: nothing is kept but the result.
template <typename E> void whole(const Step& s, hls::stream<Bus>& xs, hls::stream<Vector<E>>& ys) {
    const Format format = {s[BITS], s[SHIFT], s.f[BIAS]};
    Unpacker<E> unpack;
    ap_int<E::VALUE_BITS> sum[LANES];
#pragma HLS ARRAY_PARTITION variable = sum complete
groups:
    for (int g = 0; g < s[GROUPS_OUT]; ++g) {
        bool any = false;
    rows:
        for (int row = 0; row < s[HEIGHT]; ++row) {
            unpack.start();
        pixels:
            for (unsigned i = 0; i < unsigned(s[WIDTH]) * beats_of(unsigned(s[BITS])); ++i) {
#pragma HLS PIPELINE II = 1
                LW_COUNT(COMPUTE);
                if (!unpack.take(format, xs)) continue;
                for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                    const int64_t x = int64_t(unpack.value.v[p]), before = any ? int64_t(sum[p]) : 0;
                    if (s[MODE] == MAX)
                        sum[p] = any && before > x ? before : x;
                    else
                        sum[p] = plus(before, x);
                }
                any = true;
            }
        }
        Vector<E> y;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            y.v[p] = sum[p];
        }
        ys.write(y);
    }
}

// The dense layer whose sums saturate: the channels of one pixel in order, 32 outputs per iteration. First the biases, then a row per channel.
template <typename E> void saturate(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], hls::stream<Bus>& xs, hls::stream<Bus>& ws, hls::stream<Vector<E>>& ys) {
    const Format format = {s[BITS], s[SHIFT], s.f[BIAS]};
    const unsigned TERM_WORDS = E::WINDOW_BITS / 16, EACH = LANES / TERM_WORDS;
    Unpacker<E> unpack;
    ap_int<E::LANE_BITS> x[E::SATURATE][LANES];
#pragma HLS ARRAY_PARTITION variable = x dim = 2 complete
    int64_t sum[LANES], row[LANES];
#pragma HLS ARRAY_PARTITION variable = sum complete
#pragma HLS ARRAY_PARTITION variable = row complete
load_groups:
    for (int g = 0; g < s[GROUPS_IN]; ++g) {
        unpack.start();
    load:
        for (unsigned i = 0; i < beats_of(unsigned(s[BITS])); ++i) {
#pragma HLS PIPELINE II = 1
            LW_COUNT(COMPUTE);
            if (!unpack.take(format, xs)) continue;
            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                x[g][p] = int64_t(unpack.value.v[p]);
            }
        }
    }
groups:
    for (int g = 0; g < s[GROUPS_OUT]; ++g) {
        const unsigned words = addresses[s[RANGES] + 3 * g + 2];
    words:
        for (unsigned i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
            LW_COUNT(COMPUTE);
            const Bus w = ws.read();
            for (unsigned p = 0; p < EACH; ++p) {
#pragma HLS UNROLL
                const unsigned bit = p * E::WINDOW_BITS;
                row[(i % TERM_WORDS * EACH + p) % LANES] = int64_t(ap_int<E::WINDOW_BITS>(int64_t(w.v[bit / 64] >> (bit % 64))));
            }
            if (i % TERM_WORDS != TERM_WORDS - 1) continue;
            const unsigned k = i / TERM_WORDS;
            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                const int64_t one = k ? int64_t(x[(k - 1) / LANES][(k - 1) % LANES]) : 0;
                const int64_t add = (times(row[p], one) + s.f[HALF]) >> s[MERGE_SHIFT];
                sum[p] = k ? ql::clamp<int64_t>(sum[p] + add, s.f[LOW], s.f[HIGH]) : row[p];
            }
        }
        Vector<E> y;
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            y.v[p] = sum[p];
        }
        ys.write(y);
    }
}

// Vectors that were gathered channel by channel arrive as 32 words of 64 bits.
template <typename E> void arrive(const Step& s, hls::stream<Bus>& xs, hls::stream<Vector<E>>& ys) {
    const unsigned beats = unsigned(s[OUT_HEIGHT] * s[OUT_WIDTH] * s[GROUPS_OUT]) * 4;
    Vector<E> y;
beats:
    for (unsigned i = 0; i < beats; ++i) {
#pragma HLS PIPELINE II = 1
        LW_COUNT(COMPUTE);
        const Bus word = xs.read();
        for (unsigned p = 0; p < 8; ++p) {
#pragma HLS UNROLL
            y.v[i % 4 * 8 + p] = int64_t(word.v[p]);
        }
        if (i % 4 == 3) ys.write(y);
    }
}

}  // namespace lw
