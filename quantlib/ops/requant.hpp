// Requant: multiply, add, shift, clamp, with one or two branches.
#pragma once
#include "ql.hpp"

namespace ql {

// y = clamp((x * factors[0] + factors[1]) >> SHIFT, LO, HI); with KINK, factors[2..4] = kink, mul2, add2 serve x < kink
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, unsigned SHIFT, int64_t LO, int64_t HI, bool KINK, typename TI, typename TO, unsigned PE, typename TF, unsigned CF, unsigned PF, unsigned NF>
void requant(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, const TF (&factors)[CF][PF][NF], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = factors dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = factors dim = 3 complete
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
requant:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            const TF(&f)[NF] = factors[CF == 1 ? 0 : part][PF == 1 ? 0 : p];
            const A v = A(x.v[p]);
            const bool below = KINK && v < A(f[KINK ? 2 : 0]);
            const A mul = A(f[below ? (KINK ? 3 : 0) : 0]), add = A(f[below ? (KINK ? 4 : 1) : 1]);
            y.v[p] = TO(clamp<A>((v * mul + add) >> SHIFT, A(LO), A(HI)));
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
