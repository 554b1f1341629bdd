// Multiply: the product of two streams, the second one a map or one gate per channel.
#pragma once
#include "ql.hpp"

namespace ql {

// z = x * y. PIXELS pixels of PARTS words; GATED: y has one word for each of the PARTS, read with the first pixel of an image.
// Iterations per image: PIXELS * PARTS.
template <typename A, unsigned PIXELS, unsigned PARTS, bool GATED, typename TX, typename TY, typename TO, unsigned PE>
void multiply(hls::stream<Word<TX, PE>>& in, hls::stream<Word<TO, PE>>& out, unsigned images, hls::stream<Word<TY, PE>>& in2) {
    Word<TY, PE> gates[GATED ? PARTS : 1];
#pragma HLS AGGREGATE variable = gates compact = bit
    unsigned pixel = 0, part = 0;
    const unsigned total = images * PIXELS * PARTS;
multiply:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TX, PE> x = in.read();
        Word<TY, PE> y;
        if (!GATED || pixel == 0) {
            y = in2.read();
            if (GATED) gates[part] = y;
        } else {
            y = gates[GATED ? part : 0];
        }
        Word<TO, PE> z;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            z.v[p] = TO(A(x.v[p]) * A(y.v[p]));
        }
        out.write(z);
        if (++part == PARTS) {
            part = 0;
            if (++pixel == PIXELS) pixel = 0;
        }
    }
}

}  // namespace ql
