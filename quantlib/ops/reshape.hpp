// Reshape: nothing to do where the stream's order stays, else a rearrangement.
#pragma once
#include "rearrange.hpp"

namespace ql {

// Iterations per image: WORDS.
template <unsigned WORDS, typename T, unsigned N> void pass(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& out, unsigned images) {
    const unsigned total = images * WORDS;
pass:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        out.write(in.read());
    }
}

}  // namespace ql
