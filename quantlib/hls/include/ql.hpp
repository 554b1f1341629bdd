// What every kernel needs: the word of a stream, tables, and the marks the simulator reads.
//
// A kernel is a function template from streams to streams: one flattened loop of initiation interval 1, at most one read per input and one write
// per output and iteration, blocking access only, no static data. Its first statement per iteration is QL_CYCLE().
#pragma once
#include <ap_int.h>
#include <hls_stream.h>

#include <cstdint>
#ifndef __SYNTHESIS__
#include <fstream>
#include <string>
#pragma GCC diagnostic ignored "-Wunused-label"  // labels name the loops in the vendor's reports; nothing jumps to them
#endif

#ifndef QL_SIMULATION  // the vendor's headers: a stage is a call, a cycle is the tool's business
#define QL_CYCLE()
#define QL_STAGE(label, ...) __VA_ARGS__
#define QL_RUN()
#define QL_DEPTH(s, n)
#endif

// Tables are native integers in simulation and exact-width words in synthesis; the values are the same text.
#ifdef __SYNTHESIS__
#define QL_TABLE(native, exact) static const exact
#else
#define QL_TABLE(native, exact) static const native
#endif

// Leaf functions have a body for synthesis and a fast one; QL_SYNTHESIS_BODIES compiles the first in simulation.
#if defined(__SYNTHESIS__) && !defined(QL_SYNTHESIS_BODIES)
#define QL_SYNTHESIS_BODIES 1
#endif

namespace ql {

// One word of a stream: N neighbouring channels of a pixel.
template <typename T, unsigned N> struct Word {
    T v[N];
};

template <unsigned A, unsigned B> struct Larger {
    static const unsigned value = A > B ? A : B;
};

// The largest power of two that is at most N.
template <unsigned N> struct Power {
    static const unsigned value = 2 * Power<N / 2>::value;
};
template <> struct Power<1> {
    static const unsigned value = 1;
};

// sum of x[i] * w[i], computed in A
template <typename A, typename T, typename W, unsigned N> inline A dot(const T (&x)[N], const W (&w)[N]) {
#pragma HLS INLINE
    A sum = 0;
#ifdef QL_SYNTHESIS_BODIES
    // signs and zeros select, they do not multiply
dot:
    for (unsigned i = 0; i < N; ++i) {
#pragma HLS UNROLL
        const A value = A(x[i]), weight = A(w[i]);
        sum += weight == 1 ? value : weight == -1 ? A(-value) : weight == 0 ? A(0) : A(value * weight);
    }
#else
    for (unsigned i = 0; i < N; ++i) sum += A(x[i]) * A(w[i]);
#endif
    return sum;
}

// sum of x[i] with the signs w[i]: 1 is plus, 0 is minus
template <typename A, typename T, typename W, unsigned N> inline A signed_sum(const T (&x)[N], const W (&w)[N]) {
#pragma HLS INLINE
    A sum = 0;
signs:
    for (unsigned i = 0; i < N; ++i) {
#pragma HLS UNROLL
        sum += w[i] ? A(x[i]) : A(-A(x[i]));
    }
    return sum;
}

// N bits in words of 64. In hardware a word is wires: bits that nobody sets are constants and vanish.
template <unsigned N> struct Bits {
    static const unsigned WORDS = (N + 63) / 64;
    uint64_t word[WORDS];
};
template <unsigned N> inline void set_bit(Bits<N>& to, unsigned i, bool value) {
#pragma HLS INLINE
    if (i % 64 == 0) to.word[i / 64] = 0;
    to.word[i / 64] |= uint64_t(value) << (i % 64);
}
template <typename W, unsigned N> inline Bits<N> packed(const W (&w)[N]) {
#pragma HLS INLINE
    Bits<N> bits;
pack:
    for (unsigned i = 0; i < N; ++i) {
#pragma HLS UNROLL
        set_bit(bits, i, w[i] != 0);
    }
    return bits;
}
// Ones among the bits: six at a time, whose count is a function of six inputs, then a tree of adders.
template <unsigned N> inline unsigned ones(const Bits<N>& bits) {
#pragma HLS INLINE
    unsigned sum = 0;
words:
    for (unsigned k = 0; k < Bits<N>::WORDS; ++k) {
#pragma HLS UNROLL
        for (unsigned i = 0; i < 64; i += 6) {
#pragma HLS UNROLL
            const unsigned six = unsigned(bits.word[k] >> i) & 63;
            sum += (six & 1) + (six >> 1 & 1) + (six >> 2 & 1) + (six >> 3 & 1) + (six >> 4 & 1) + (six >> 5);
        }
    }
    return sum;
}
// Sum of signs times signs, both as bits, over the places that are shown: XNOR, then twice the ones that agree less all that are shown.
template <typename A, unsigned N> inline A agreement(const Bits<N>& x, const Bits<N>& w, const Bits<N>& shown) {
#pragma HLS INLINE
    Bits<N> same;
xnor:
    for (unsigned k = 0; k < Bits<N>::WORDS; ++k) {
#pragma HLS UNROLL
        same.word[k] = ~(x.word[k] ^ w.word[k]) & shown.word[k];
    }
    return A(2 * int(ones(same)) - int(ones(shown)));
}

// How the products of a dot product are made: of integers; of integers with signs; of -1 and 1 (and 0, where ZEROS) with signs.
struct Products {
    template <typename A, typename T, typename W> static A term(T x, W w) { return A(x) * A(w); }
    template <typename A, typename T, typename W, unsigned N> static A sum(const T (&x)[N], const W (&w)[N]) { return dot<A>(x, w); }
};
struct Signs {
    template <typename A, typename T, typename W> static A term(T x, W w) { return w ? A(x) : A(-A(x)); }
    template <typename A, typename T, typename W, unsigned N> static A sum(const T (&x)[N], const W (&w)[N]) { return signed_sum<A>(x, w); }
};
template <bool ZEROS> struct Xnor {
    template <typename A, typename T, typename W, unsigned N> static A sum(const T (&x)[N], const W (&w)[N]) {
#pragma HLS INLINE
#ifdef QL_SYNTHESIS_BODIES
        Bits<N> plus, shown;
    bits:
        for (unsigned i = 0; i < N; ++i) {
#pragma HLS UNROLL
            set_bit(plus, i, x[i] > 0);
            set_bit(shown, i, !ZEROS || x[i] != 0);
        }
        return agreement<A>(plus, packed(w), shown);
#else
        return signed_sum<A>(x, w);
#endif
    }
};

// number of thresholds t[0] <= t[1] <= ... that v reaches
template <typename A, typename T, unsigned L> inline unsigned count(A v, const T (&t)[L]) {
#pragma HLS INLINE
    unsigned reached = 0;
#ifdef QL_SYNTHESIS_BODIES
    const bool few = L <= 15;
#else
    const bool few = L <= 31;
#endif
    if (few) {
    compare:
        for (unsigned k = 0; k < L; ++k) {
#pragma HLS UNROLL
            reached += v >= A(t[k]);
        }
    } else {
    search:
        for (unsigned bit = Power<L>::value; bit; bit /= 2) {
#pragma HLS UNROLL
            if (reached + bit <= L && v >= A(t[reached + bit - 1])) reached += bit;
        }
    }
    return reached;
}

#ifndef __SYNTHESIS__
// A table from a binary file (little endian, native words); false when the file is missing or too short.
inline bool load_table(const std::string& path, void* to, std::size_t bytes) {
    std::ifstream file(path.c_str(), std::ios::binary);
    return bool(file.read(static_cast<char*>(to), std::streamsize(bytes)));
}
#endif

template <typename A> inline A clamp(A v, A lo, A hi) { return v < lo ? lo : v > hi ? hi : v; }

}  // namespace ql
