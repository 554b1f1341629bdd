// Conv2d: a window stage and a folded matrix-vector product, or one channel at a time where every channel is a group of its own.
#pragma once
#include "ql_matvec.hpp"
#include "ql_window.hpp"

namespace ql {

// Every channel has its own kernel: LANES / PE taps of PE channels per cycle. Row part * STEPS + step of the weights.
// P makes the products: Products, or Signs, whose weights are bits. Iterations per image: WINDOWS * PARTS * STEPS.
template <typename P, typename A, unsigned WINDOWS, unsigned PARTS, unsigned STEPS, typename TI, typename TO, typename TW, unsigned ROWS, unsigned LANES, unsigned PE>
void depthwise_of(hls::stream<Word<TI, LANES>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][LANES], unsigned images) {
    static_assert(ROWS == PARTS * STEPS && LANES % PE == 0, "one row of weights per iteration of a window");
    A acc[PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    unsigned step = 0, row = 0;
    const unsigned total = images * WINDOWS * PARTS * STEPS;
steps:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, LANES> x = in.read();
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            acc[p] = step == 0 ? A(0) : acc[p];
            for (unsigned t = 0; t < LANES; t += PE) {
#pragma HLS UNROLL
                acc[p] += P::template term<A>(x.v[t + p], weight[row][t + p]);
            }
        }
        if (++row == ROWS) row = 0;
        if (++step == STEPS) {
            step = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(acc[p]);
            }
            out.write(word);
        }
    }
}

template <typename A, unsigned WINDOWS, unsigned PARTS, unsigned STEPS, typename TI, typename TO, typename TW, unsigned ROWS, unsigned LANES, unsigned PE>
void depthwise(hls::stream<Word<TI, LANES>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][LANES], unsigned images) {
#pragma HLS INLINE
    depthwise_of<Products, A, WINDOWS, PARTS, STEPS>(in, out, weight, images);
}

}  // namespace ql
