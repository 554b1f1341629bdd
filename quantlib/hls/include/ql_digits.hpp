// The narrow edges of a join as one number, in mixed radix.
#pragma once
#include "ql.hpp"

namespace ql {

// The codes of one narrow edge: SIZE of them from LOW with STEP.
template <unsigned SIZE, int LOW, int STEP> struct Digit {
    static const unsigned size = SIZE;
    template <typename T> static unsigned of(T code) { return unsigned(int(code) - LOW) / unsigned(STEP); }
};
template <typename... D> struct Digits;
template <> struct Digits<> {
    template <unsigned PE> static void read(unsigned (&)[PE]) {}
};
template <typename D, typename... MORE> struct Digits<D, MORE...> {
    // reads one word per narrow edge and appends its digits, the first edge being the most significant
    template <unsigned PE, typename T, typename... TS>
    static void read(unsigned (&row)[PE], hls::stream<Word<T, PE>>& narrow, hls::stream<Word<TS, PE>>&... more) {
#pragma HLS INLINE
        const Word<T, PE> x = narrow.read();
        for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
            row[p] = row[p] * D::size + D::of(x.v[p]);
        }
        Digits<MORE...>::read(row, more...);
    }
};

}  // namespace ql
