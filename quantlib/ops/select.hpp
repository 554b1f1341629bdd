// Select: channels picked by number, one pixel behind the reader.
#pragma once
#include "ql.hpp"

namespace ql {

// Reads pixel n while it writes pixel n - 1. IN words in and OUT words out per pixel. Iterations per image: (PIXELS + 1) * max(IN, OUT).
template <unsigned PIXELS, unsigned IN, unsigned OUT, typename T, unsigned N, unsigned M, typename TC>
void select(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, const TC (&channels)[OUT][M], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = channels dim = 2 complete
    const unsigned LENGTH = Larger<IN, OUT>::value;
    T pixel[2][IN * N];
#pragma HLS ARRAY_PARTITION variable = pixel complete dim = 0
    unsigned at = 0, n = 0;
    bool side = false;
    const unsigned total = images * (PIXELS + 1) * LENGTH;
select:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (n > 0 && at < OUT) {
            Word<T, M> y;
            for (unsigned p = 0; p < M; ++p) {
#pragma HLS UNROLL
                y.v[p] = pixel[!side][unsigned(channels[at][p])];
            }
            out.write(y);
        }
        if (n < PIXELS && at < IN) {
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                pixel[side][at * N + p] = x.v[p];
            }
        }
        if (++at == LENGTH) {
            at = 0;
            side = !side;
            if (++n == PIXELS + 1) n = 0;
        }
    }
}

}  // namespace ql
