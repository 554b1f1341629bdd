// Lut: a table indexed by the code.
#pragma once
#include "ql.hpp"

namespace ql {

// y = table[x - LO_IN]
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, int LO_IN, typename TI, typename TO, unsigned PE, typename TT, unsigned L, unsigned CT, unsigned PT>
void lut(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TT (&table)[CT][PT][L], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = table dim = 2 complete
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
lut:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            y.v[p] = TO(table[CT == 1 ? 0 : part][PT == 1 ? 0 : p][unsigned(A(x.v[p]) - A(LO_IN))]);
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
