// Sliding windows: from pixels in row order to the taps of every window.
//
// A word of the result holds TAPS taps of PARTS * GROUPS words per pixel:
//   1        words in the order (group, row, column, part)
//   KH       a column of the window, its rows one after the other in the word; words in the order (group, column, part)
//   KH * KW  the whole window, its columns one after the other, rows inside a column; words in the order (group, part)
#pragma once
#include "ql.hpp"

namespace ql {

// H rows of ROW words; KH rows per window, stride SH, padding PT, dilation DH; OH output rows, for each of which FETCHES words leave the line buffer.
template <unsigned H, unsigned ROW, unsigned KH, unsigned SH, unsigned PT, unsigned DH, unsigned OH, unsigned FETCHES> struct Geometry {
    static const unsigned SPAN = (KH - 1) * DH + 1 + SH;  // rows that are live while one row is written and the next is read
    static const unsigned ROWS = SPAN < H ? SPAN : H;
    static const unsigned OUT = FETCHES;

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
        for (unsigned r = 0; r < OH; ++r) sum += reads(r) > FETCHES ? reads(r) : FETCHES;
        return sum;
    }
};

// TU words from the line buffer, DH rows apart, beginning with image row `row`, which lies in ring position `slot`. The buffer is one memory for
// TU = 1; else every row is a memory of its own, and all are read at one address.
template <unsigned TU, unsigned DH, unsigned H, unsigned ROWS, unsigned ROW, typename T, unsigned N, unsigned BANKS, unsigned DEPTH>
inline void fetch(const Word<T, N> (&rows)[BANKS][DEPTH], int row, unsigned slot, bool inside, unsigned at, const Word<T, N>& outside,
                  Word<T, N * TU>& to) {
#pragma HLS INLINE
#ifdef QL_SYNTHESIS_BODIES
    Word<T, N> line[BANKS];
#pragma HLS ARRAY_PARTITION variable = line complete
    const unsigned first = ROWS == H ? unsigned(row) : slot;
    for (unsigned b = 0; b < BANKS; ++b) {
#pragma HLS UNROLL
        line[b] = rows[b][BANKS == 1 && row >= 0 && row < int(H) ? first * ROW + at : at];
    }
#endif
taps:
    for (unsigned t = 0; t < TU; ++t) {
#pragma HLS UNROLL
        const int r = row + int(t * DH);
        const bool shown = inside && r >= 0 && r < int(H);
        unsigned from = ROWS == H ? unsigned(r) : slot + t * DH;
        if (ROWS != H && from >= ROWS) from -= ROWS;
        const unsigned bank = shown && BANKS > 1 ? from : 0;
#ifdef QL_SYNTHESIS_BODIES
        const Word<T, N>& x = shown ? line[bank] : outside;
#else
        const Word<T, N>& x = shown ? rows[bank][BANKS > 1 ? at : from * ROW + at] : outside;
#endif
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            to.v[t * N + p] = x.v[p];
        }
    }
}

// A window from its last column and the KW - 1 before it, DW apart: held[k] is the column k + 1 steps ago. Then the column is held.
template <unsigned KW, unsigned DW> struct Columns {
    static const unsigned HELD = (KW - 1) * DW;
    template <typename T, unsigned L, unsigned PARTS>
    static void join(Word<T, L> (&held)[HELD][PARTS], unsigned part, const Word<T, L>& column, Word<T, L * KW>& to) {
#pragma HLS INLINE
    columns:
        for (unsigned v = 0; v + 1 < KW; ++v) {
#pragma HLS UNROLL
            for (unsigned l = 0; l < L; ++l) {
#pragma HLS UNROLL
                to.v[v * L + l] = held[(KW - 1 - v) * DW - 1][part].v[l];
            }
        }
        for (unsigned l = 0; l < L; ++l) {
#pragma HLS UNROLL
            to.v[(KW - 1) * L + l] = column.v[l];
        }
    shift:
        for (unsigned k = HELD - 1; k > 0; --k) {
#pragma HLS UNROLL
            held[k][part] = held[k - 1][part];
        }
        held[0][part] = column;
    }
};
template <unsigned DW> struct Columns<1, DW> {
    static const unsigned HELD = 1;
    template <typename T, unsigned L, unsigned PARTS>
    static void join(Word<T, L> (&)[HELD][PARTS], unsigned, const Word<T, L>& column, Word<T, L>& to) {
#pragma HLS INLINE
        to = column;
    }
};

// Taps outside the image are PAD. Iterations per image: G::iterations().
//
// After the rows the first window needs, one phase per output row: it writes that row and reads what the next one needs, both spread evenly over its
// iterations, so that a neighbour that is as fast is never held up by a burst. An output row is fetched in the order (BLOCKS blocks SW columns apart,
// group, KH / TU rows, COLS columns DC apart, part); with KW > 1 columns are held, and every STEP-th completes a window.
template <typename G, unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned COLS, unsigned SH, unsigned SW, unsigned PT, unsigned PL,
          unsigned DH, unsigned DC, unsigned OH, unsigned BLOCKS, int PAD, unsigned TU, unsigned KW, unsigned DW, unsigned STEP, unsigned FETCHES, typename T,
          unsigned N, unsigned M>
void window_loop(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, unsigned images) {
    const unsigned ROW = W * GROUPS * PARTS, ROWS = G::ROWS, BANKS = TU == 1 ? 1 : ROWS, HELD = Columns<KW, DW>::HELD;
    const unsigned ITERATIONS = G::iterations();
    Word<T, N> rows[BANKS][ROWS / BANKS * ROW];
#pragma HLS ARRAY_PARTITION variable = rows dim = 1 complete
#pragma HLS AGGREGATE variable = rows compact = bit
    Word<T, N * TU> held[HELD][KW > 1 ? PARTS : 1];
#pragma HLS ARRAY_PARTITION variable = held dim = 1 complete
#pragma HLS AGGREGATE variable = held compact = bit
    Word<T, N> outside;
    for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
        outside.v[p] = T(PAD);
    }
    unsigned to_read = 0, to_fetch = 0, length = 0;  // of this phase: words and iterations
    unsigned read_share = 0, fetch_share = 0, step = 0;
    unsigned read_row = 0, read_slot = 0, at = 0;  // where the next word goes
    unsigned oy = 0, block = 0, g = 0, u = 0, v = 0, part = 0, wait = 0;
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
            to_fetch = filling ? 0 : FETCHES;
            length = to_read > to_fetch ? to_read : to_fetch;
            read_share = fetch_share = step = 0;
            read_row = read_slot = at = 0;
            oy = block = g = u = v = part = 0;
            wait = (KW - 1) * DW;
            base_row = row = -int(PT);
            base_col = col = -int(PL);
            // the ring position of a row above the image is that of the row a whole number of rings below
            base_slot = slot = (ROWS - PT % ROWS) % ROWS;
        }
        fetch_share += to_fetch;
        if (fetch_share >= length) {
            fetch_share -= length;
            const bool inside = col >= 0 && col < int(W);
            Word<T, N * TU> column;
            fetch<TU, DH, H, ROWS, ROW>(rows, row, slot, inside, inside ? (unsigned(col) * GROUPS + g) * PARTS + part : 0, outside, column);
            Word<T, M> word;
            Columns<KW, DW>::join(held, KW > 1 ? part : 0, column, word);
            if (wait == 0) out.write(word);
            if (++part == PARTS) {
                part = 0;
                wait = wait == 0 ? STEP - 1 : wait - 1;
                col += int(DC);
                if (++v == COLS) {
                    v = 0;
                    col = base_col;
                    row += int(TU * DH);
                    slot += TU * DH;
                    if (slot >= ROWS) slot -= ROWS;
                    if (++u == KH / TU) {
                        u = 0;
                        row = base_row;
                        slot = base_slot;
                        if (++g == GROUPS) {
                            g = 0;
                            base_col += int(SW);
                            if (++block == BLOCKS) {
                                block = 0;
                                wait = (KW - 1) * DW;
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
            const unsigned into = ROWS == H ? read_row : read_slot;
            if (read_row < G::need(int(OH) - 1)) rows[BANKS > 1 ? into : 0][BANKS > 1 ? at : into * ROW + at] = word;
            if (++at == ROW) {
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
                to_fetch = FETCHES;
                length = to_read > to_fetch ? to_read : to_fetch;
            }
        }
    }
}

// H, W: input; GROUPS * PARTS words per pixel; kernel KH x KW, stride SH, SW, padding PT (top), PL (left), dilation DH, DW; OH x OW windows.
template <unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned KW, unsigned SH, unsigned SW, unsigned PT, unsigned PL, unsigned DH,
          unsigned DW, unsigned OH, unsigned OW, int PAD, typename T, unsigned N, unsigned M>
void window(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, unsigned images) {
#pragma HLS INLINE
    const unsigned TAPS = M / N, TU = TAPS == 1 ? 1 : KH, ROW = W * GROUPS * PARTS;
    static_assert(M == N * TAPS && (TAPS == 1 || TAPS == KH || TAPS == KH * KW), "a word holds a tap, a column or a window");
    const bool SLIDES = KW > 1 && TAPS == KH * KW;
    const unsigned SPAN = (KW - 1) * DW + 1, STEP = SW < SPAN ? SW : SPAN;
    // windows that overlap are one block of columns; else there is one for each, and what lies between them is left out
    const unsigned BLOCKS = SLIDES && SW <= SPAN ? 1 : OW, COLS = !SLIDES ? KW : SW <= SPAN ? (OW - 1) * SW + SPAN : SPAN;
    const unsigned FETCHES = BLOCKS * COLS * GROUPS * PARTS * (KH / TU);
    typedef Geometry<H, ROW, KH, SH, PT, DH, OH, FETCHES> G;
    window_loop<G, H, W, SLIDES ? 1 : GROUPS, SLIDES ? GROUPS * PARTS : PARTS, KH, COLS, SH, SW, PT, PL, DH, SLIDES ? 1 : DW, OH, BLOCKS, PAD, TU,
                SLIDES ? KW : 1, SLIDES ? DW : 1, SLIDES ? STEP : 1, FETCHES>(in, out, images);
}

}  // namespace ql
