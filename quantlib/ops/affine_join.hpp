// AffineJoin: the wide edge shifted, plus an offset chosen by the codes of the narrow ones, against one row of thresholds.
#pragma once
#include "ql_digits.hpp"

namespace ql {

// y = LO + STEP * #{j : (sign * x << SHIFT) + offset[k] >= thresholds[j]}, k the number the digits D of the narrow edges make
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, unsigned SHIFT, int LO, int STEP, typename D, typename TI, typename TO, unsigned PE, typename TF, unsigned K, unsigned CF, unsigned PF, typename TT, unsigned L, unsigned CT, unsigned PT, typename TS, unsigned CS, unsigned PS, typename... TN>
void affine_join(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TF (&offset)[CF][PF][K], const TT (&thresholds)[CT][PT][L], const TS (&sign)[CS][PS], unsigned images, hls::stream<Word<TN, PE>>&... narrow) {
#pragma HLS ARRAY_PARTITION variable = offset dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = thresholds dim = 3 complete
#pragma HLS ARRAY_PARTITION variable = sign dim = 2 complete
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
affine_join:
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
            const A wide = A(x.v[p]) * A(sign[CS == 1 ? 0 : part][PS == 1 ? 0 : p]) * (A(1) << SHIFT);
            const A v = wide + A(offset[CF == 1 ? 0 : part][PF == 1 ? 0 : p][k[p]]);
            y.v[p] = TO(LO + STEP * int(count<A>(v, thresholds[CT == 1 ? 0 : part][PT == 1 ? 0 : p])));
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
