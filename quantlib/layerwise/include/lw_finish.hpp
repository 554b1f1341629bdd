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

// The order in which the vectors of a block arrive: rows that are worked on together side by side, then the next column.
struct Order {
    unsigned row, col, sub;

    void start() { row = col = sub = 0; }
    unsigned index(unsigned cols) const { return (sub + row) * cols + col; }
    void next(unsigned rows, unsigned cols, unsigned together) {
        if (++row < together && sub + row < rows) return;
        row = 0;
        if (++col < cols) return;
        col = 0;
        sub += together;
    }
};

template <typename E> struct Registers {
    typedef ap_int<E::VALUE_BITS> type[E::REGISTERS][E::BLOCK][LANES];
};

// All registers of a place at once: one read of every memory. Which of them an operation takes is a choice behind it.
template <typename E> struct Row {
    Vector<E> x[E::REGISTERS];
};

template <typename E> Row<E> read(const typename Registers<E>::type& value, unsigned i) {
#pragma HLS INLINE
    Row<E> row;
    for (unsigned k = 0; k < E::REGISTERS; ++k) {
#pragma HLS UNROLL
        for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
            row.x[k].v[p] = value[k][i][p];
        }
    }
    return row;
}

template <typename E> Vector<E> get(const typename Registers<E>::type& value, unsigned k, unsigned i) {
#pragma HLS INLINE
    Vector<E> x;
    for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
        x.v[p] = value[k][i][p];
    }
    return x;
}

template <typename E> void put(typename Registers<E>::type& value, unsigned k, unsigned i, const Vector<E>& x) {
#pragma HLS INLINE
    for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
        value[k][i][p] = x.v[p];
    }
}

// A whole block from memory into a register; of a gate one vector, which all take.
template <typename E> void load(const Micro& m, const Walk& at, typename Registers<E>::type& value, hls::stream<Bus>& operands) {
    const unsigned cols = unsigned(at.block_cols), count = m.b ? cols : 1, rows = m.b ? unsigned(at.block_rows) : 1;
    Unpacker<E> unpack;
load_rows:
    for (unsigned y = 0; y < rows; ++y) {
        unpack.start();
        unsigned x = 0;
    load:
        for (unsigned i = 0; i < count * beats_of(unsigned(m.p)); ++i) {
#pragma HLS PIPELINE II = 1
            LW_COUNT(FINISH);
            if (unpack.take(m.format(), operands)) put<E>(value, unsigned(m.to), y * cols + x++, unpack.value);
        }
    }
    if (m.b) return;
spread:
    for (unsigned i = 0; i < unsigned(at.block_rows) * cols; ++i) {
#pragma HLS PIPELINE II = 1
        LW_COUNT(FINISH);
        put<E>(value, unsigned(m.to), i, unpack.value);
    }
}

// A whole block from a register to memory.
template <typename E> void store(const Micro& m, const Walk& at, const typename Registers<E>::type& value, hls::stream<Bus>& results) {
    const unsigned cols = unsigned(at.block_cols), beats = beats_of(unsigned(m.p));
    Packer<E> pack;
store_rows:
    for (unsigned y = 0; y < unsigned(at.block_rows); ++y) {
        pack.start();
        unsigned x = 0, beat = 0;
    store:
        for (unsigned i = 0; i < cols * beats; ++i) {
#pragma HLS PIPELINE II = 1
            LW_COUNT(FINISH);
            pack.put(m.format(), get<E>(value, unsigned(m.a), y * cols + x), beat, results);
            if (++beat == beats) {
                beat = 0;
                ++x;
            }
        }
        pack.flush(results);
    }
}

// One operation on 32 channels; `old` is what its register held.
template <typename E>
Vector<E> operate(const Micro& m, const Vector<E>& a, const Vector<E>& b, const Vector<E>& old,
                  const ap_int<E::TABLE_BITS> (&table)[E::SEARCH][E::TABLE][LANES], const int64_t (&constant)[5][LANES]) {
#pragma HLS INLINE
    Vector<E> y;
    for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
        const int64_t x = int64_t(a.v[p]), z = int64_t(b.v[p]);
        if (m.code() == LUT) {  // p entries from code q on
            const int64_t at = plus(x, -m.q);
            y.v[p] = int64_t(table[0][unsigned(m.row + (at < 0 || at >= m.p ? 0 : at))][p]);
        } else if (m.code() == SEARCH) {  // p levels, from step q & 2^30-1 on; the first pass begins at 0; b: rows to skip; r: row of signs
            const unsigned bit = unsigned(m.q) & 0x3fffffff, row = unsigned(m.row) + (m.b >= 0 ? unsigned(z) : 0);
            const int64_t v = m.r >= 0 && constant[0][p] < 0 ? times(x, -1) : x;
            y.v[p] = int64_t(search<E>(table, p, v, row, unsigned(m.p), bit, m.q >> 30 & 1 ? 0 : unsigned(int64_t(old.v[p]))));
        } else if (m.code() == AFFINE) {  // p: shift, q..r: limits, b: whether there is a kink
            const bool upper = !m.b || x >= constant[2][p];
            const int64_t factor = int64_t(ap_int<E::FACTOR_BITS>(upper ? constant[0][p] : constant[3][p]));
            const int64_t sum = plus(times(int64_t(ap_int<E::AFFINE_BITS>(x)), factor), upper ? constant[1][p] : constant[4][p]);
            y.v[p] = ql::clamp<int64_t>(sum >> m.p, m.q, m.r);
        } else if (m.code() == PERMUTE) {  // p: the first one, channels nobody names become 0
            const int64_t from = constant[0][p], moved = int64_t(ap_int<E::PERMUTE_BITS>(int64_t(a.v[unsigned(from) % LANES])));
            y.v[p] = from >= 0 ? moved : m.p ? 0 : int64_t(old.v[p]);
        } else if (m.code() == ADD) {
            y.v[p] = plus(x, z);
        } else if (m.code() == PRODUCT) {
            y.v[p] = times(int64_t(ap_int<E::PRODUCT_BITS>(x)), int64_t(ap_int<E::PRODUCT_BITS>(z)));
        } else {  // SCALE
            y.v[p] = plus(times(x, m.p), m.q);
        }
    }
    return y;
}

template <typename E>
void finish(const Step& s, const Micro (&micros)[E::MICROS], hls::stream<Vector<E>>& ys, hls::stream<Bus>& operands, hls::stream<Bus>& results) {
    typename Registers<E>::type value;
#pragma HLS ARRAY_RESHAPE variable = value dim = 3 complete
#pragma HLS ARRAY_PARTITION variable = value dim = 1 complete
    LW_PRAGMA(HLS BIND_STORAGE variable = value type = ram_2p impl = LW_REGISTERS)
    ap_int<E::TABLE_BITS> table[E::SEARCH][E::TABLE][LANES];
#pragma HLS ARRAY_PARTITION variable = table dim = 1 complete
#pragma HLS ARRAY_PARTITION variable = table dim = 3 complete
    LW_PRAGMA(HLS BIND_STORAGE variable = table type = ram_2p impl = LW_TABLE)
    int64_t constant[5][LANES];
#pragma HLS ARRAY_PARTITION variable = constant dim = 0 complete
    Unpacker<E> unpack;
    Packer<E> pack;
    Order order;
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
                const bool arrives = s[RECEIVES] && !(s[MICROS] && micros[0].joined());
                if (arrives) {  // in the order in which rows are worked on together
                    order.start();
                receive:
                    for (unsigned i = 0; i < vectors; ++i) {
#pragma HLS PIPELINE II = 1
                        LW_COUNT(FINISH);
                        put<E>(value, 0, order.index(cols), ys.read());
                        order.next(unsigned(at.block_rows), cols, unsigned(s[TOGETHER]));
                    }
                }
            micros:
                for (int k = 0; k < s[MICROS]; ++k) {
                    const bool joined = k + 1 < s[MICROS] && micros[k + 1].joined();
                    if (micros[k].code() == LOAD && !joined) {
                        load<E>(micros[k], at, value, operands);
                    } else if (micros[k].code() == STORE) {
                        store<E>(micros[k], at, value, results);
                    } else {  // at most a LOAD, one operation, and a STORE
                        const bool loads = micros[k].code() == LOAD, streams = k == 0 && micros[0].joined();
                        const Micro first = micros[k];
                        if (loads) ++k;
                        const Micro m = micros[k];
                        const bool stores = k + 1 < s[MICROS] && micros[k + 1].code() == STORE && micros[k + 1].joined();
                        if (stores) ++k;
                        const Micro last = micros[k];
                        // constants of the channels that hold for the whole block
                        const int code = m.code();
                        const unsigned rows = code == AFFINE ? (m.b ? 5 : 2) : code == PERMUTE ? 1 : code == SEARCH ? unsigned(m.r >= 0) : 0;
                    constants:
                        for (unsigned i = 0; i < rows; ++i) {
#pragma HLS PIPELINE II = 1
                            LW_COUNT(FINISH);
                            for (unsigned p = 0; p < LANES; ++p) {
#pragma HLS UNROLL
                                constant[i][p] = int64_t(table[0][(code == SEARCH ? unsigned(m.r) : unsigned(m.row)) + i][p]);
                            }
                        }
                        order.start();
                        const int fresh = loads ? int(first.to) : streams ? 0 : -1;  // the register that this pass fills before it works
                        unsigned x = 0;
                    elements:
                        for (unsigned i = 0; i < vectors; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = value inter false
                            LW_COUNT(FINISH);
                            const unsigned place = streams ? order.index(cols) : i;
                            const Row<E> held = read<E>(value, place);
                            Vector<E> in = held.x[0], a, b, y;
                            if (x == 0) {
                                unpack.start();
                                pack.start();
                            }
                            if (loads) {
                                unpack.take(first.format(), operands);
                                in = unpack.value;
                            } else if (streams) {
                                in = ys.read();
                            }
                            a = m.a == fresh ? in : held.x[unsigned(m.a)];
                            b = m.b == fresh ? in : held.x[m.b < 0 ? 0 : unsigned(m.b) % E::REGISTERS];
                            y = operate<E>(m, a, b, held.x[unsigned(m.to)], table, constant);
                            for (unsigned r = 0; r < E::REGISTERS; ++r) {  // one write of every memory
#pragma HLS UNROLL
                                if (int(r) == m.to || int(r) == fresh) put<E>(value, r, place, int(r) == m.to ? y : in);
                            }
                            if (stores) pack.put(last.format(), y, 0, results);
                            if (++x == cols) {
                                x = 0;
                                if (stores) pack.flush(results);
                            }
                            if (streams) order.next(unsigned(at.block_rows), cols, unsigned(s[TOGETHER]));
                        }
                    }
                }
                more = at.block(s);
            }
        }
    }
}

}  // namespace lw
