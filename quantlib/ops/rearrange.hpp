// Rearrange: the whole map is held, then read in another order.
#pragma once
#include "ql.hpp"

namespace ql {

// IN words in, then OUT words out: lane p of a word out is lane index[..][p][1] of word index[..][p][0]. Every lane out has a copy of the map, because
// all of them read at once, each somewhere else. Iterations per image: IN + OUT.
template <unsigned IN, unsigned OUT, typename T, unsigned N, unsigned M, typename TX>
void rearrange(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, const TX (&index)[OUT][M][2], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = index dim = 2 complete
#pragma HLS ARRAY_PARTITION variable = index dim = 3 complete
    Word<T, N> map[M][IN];
#pragma HLS ARRAY_PARTITION variable = map dim = 1 complete
#pragma HLS AGGREGATE variable = map compact = bit
    unsigned at = 0;
    const unsigned total = images * (IN + OUT);
rearrange:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (at < IN) {
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < M; ++p) {
#pragma HLS UNROLL
                map[p][at] = x;
            }
        } else {
            Word<T, M> y;
            for (unsigned p = 0; p < M; ++p) {
#pragma HLS UNROLL
                y.v[p] = map[p][unsigned(index[at - IN][p][0])].v[unsigned(index[at - IN][p][1])];
            }
            out.write(y);
        }
        if (++at == IN + OUT) at = 0;
    }
}

}  // namespace ql
