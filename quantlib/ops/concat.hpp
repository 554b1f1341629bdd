// Concat: for every pixel the words of each input in turn.
#pragma once
#include "ql.hpp"

namespace ql {

// The inputs' words per pixel.
template <unsigned... PARTS> struct Parts;
template <> struct Parts<> {
    static const unsigned all = 0;
    template <typename TO, unsigned N> static void read(unsigned, Word<TO, N>& y) {  // never reached: `part` counts to all the words
#pragma HLS INLINE
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            y.v[p] = TO(0);
        }
    }
};
template <unsigned FIRST, unsigned... MORE> struct Parts<FIRST, MORE...> {
    static const unsigned all = FIRST + Parts<MORE...>::all;
    template <typename TO, unsigned N, typename T, typename... TS>
    static void read(unsigned part, Word<TO, N>& y, hls::stream<Word<T, N>>& in, hls::stream<Word<TS, N>>&... more) {
#pragma HLS INLINE
        if (part < FIRST) {
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                y.v[p] = TO(int64_t(x.v[p]));
            }
        } else {
            Parts<MORE...>::read(part - FIRST, y, more...);
        }
    }
};

// Iterations per image: PIXELS * P::all.
template <unsigned PIXELS, typename P, typename T, typename TO, unsigned N, typename... TS>
void concat(hls::stream<Word<T, N>>& in, hls::stream<Word<TO, N>>& out, unsigned images, hls::stream<Word<TS, N>>&... more) {
    unsigned part = 0;
    const unsigned total = images * PIXELS * P::all;
concat:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        Word<TO, N> y;
        P::read(part, y, in, more...);
        out.write(y);
        if (++part == P::all) part = 0;
    }
}

}  // namespace ql
