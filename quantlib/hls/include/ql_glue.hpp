// What the writer puts between kernels: forks, width converters, and the AXI ends of the network.
#pragma once
#include <ap_axi_sdata.h>

#include "ql.hpp"

namespace ql {

// One stream to two readers. Iterations per image: WORDS.
template <unsigned WORDS, typename T, unsigned N>
void fork(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& a, unsigned images, hls::stream<Word<T, N>>& b) {
    const unsigned total = images * WORDS;
fork:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<T, N> word = in.read();
        a.write(word);
        b.write(word);
    }
}

// RATIO narrow words to one wide word. Iterations per image: WORDS, the narrow ones.
template <unsigned WORDS, typename T, unsigned N, unsigned M>
void gather(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, unsigned images) {
    static_assert(M % N == 0, "a whole number of narrow words");
    Word<T, M> word;
    unsigned k = 0;
    const unsigned total = images * WORDS;
gather:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<T, N> x = in.read();
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            word.v[k * N + p] = x.v[p];
        }
        if (++k == M / N) {
            k = 0;
            out.write(word);
        }
    }
}

// One wide word to RATIO narrow words. Iterations per image: WORDS, the narrow ones.
template <unsigned WORDS, typename T, unsigned N, unsigned M>
void scatter(hls::stream<Word<T, N>>& in, hls::stream<Word<T, M>>& out, unsigned images) {
    static_assert(N % M == 0, "a whole number of narrow words");
    Word<T, N> word;
    unsigned k = 0;
    const unsigned total = images * WORDS;
scatter:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (k == 0) word = in.read();
        Word<T, M> y;
        for (unsigned p = 0; p < M; ++p) {
#pragma HLS UNROLL
            y.v[p] = word.v[k * M + p];
        }
        if (++k == N / M) k = 0;
        out.write(y);
    }
}

// 64-bit words carry elements of BITS = 8, 16, 32 or 64 bits, the first one lowest; an image begins with a new word.
// Element p of a word, sign or zero extended by the assignment to T.
template <unsigned BITS, typename T> inline T element(uint64_t data, unsigned p) {
#pragma HLS INLINE
    const uint64_t bits = BITS == 64 ? data : (data >> (p * BITS % 64)) & ((uint64_t(1) << (BITS % 64)) - 1);
    const uint64_t sign = uint64_t(1) << (BITS - 1);
    return T(int64_t((bits ^ sign) - sign));
}
template <unsigned BITS, typename T> inline uint64_t placed(T value, unsigned p) {
#pragma HLS INLINE
    const uint64_t mask = BITS == 64 ? ~uint64_t(0) : (uint64_t(1) << (BITS % 64)) - 1;
    return (uint64_t(int64_t(value)) & mask) << (p * BITS % 64);
}

typedef ap_axiu<64, 0, 0, 0> Axis;

inline uint64_t next_word(hls::stream<Axis>& s, unsigned) { return uint64_t(s.read().data); }
inline uint64_t next_word(const uint64_t* m, unsigned i) { return m[i]; }

// ELEMENTS per image enter as words of N lanes; SOURCE is hls::stream<Axis>& or const uint64_t*. Iterations per image: ceil(ELEMENTS / (64 / BITS)) * (64 / BITS) / N.
template <unsigned ELEMENTS, unsigned BITS, typename SOURCE, typename T, unsigned N>
void enter(SOURCE source, hls::stream<Word<T, N>>& out, unsigned images) {
    const unsigned EACH = 64 / BITS, WORDS = (ELEMENTS + EACH - 1) / EACH, PARTS = EACH / N;
    static_assert(EACH % N == 0 && ELEMENTS % N == 0, "lanes divide the words of the bus and the image");
    unsigned part = 0, left = ELEMENTS, word = 0;
    uint64_t data = 0;
    unsigned position = 0;
    const unsigned total = images * WORDS * PARTS;
enter:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (part == 0) data = next_word(source, position++);
        if (left) {
            Word<T, N> y;
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                y.v[p] = element<BITS, T>(data, part * N + p);
            }
            out.write(y);
            left -= N;
        }
        if (++part == PARTS) {
            part = 0;
            if (++word == WORDS) {
                word = 0;
                left = ELEMENTS;
            }
        }
    }
}

inline void put_word(hls::stream<Axis>& s, unsigned, uint64_t data, bool last) {
    Axis a;
    a.data = data;
    a.keep = 0xff;
    a.strb = 0xff;
    a.last = last;
    s.write(a);
}
inline void put_word(uint64_t* m, unsigned i, uint64_t data, bool) { m[i] = data; }

// Words of N lanes leave as 64-bit words, the last of an image marked; SINK is hls::stream<Axis>& or uint64_t*. Iterations per image as for enter.
template <unsigned ELEMENTS, unsigned BITS, typename SINK, typename T, unsigned N>
void leave(hls::stream<Word<T, N>>& in, SINK sink, unsigned images) {
    const unsigned EACH = 64 / BITS, WORDS = (ELEMENTS + EACH - 1) / EACH, PARTS = EACH / N;
    static_assert(EACH % N == 0 && ELEMENTS % N == 0, "lanes divide the words of the bus and the image");
    unsigned part = 0, left = ELEMENTS, word = 0;
    uint64_t data = 0;
    unsigned position = 0;
    const unsigned total = images * WORDS * PARTS;
leave:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (left) {
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
                data |= placed<BITS>(x.v[p], part * N + p);
            }
            left -= N;
        }
        if (++part == PARTS) {
            part = 0;
            put_word(sink, position++, data, word == WORDS - 1);
            data = 0;
            if (++word == WORDS) {
                word = 0;
                left = ELEMENTS;
            }
        }
    }
}

}  // namespace ql
