// Slice2d: pixels outside the slice are dropped.
#pragma once
#include "ql.hpp"

namespace ql {

// Rows R0, R0 + RS, ... below R1 and columns likewise, of an H x W map with PARTS words per pixel. Iterations per image: H * W * PARTS.
template <unsigned H, unsigned W, unsigned PARTS, unsigned R0, unsigned R1, unsigned RS, unsigned C0, unsigned C1, unsigned CS, typename T, unsigned N>
void slice2d(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& out, unsigned images) {
    unsigned row = 0, col = 0, part = 0;
    unsigned next_row = R0, next_col = C0;
    const unsigned total = images * H * W * PARTS;
slice:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<T, N> x = in.read();
        const bool row_kept = row == next_row && row < R1, kept = row_kept && col == next_col && col < C1;
        if (kept) out.write(x);
        if (++part == PARTS) {
            part = 0;
            if (col == next_col) next_col += CS;
            if (++col == W) {
                col = 0;
                next_col = C0;
                if (row == next_row) next_row += RS;
                if (++row == H) {
                    row = 0;
                    next_row = R0;
                }
            }
        }
    }
}

}  // namespace ql
