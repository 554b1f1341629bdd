// Sliding windows: from pixels in row order to the taps of every window, in the order (group, row, column, word of the group).
#pragma once
#include "ql.hpp"

namespace ql {

// H, W: input; GROUPS * PARTS words per pixel; kernel KH x KW, stride SH, SW, padding PT (top), PL (left), dilation DH, DW; OH x OW windows.
template <unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned KW, unsigned SH, unsigned SW, unsigned PT, unsigned PL, unsigned DH,
          unsigned DW, unsigned OH, unsigned OW>
struct Geometry {
    static const unsigned ROW = W * GROUPS * PARTS;                 // words of an input row
    static const unsigned OUT = OW * GROUPS * KH * KW * PARTS;      // words of an output row
    static const unsigned SPAN = (KH - 1) * DH + 1 + SH;            // rows that are live while one row is written and the next is read
    static const unsigned ROWS = SPAN < H ? SPAN : H;

    // input rows that output row r needs, counted from the top
    static constexpr unsigned need(int r) {
        return r * int(SH) - int(PT) + int((KH - 1) * DH) + 1 <= 0 ? 0
               : unsigned(r * int(SH) - int(PT) + int((KH - 1) * DH) + 1) > H ? H
                                                                              : unsigned(r * int(SH) - int(PT) + int((KH - 1) * DH) + 1);
    }
    // words read while output row r is written: what the next row needs, and behind the last row what is left
    static constexpr unsigned reads(unsigned r) { return ((r + 1 < OH ? need(int(r) + 1) : H) - need(int(r))) * ROW; }
    static constexpr unsigned fill() { return need(0) * ROW; }
    static constexpr unsigned iterations() {
        unsigned sum = fill();
        for (unsigned r = 0; r < OH; ++r) sum += reads(r) > OUT ? reads(r) : OUT;
        return sum;
    }
};

// Writes every window's taps; taps outside the image are PAD. Iterations per image: G::iterations().
//
// After the rows the first window needs, one phase per output row: it writes that row and reads what the next one needs, both spread evenly over its
// iterations, so that a neighbour that is as fast is never held up by a burst.
template <typename G, unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned KW, unsigned SH, unsigned SW, unsigned PT, unsigned PL,
          unsigned DH, unsigned DW, unsigned OH, unsigned OW, int PAD, typename T, unsigned N>
void window_loop(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& out, unsigned images) {
    const unsigned ROWS = G::ROWS;
    const unsigned ITERATIONS = G::iterations();
    Word<T, N> rows[ROWS][G::ROW];
#pragma HLS ARRAY_PARTITION variable = rows dim = 1 complete
#pragma HLS AGGREGATE variable = rows compact = bit
    Word<T, N> outside;
    for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
        outside.v[p] = T(PAD);
    }
    unsigned to_read = 0, to_write = 0, length = 0;  // of this phase: words and iterations
    unsigned read_share = 0, write_share = 0, step = 0;
    unsigned read_row = 0, read_slot = 0, at = 0;  // where the next word goes
    unsigned oy = 0, ox = 0, g = 0, u = 0, v = 0, part = 0;
    int base_row = 0, base_col = 0, row = 0, col = 0;
    unsigned base_slot = 0, slot = 0;
    bool filling = false, start = true;
    const unsigned total = images * ITERATIONS;
windows:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = rows inter false
        QL_CYCLE();
        if (start) {  // an image begins: fill first, if the first window needs anything
            start = false;
            filling = G::fill() > 0;
            to_read = filling ? G::fill() : G::reads(0);
            to_write = filling ? 0 : G::OUT;
            length = to_read > to_write ? to_read : to_write;
            read_share = write_share = step = 0;
            read_row = read_slot = at = 0;
            oy = ox = g = u = v = part = 0;
            base_row = row = -int(PT);
            base_col = col = -int(PL);
            // the ring position of a row above the image is that of the row a whole number of rings below
            base_slot = slot = (ROWS - PT % ROWS) % ROWS;
        }
        write_share += to_write;
        if (write_share >= length) {
            write_share -= length;
            const bool inside = row >= 0 && row < int(H) && col >= 0 && col < int(W);
            const unsigned from = ROWS == H ? unsigned(row) : slot;
            out.write(inside ? rows[inside ? from : 0][inside ? (unsigned(col) * GROUPS + g) * PARTS + part : 0] : outside);
            if (++part == PARTS) {
                part = 0;
                col += int(DW);
                if (++v == KW) {
                    v = 0;
                    col = base_col;
                    row += int(DH);
                    slot += DH;
                    if (slot >= ROWS) slot -= ROWS;
                    if (++u == KH) {
                        u = 0;
                        row = base_row;
                        slot = base_slot;
                        if (++g == GROUPS) {
                            g = 0;
                            base_col += int(SW);
                            if (++ox == OW) {
                                ox = 0;
                                base_col = -int(PL);
                                base_row += int(SH);
                                base_slot += SH;
                                if (base_slot >= ROWS) base_slot -= ROWS;
                                row = base_row;
                                slot = base_slot;
                            }
                            col = base_col;
                        }
                    }
                }
            }
        }
        read_share += to_read;
        if (read_share >= length) {
            read_share -= length;
            const Word<T, N> word = in.read();
            if (read_row < G::need(int(OH) - 1)) rows[ROWS == H ? read_row : read_slot][at] = word;
            if (++at == G::ROW) {
                at = 0;
                ++read_row;
                if (++read_slot == ROWS) read_slot = 0;
            }
        }
        if (++step == length) {
            step = 0;
            if (!filling && ++oy == OH) {
                start = true;
            } else {
                filling = false;
                to_read = G::reads(oy);
                to_write = G::OUT;
                length = to_read > to_write ? to_read : to_write;
            }
        }
    }
}

template <unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned KW, unsigned SH, unsigned SW, unsigned PT, unsigned PL, unsigned DH,
          unsigned DW, unsigned OH, unsigned OW, int PAD, typename T, unsigned N>
void window(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& out, unsigned images) {
#pragma HLS INLINE
    typedef Geometry<H, W, GROUPS, PARTS, KH, KW, SH, SW, PT, PL, DH, DW, OH, OW> G;
    window_loop<G, H, W, GROUPS, PARTS, KH, KW, SH, SW, PT, PL, DH, DW, OH, OW, PAD>(in, out, images);
}

}  // namespace ql
