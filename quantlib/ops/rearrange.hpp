// Rearrange: the whole map is held, then read in another order.
#pragma once
#include "ql.hpp"

namespace ql {

// IN words in, then OUT words out. Iterations per image: IN + OUT.
template <unsigned IN, unsigned OUT, typename T, unsigned N, unsigned M, typename TX>
void rearrange(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, const TX (&index)[OUT][M], unsigned images) {
    T map[IN * N];
    unsigned at = 0;
    const unsigned total = images * (IN + OUT);
rearrange:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (at < IN) {
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                map[at * N + p] = x.v[p];
            }
        } else {
            Word<T, M> y;
            for (unsigned p = 0; p < M; ++p) {
#pragma HLS UNROLL
                y.v[p] = map[unsigned(index[at - IN][p])];
            }
            out.write(y);
        }
        if (++at == IN + OUT) at = 0;
    }
}

}  // namespace ql
