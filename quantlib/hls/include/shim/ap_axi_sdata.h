// The AXI4-Stream word of the top level, for simulation where the vendor's headers are not installed.
#pragma once
#include <ap_int.h>

template <int D, int U, int TI, int TD> struct ap_axiu {
    static_assert(U == 0 && TI == 0 && TD == 0, "side channels other than keep, strb and last are not simulated");
    ap_uint<D> data;
    ap_uint<(D + 7) / 8> keep;
    ap_uint<(D + 7) / 8> strb;
    ap_uint<1> last;
};
