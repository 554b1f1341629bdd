// Threshold: LO + STEP * (number of thresholds that sign * x reaches).
#pragma once
#include "ql.hpp"

namespace ql {

// y = LO + STEP * #{k : sign * x >= thresholds[k]}
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, int LO, int STEP, typename TI, typename TO, unsigned PE, typename TT, unsigned L, unsigned CT, unsigned PT, typename TS, unsigned CS, unsigned PS>
void threshold(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TT (&thresholds)[CT][PT][L], const TS (&sign)[CS][PS], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 3 complete
#pragma HLS ARRAY_PARTITION variable = sign dim = 2 complete
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
threshold:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            const A v = A(x.v[p]) * A(sign[CS == 1 ? 0 : part][PS == 1 ? 0 : p]);
            y.v[p] = TO(LO + STEP * int(count<A>(v, thresholds[CT == 1 ? 0 : part][PT == 1 ? 0 : p])));
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
