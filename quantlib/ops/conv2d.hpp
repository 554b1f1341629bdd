// Conv2d: a window stage and a folded matrix-vector product, or one channel at a time where every channel is a group of its own.
#pragma once
#include "ql_matvec.hpp"
#include "ql_window.hpp"

namespace ql {

// Every channel has its own kernel: PE channels at a time, one of TAPS taps per cycle. Row part * TAPS + tap of the weights.
// Iterations per image: WINDOWS * PARTS * TAPS.
template <typename A, unsigned WINDOWS, unsigned PARTS, unsigned TAPS, typename TI, typename TO, typename TW, unsigned ROWS, unsigned PE>
void depthwise(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][PE], unsigned images) {
    static_assert(ROWS == PARTS * TAPS, "one row of weights per iteration of a window");
    A acc[PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    unsigned tap = 0, row = 0;
    const unsigned total = images * WINDOWS * PARTS * TAPS;
taps:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            acc[p] = (tap == 0 ? A(0) : acc[p]) + A(x.v[p]) * A(weight[row][p]);
        }
        if (++row == ROWS) row = 0;
        if (++tap == TAPS) {
            tap = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(acc[p]);
            }
            out.write(word);
        }
    }
}

}  // namespace ql
