// Thermometer: every channel becomes several signs.
#pragma once
#include "ql.hpp"

namespace ql {

// All CHANNELS of a pixel are read at once; sign o = part * PE + p compares channel source[part][p] with thresholds[part][p].
// Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, typename TI, typename TO, unsigned CHANNELS, unsigned PE, typename TC, typename TT>
void thermometer(hls::stream<Word<TI, CHANNELS>>& in, hls::stream<Word<TO, PE>>& out, const TC (&source)[PARTS][PE], const TT (&thresholds)[PARTS][PE],
                 unsigned images) {
#pragma HLS ARRAY_PARTITION variable = source dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 2 complete
    Word<TI, CHANNELS> x;
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
thermometer:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (part == 0) x = in.read();
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            y.v[p] = TO(A(x.v[unsigned(source[part][p])]) >= A(thresholds[part][p]) ? 1 : -1);
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
