// SaturatingDense: products in a fixed order into accumulators that saturate after each.
#pragma once
#include "ql.hpp"

namespace ql {

// PE results at a time, one input per cycle; the inputs are read once and held. Row nf * K + k of the weights. Iterations per image: NF * K.
template <typename A, unsigned NF, unsigned K, unsigned SHIFT, int64_t LO, int64_t HI, typename TI, typename TO, typename TW, unsigned ROWS, unsigned PE, typename TB>
void saturating_dense(hls::stream<Word<TI, 1>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][PE], const TB (&bias)[NF][PE], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = bias dim = 2 complete
    static_assert(ROWS == NF * K, "one row of weights per iteration");
    TI held[K];
    A acc[PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
    unsigned nf = 0, k = 0, row = 0;
    const unsigned total = images * NF * K;
products:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (nf == 0) held[k] = in.read().v[0];
        const A x = A(held[k]);
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            const A from = k == 0 ? A(bias[nf][p]) : acc[p];
            acc[p] = clamp<A>(from + ((A(weight[row][p]) * x + ((A(1) << SHIFT) >> 1)) >> SHIFT), A(LO), A(HI));
        }
        ++row;
        if (++k == K) {
            k = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(acc[p]);
            }
            out.write(word);
            if (++nf == NF) {
                nf = 0;
                row = 0;
            }
        }
    }
}

}  // namespace ql
