// The finishing unit: elementwise operations on a block of vectors, one operation after the other, 32 channels per cycle.
#pragma once
#include "lw_step.hpp"

namespace lw {

// #{k : v >= t[row + k]} for k < levels, E::SEARCH halvings of the interval per call, from step `bit` on; each halving reads a copy of the table.
template <typename E>
unsigned search(const ap_int<E::TABLE_BITS> (&table)[E::SEARCH][E::TABLE][LANES], unsigned lane, int64_t v, unsigned row, unsigned levels, unsigned bit,
                unsigned found) {
#pragma HLS INLINE
halve:
    for (unsigned k = 0; k < E::SEARCH; ++k) {
#pragma HLS UNROLL
        const unsigned next = found + bit, at = row + next - 1;
        if (bit && next <= levels && v >= int64_t(table[k][at < E::TABLE ? at : 0][lane])) found = next;
        bit >>= 1;
    }
    return found;
}

template <typename E>
void finish(const Step& s, const Micro (&micros)[E::MICROS], hls::stream<Vector<E>>& ys, hls::stream<Bus>& operands, hls::stream<Bus>& results) {
    ap_int<E::VALUE_BITS> value[E::REGISTERS][E::BLOCK][LANES];
#pragma HLS ARRAY_RESHAPE variable = value dim = 3 complete
#pragma HLS ARRAY_PARTITION variable = value dim = 1 complete
    ap_int<E::TABLE_BITS> table[E::SEARCH][E::TABLE][LANES];
#pragma HLS ARRAY_PARTITION variable = table dim = 1 complete
#pragma HLS ARRAY_PARTITION variable = table dim = 3 complete
    int64_t constant[5][LANES];
#pragma HLS ARRAY_PARTITION variable = constant dim = 0 complete
    Unpacker<E> unpack;
    Packer<E> pack;
    Walk at;
    at.start(s);
tiles:
    for (at.tile = 0; at.tile < s[OUT_HEIGHT]; at.tile += s[TILE_ROWS]) {
    groups:
        for (at.group = 0; at.group < s[GROUPS_OUT]; ++at.group) {
            at.clip(s);
        tables:
            for (unsigned i = 0; i < unsigned(s[TABLE_ROWS]) * E::TABLE_WORDS; ++i) {
#pragma HLS PIPELINE II = 1
                LW_COUNT(FINISH);
                const Bus word = operands.read();
                const unsigned each = 512 / E::TABLE_BITS, first = i % E::TABLE_WORDS * each;
                for (unsigned p = 0; p < each; ++p) {
#pragma HLS UNROLL
                    const uint64_t entry = E::TABLE_BITS == 64 ? word.v[p % 8] : word.v[p / 2 % 8] >> (p % 2 * 32);
                    for (unsigned k = 0; k < E::SEARCH; ++k) {
#pragma HLS UNROLL
                        table[k][i / E::TABLE_WORDS][first + p] = ap_int<E::TABLE_BITS>(int64_t(entry));
                    }
                }
            }
            bool more = true;
        blocks:
            while (more) {
                const unsigned cols = unsigned(at.block_cols), vectors = unsigned(at.block_rows) * cols;
                if (s[RECEIVES]) {  // in the order in which rows are worked on together
                    unsigned row = 0, col = 0, sub = 0;
                receive:
                    for (unsigned i = 0; i < vectors; ++i) {
#pragma HLS PIPELINE II = 1
                        LW_COUNT(FINISH);
                        const Vector<E> y = ys.read();
                        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                            value[0][(sub + row) * cols + col][p] = y.v[p];
                        }
                        if (++row == unsigned(least(s[TOGETHER], at.block_rows - int(sub)))) {
                            row = 0;
                            if (++col == cols) {
                                col = 0;
                                sub += unsigned(s[TOGETHER]);
                            }
                        }
                    }
                }
            micros:
                for (int k = 0; k < s[MICROS]; ++k) {
                    const Micro m = micros[k];
                    const Format format = {int(m.p), int(m.q), m.r};
                    if (m.code == LOAD) {
                        const unsigned count = m.b ? cols : 1, rows = m.b ? unsigned(at.block_rows) : 1;
                    load_rows:
                        for (unsigned y = 0; y < rows; ++y) {
                            unpack.start();
                            unsigned x = 0;
                        load:
                            for (unsigned i = 0; i < count * beats_of(unsigned(m.p)); ++i) {
#pragma HLS PIPELINE II = 1
                                LW_COUNT(FINISH);
                                if (unpack.take(format, operands)) {
                                    for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                        value[m.to][y * cols + x][p] = unpack.value.v[p];
                                    }
                                    ++x;
                                }
                            }
                        }
                        if (!m.b) {
                        spread:
                            for (unsigned i = 0; i < vectors; ++i) {
#pragma HLS PIPELINE II = 1
                                LW_COUNT(FINISH);
                                for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                    value[m.to][i][p] = unpack.value.v[p];
                                }
                            }
                        }
                        continue;
                    }
                    if (m.code == STORE) {
                    store_rows:
                        for (unsigned y = 0; y < unsigned(at.block_rows); ++y) {
                            pack.start();
                            unsigned x = 0, beat = 0;
                        store:
                            for (unsigned i = 0; i < cols * beats_of(unsigned(m.p)); ++i) {
#pragma HLS PIPELINE II = 1
                                LW_COUNT(FINISH);
                                Vector<E> one;
                                for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                    one.v[p] = value[m.a][y * cols + x][p];
                                }
                                pack.put(format, one, beat, results);
                                if (++beat == beats_of(unsigned(m.p))) {
                                    beat = 0;
                                    ++x;
                                }
                            }
                            pack.flush(results);
                        }
                        continue;
                    }
                    // constants of the channels that hold for the whole block
                    const unsigned rows = m.code == AFFINE ? (m.b ? 5 : 2) : m.code == PERMUTE ? 1 : m.code == SEARCH ? unsigned(m.r >= 0) : 0;
                constants:
                    for (unsigned i = 0; i < rows; ++i) {
#pragma HLS PIPELINE II = 1
                        LW_COUNT(FINISH);
                        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                            constant[i][p] = int64_t(table[0][(m.code == SEARCH ? unsigned(m.r) : unsigned(m.row)) + i][p]);
                        }
                    }
                elements:
                    for (unsigned i = 0; i < vectors; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = value inter false
                        LW_COUNT(FINISH);
                        Vector<E> y;
                        if (m.code == LUT) {  // p entries from code q on
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                const int64_t at0 = plus(int64_t(value[m.a][i][p]), -m.q), index = at0 < 0 || at0 >= m.p ? 0 : at0;
                                y.v[p] = int64_t(table[0][unsigned(m.row + index)][p]);
                            }
                        } else if (m.code == SEARCH) {  // p levels, from step q & 2^30-1 on; the first pass begins at 0
                            const unsigned bit = unsigned(m.q) & 0x3fffffff;
                            const bool first = (m.q >> 30 & 1) != 0;
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                const int64_t x = int64_t(value[m.a][i][p]), v = m.r >= 0 && constant[0][p] < 0 ? times(x, -1) : x;
                                const unsigned row = unsigned(m.row) + (m.b >= 0 ? unsigned(int64_t(value[m.b >= 0 ? m.b : 0][i][p])) : 0);
                                y.v[p] = int64_t(search<E>(table, p, v, row, unsigned(m.p), bit, first ? 0 : unsigned(int64_t(value[m.to][i][p]))));
                            }
                        } else if (m.code == AFFINE) {  // p: shift, q..r: limits
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                const int64_t x = int64_t(ap_int<E::AFFINE_BITS>(value[m.a][i][p]));
                                const bool upper = !m.b || x >= constant[2][p];
                                const int64_t sum = plus(times(x, int64_t(ap_int<E::FACTOR_BITS>(upper ? constant[0][p] : constant[3][p]))), upper ? constant[1][p] : constant[4][p]);
                                y.v[p] = ql::clamp<int64_t>(sum >> m.p, m.q, m.r);
                            }
                        } else if (m.code == PERMUTE) {  // p: the first one, channels nobody names become 0
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                const int64_t from = constant[0][p];
                                const int64_t moved = int64_t(ap_int<E::PERMUTE_BITS>(value[m.a][i][unsigned(from) % LANES]));
                                y.v[p] = from >= 0 ? moved : m.p ? 0 : int64_t(value[m.to][i][p]);
                            }
                        } else {
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                const int64_t a = int64_t(value[m.a][i][p]), b = int64_t(value[m.b][i][p]);
                                y.v[p] = m.code == ADD       ? plus(a, b)
                                         : m.code == PRODUCT ? times(int64_t(ap_int<E::PRODUCT_BITS>(a)), int64_t(ap_int<E::PRODUCT_BITS>(b)))
                                                             : plus(times(a, m.p), m.q);
                            }
                        }
                        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                            value[m.to][i][p] = y.v[p];
                        }
                    }
                }
                more = at.block(s);
            }
        }
    }
}

}  // namespace lw
