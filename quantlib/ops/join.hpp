// Join: thresholds on the wide edge, chosen by the codes of the narrow ones.
#pragma once
#include "ql_digits.hpp"

namespace ql {

// y = LO + STEP * #{j : sign[k] * x >= thresholds[k][j]}, k the number the digits D of the narrow edges make
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, int LO, int STEP, typename D, typename TI, typename TO, unsigned PE, typename TT, unsigned K, unsigned L, unsigned CT, unsigned PT, typename TS, unsigned KS, unsigned CS, unsigned PS, typename... TN>
void join(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TT (&thresholds)[CT][PT][K][L], const TS (&sign)[CS][PS][KS], unsigned images, hls::stream<Word<TN, PE>>&... narrow) {
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 4 complete
#pragma HLS ARRAY_PARTITION variable = sign dim = 2 complete
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
join:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        unsigned k[PE];
#pragma HLS ARRAY_PARTITION variable = k dim = 1 complete
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            k[p] = 0;
        }
        D::read(k, narrow...);
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            const A v = A(x.v[p]) * A(sign[CS == 1 ? 0 : part][PS == 1 ? 0 : p][KS == 1 ? 0 : k[p]]);
            y.v[p] = TO(LO + STEP * int(count<A>(v, thresholds[CT == 1 ? 0 : part][PT == 1 ? 0 : p][k[p]])));
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
