// Shift: every channel moved by its own whole number of pixels; addressing of a line buffer, nothing else.
#pragma once
#include "ql.hpp"

namespace ql {

// An H x W map with PARTS words per pixel. The output lags DELAY pixels behind the input; the line buffer holds the last SIZE pixels, and channel c of
// pixel (r, q) is read `distance` pixels behind the newest one: pixel (r + dy, q + dx). Zero where that lies outside the map.
// Iterations per image: (H * W + DELAY) * PARTS.
template <unsigned H, unsigned W, unsigned PARTS, unsigned DELAY, unsigned SIZE, typename T, typename TO, unsigned PE, typename TY, typename TX, typename TD,
          unsigned CC, unsigned PC>
void shift(hls::stream<Word<T, PE>>& in, hls::stream<Word<TO, PE>>& out, const TY (&dy)[CC][PC], const TX (&dx)[CC][PC], const TD (&distance)[CC][PC],
           unsigned images) {
#pragma HLS ARRAY_PARTITION variable = dy dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = dx dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = distance dim = 2 complete
    T line[PE][SIZE * PARTS];
#pragma HLS ARRAY_PARTITION variable = line dim = 1 complete
    unsigned pixel = 0, part = 0, newest = 0, row = 0, col = 0;
    const unsigned total = images * (H * W + DELAY) * PARTS;
pixels:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = line inter false
        QL_CYCLE();
        if (pixel < H * W) {
            const Word<T, PE> x = in.read();
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                line[p][newest * PARTS + part] = x.v[p];
            }
        }
        if (pixel >= DELAY) {
            Word<TO, PE> y;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                const unsigned c = CC == 1 ? 0 : part, l = PC == 1 ? 0 : p;
                const int r = int(row) + int(dy[c][l]), q = int(col) + int(dx[c][l]);
                const unsigned back = unsigned(distance[c][l]);
                const unsigned from = newest >= back ? newest - back : newest + SIZE - back;
                y.v[p] = r >= 0 && r < int(H) && q >= 0 && q < int(W) ? TO(int64_t(line[p][from * PARTS + part])) : TO(0);
            }
            out.write(y);
        }
        if (++part == PARTS) {
            part = 0;
            if (++newest == SIZE) newest = 0;
            if (pixel >= DELAY && ++col == W) {
                col = 0;
                if (++row == H) row = 0;
            }
            if (++pixel == H * W + DELAY) pixel = 0;
        }
    }
}

}  // namespace ql
