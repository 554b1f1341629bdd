// Weights from memory: a stage that fetches rows of them, and the matrix-vector product that takes a row per iteration.
#pragma once
#include "ql_glue.hpp"
#include "ql_matvec.hpp"

namespace ql {

// Rows of N weights of BITS bits from 64-bit words, all ROWS of them REPLAY times per image. A word holds whole weights, the first one lowest: several
// whole rows where they fit, else a row takes whole words. Iterations per image: REPLAY * ROWS * WORDS.
template <unsigned ROWS, unsigned REPLAY, unsigned BITS, typename T, unsigned N>
void fetch_rows(const uint64_t* memory, hls::stream<Word<T, N>>& out, unsigned images) {
    const unsigned PER = 64 / BITS, EACH = N <= PER ? PER / N : 1, WORDS = N <= PER ? 1 : (N + PER - 1) / PER;
    Word<T, N> row;
    uint64_t data = 0;
    unsigned word = 0, slot = 0, at = 0, position = 0;
    const unsigned total = images * REPLAY * ROWS * WORDS;
rows:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (slot == 0) data = memory[position++];
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            if (p / PER == word) row.v[p] = element<BITS, T>(data, slot * N + p % PER);
        }
        if (++word == WORDS) {
            word = 0;
            out.write(row);
            if (++slot == EACH) slot = 0;
            if (++at == ROWS) at = slot = position = 0;
        }
    }
}

// As matvec, with a row of weights from a stream in every iteration; weight (p, s) is element p * SIMD + s of it.
// Iterations per image: VECTORS * GROUPS * NF * SF.
template <typename A, unsigned VECTORS, unsigned GROUPS, unsigned NF, unsigned SF, typename TI, typename TO, typename TW, unsigned PE, unsigned SIMD,
          unsigned N>
void streamed_matvec(hls::stream<Word<TI, SIMD>>& in, hls::stream<Word<TO, PE>>& out, unsigned images, hls::stream<Word<TW, N>>& weights) {
    static_assert(N == PE * SIMD, "a row of weights per iteration");
    Word<TI, SIMD> held[SF];
    A acc[PE] = {};
#pragma HLS ARRAY_PARTITION variable = acc complete
#pragma HLS AGGREGATE variable = held compact = bit
    unsigned nf = 0, sf = 0;
    const unsigned total = images * VECTORS * GROUPS * NF * SF;
products:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (nf == 0) held[sf] = in.read();
        const Word<TI, SIMD>& x = held[sf];
        const Word<TW, N> row = weights.read();
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            A sum = sf == 0 ? A(0) : acc[p];
            for (unsigned s = 0; s < SIMD; ++s) {
#pragma HLS UNROLL
                sum += A(x.v[s]) * A(row.v[p * SIMD + s]);
            }
            acc[p] = sum;
        }
        if (++sf == SF) {
            sf = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(acc[p]);
            }
            out.write(word);
            if (++nf == NF) nf = 0;
        }
    }
}

}  // namespace ql
