// Add: the sum of two streams.
#pragma once
#include "ql.hpp"

namespace ql {

// z = x + y
// PIXELS pixels of PARTS words; tables hold one entry for all channels or one per channel. Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, typename TA, typename TB, typename TO, unsigned PE>
void add(hls::stream<Word<TA, PE>>& in, hls::stream<Word<TO, PE>>& out, unsigned images, hls::stream<Word<TB, PE>>& in2) {
    unsigned part = 0;
    const unsigned total = images * PIXELS * PARTS;
add:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TA, PE> a = in.read();
        const Word<TB, PE> b = in2.read();
        Word<TO, PE> y;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            y.v[p] = TO(A(a.v[p]) + A(b.v[p]));
        }
        out.write(y);
        if (++part == PARTS) part = 0;
    }
}

}  // namespace ql
