// FractionalConv2d: a window stage and a matrix-vector product of two sign planes, the low one gated by the sum of the high one.
#pragma once
#include "ql_matvec.hpp"
#include "ql_window.hpp"

namespace ql {

// How the two sums become one number: 2M + L, or in fixed point.
struct PlainMerge {
    template <typename A> static A join(A m, A low) { return A(2) * m + low; }
};
template <int MSB, int LSB, unsigned FRACTION, unsigned SHIFT, int LO, int HI> struct FixedMerge {
    template <typename A> static A join(A m, A low) {
        const A half = (A(1) << SHIFT) >> 1;
        const A t = clamp<A>((A(MSB) * clamp<A>(m * (A(1) << FRACTION), A(LO), A(HI)) + half) >> SHIFT, A(LO), A(HI));
        return clamp<A>((t * (A(1) << SHIFT) + A(LSB) * clamp<A>(low * (A(1) << FRACTION), A(LO), A(HI)) + half) >> SHIFT, A(LO), A(HI));
    }
};

// Codes n = 2m + l of -3, -1, 1, 3 (and 0, where ZEROS) with signs w (1 plus, 0 minus): the sums of m and of l.
template <bool ZEROS, typename A, typename T, typename W, unsigned N> inline void plane_sums(const T (&x)[N], const W (&w)[N], A& high, A& low) {
#pragma HLS INLINE
#ifdef QL_SYNTHESIS_BODIES
    Bits<N> m, l, shown;
planes:
    for (unsigned i = 0; i < N; ++i) {
#pragma HLS UNROLL
        const int code = int(x[i]);
        set_bit(m, i, code > 0);
        set_bit(l, i, (code & 2) != 0);  // 3 and -1
        set_bit(shown, i, !ZEROS || (code & 1) != 0);
    }
    const Bits<N> weight = packed(w);
    high = agreement<A>(m, weight, shown);
    low = agreement<A>(l, weight, shown);
#else
    high = 0;
    A both = 0;
    for (unsigned i = 0; i < N; ++i) {
        const A sign = A(int(x[i] > 0) - int(x[i] < 0));
        high += w[i] ? sign : A(-sign);
        both += w[i] ? A(x[i]) : A(-A(x[i]));
    }
    low = both - A(2) * high;
#endif
}

// As matvec, for codes n = 2m + l of -3, -1, 1, 3 (0 outside the image): M sums the signs m, L counts only where M reaches the gate.
// Iterations per image: VECTORS * GROUPS * NF * SF.
template <typename MERGE, bool ZEROS, typename A, unsigned VECTORS, unsigned GROUPS, unsigned NF, unsigned SF, typename TI, typename TO, typename TW, unsigned ROWS,
          unsigned PE, unsigned SIMD, typename TG>
void gated_matvec(hls::stream<Word<TI, SIMD>>& in, hls::stream<Word<TO, PE>>& out, const TW (&weight)[ROWS][PE][SIMD], const TG (&gate)[GROUPS * NF][PE],
                  unsigned images) {
#pragma HLS ARRAY_PARTITION variable = gate dim = 2 complete
    static_assert(ROWS == GROUPS * NF * SF, "one row of weights per iteration");
    Word<TI, SIMD> held[SF];
    A high[PE], low[PE];
#pragma HLS ARRAY_PARTITION variable = high complete
#pragma HLS ARRAY_PARTITION variable = low complete
#pragma HLS AGGREGATE variable = held compact = bit
    unsigned nf = 0, sf = 0, row = 0, block = 0;
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
            A m, l;
            plane_sums<ZEROS>(x.v, weight[row][p], m, l);
            high[p] = (sf == 0 ? A(0) : high[p]) + m;
            low[p] = (sf == 0 ? A(0) : low[p]) + l;
        }
        ++row;
        if (++sf == SF) {
            sf = 0;
            Word<TO, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = TO(MERGE::template join<A>(high[p], high[p] >= A(gate[block][p]) ? low[p] : A(0)));
            }
            out.write(word);
            if (++block == GROUPS * NF) {
                block = 0;
                row = 0;
            }
            if (++nf == NF) nf = 0;
        }
    }
}

}  // namespace ql
