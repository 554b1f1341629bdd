// Matrix times vector, folded: PE results at a time, SIMD products of each per cycle.
#pragma once
#include "ql.hpp"

namespace ql {

// For each of VECTORS vectors per image and each of GROUPS groups: NF * PE results from SF * SIMD inputs. The inputs of a group are read once and
// held. Row (g * NF + nf) * SF + sf of the weights belongs to that iteration. Iterations per image: VECTORS * GROUPS * NF * SF.
// P makes the products: Products, or Signs and Xnor, whose weights are bits.
template <typename P, typename A, unsigned VECTORS, unsigned GROUPS, unsigned NF, unsigned SF, typename TI, typename TO, typename TW, unsigned ROWS,
          unsigned PE, unsigned SIMD>
void matvec_of(hls::stream<Word<TI, SIMD>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][PE][SIMD], unsigned images) {
    static_assert(ROWS == GROUPS * NF * SF, "one row of weights per iteration");
    Word<TI, SIMD> held[SF];
    A acc[PE];
#pragma HLS ARRAY_PARTITION variable = acc complete
#pragma HLS AGGREGATE variable = held compact = bit
    unsigned g = 0, nf = 0, sf = 0, row = 0;
    const unsigned total = images * VECTORS * GROUPS * NF * SF;
products:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (nf == 0) held[sf] = in.read();
        const Word<TI, SIMD>& x = held[sf];
    lanes:
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            acc[p] = (sf == 0 ? A(0) : acc[p]) + P::template sum<A>(x.v, weight[row][p]);
        }
        ++row;
        if (++sf == SF) {
            sf = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(acc[p]);
            }
            out.write(word);
            if (++nf == NF) {
                nf = 0;
                if (++g == GROUPS) {
                    g = 0;
                    row = 0;
                }
            }
        }
    }
}

template <typename A, unsigned VECTORS, unsigned GROUPS, unsigned NF, unsigned SF, typename TI, typename TO, typename TW, unsigned ROWS, unsigned PE,
          unsigned SIMD>
void matvec(hls::stream<Word<TI, SIMD>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][PE][SIMD], unsigned images) {
#pragma HLS INLINE
    matvec_of<Products, A, VECTORS, GROUPS, NF, SF>(in, out, weight, images);
}

}  // namespace ql
