// Reductions over windows, PE channels at a time.
#pragma once
#include "ql.hpp"

namespace ql {

struct Sum {
    template <typename A> static A join(A a, A b) { return a + b; }
};
struct Max {
    template <typename A> static A join(A a, A b) { return a > b ? a : b; }
};

// STEPS words of LANES / PE taps in, one word out; WINDOWS windows (over pixels and channel words) per image. Iterations per image: WINDOWS * STEPS.
template <typename OP, typename A, unsigned WINDOWS, unsigned STEPS, typename TI, typename TO, unsigned LANES, unsigned PE>
void reduce(hls::stream<Word<TI, LANES>>& in, hls::stream<Word<TO, PE>>& out, unsigned images) {
    static_assert(LANES % PE == 0, "a word holds whole taps");
    A acc[PE] = {};
#pragma HLS ARRAY_PARTITION variable = acc complete
    unsigned step = 0;
    const unsigned total = images * WINDOWS * STEPS;
steps:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, LANES> x = in.read();
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            A taps = A(x.v[p]);
            for (unsigned t = PE; t < LANES; t += PE) {
#pragma HLS UNROLL
                taps = OP::template join<A>(taps, A(x.v[t + p]));
            }
            acc[p] = step == 0 ? taps : OP::template join<A>(acc[p], taps);
        }
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

// The window is the whole map: PIXELS pixels of PARTS words. Iterations per image: PIXELS * PARTS.
template <typename OP, typename A, unsigned PIXELS, unsigned PARTS, typename TI, typename TO, unsigned PE>
void reduce_map(hls::stream<Word<TI, PE>>& in, hls::stream<Word<TO, PE>>& out, unsigned images) {
    A acc[PARTS][PE];
#pragma HLS ARRAY_PARTITION variable = acc dim = 2 complete
    unsigned pixel = 0, part = 0;
    const unsigned total = images * PIXELS * PARTS;
pixels:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<TI, PE> x = in.read();
        Word<TO, PE> word;
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            const A next = pixel == 0 ? A(x.v[p]) : OP::template join<A>(acc[part][p], A(x.v[p]));
            acc[part][p] = next;
            word.v[p] = TO(next);
        }
        if (pixel == PIXELS - 1) out.write(word);
        if (++part == PARTS) {
            part = 0;
            if (++pixel == PIXELS) pixel = 0;
        }
    }
}

}  // namespace ql
