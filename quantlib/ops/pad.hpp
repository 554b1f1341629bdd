// Pad: zeros around a map, in space and along the channels.
#pragma once
#include "ql.hpp"

namespace ql {

// An H x W map with PARTS words per pixel, CB words of zeros before and CA behind them, PT rows above, PL columns left; OH x OW pixels out.
// Iterations per image: OH * OW * (CB + PARTS + CA).
template <unsigned H, unsigned W, unsigned PARTS, unsigned CB, unsigned CA, unsigned PT, unsigned PL, unsigned OH, unsigned OW, typename TI, typename TO, unsigned N>
void pad(hls::stream<Word<TI, N>>& in, hls::stream<Word<TO, N>>& out, unsigned images) {
    unsigned row = 0, col = 0, part = 0;
    const unsigned total = images * OH * OW * (CB + PARTS + CA);
pad:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const bool inside = row >= PT && row < PT + H && col >= PL && col < PL + W && part >= CB && part < CB + PARTS;
        Word<TO, N> y;
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            y.v[p] = TO(0);
        }
        if (inside) {
            const Word<TI, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                y.v[p] = TO(int64_t(x.v[p]));
            }
        }
        out.write(y);
        if (++part == CB + PARTS + CA) {
            part = 0;
            if (++col == OW) {
                col = 0;
                if (++row == OH) row = 0;
            }
        }
    }
}

}  // namespace ql
