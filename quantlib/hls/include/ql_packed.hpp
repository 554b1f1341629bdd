// Several low-bit products per DSP slice: segments of neighbouring columns, the unit that multiplies packed words, and pixels in order again.
#pragma once
#include "ql_window.hpp"

namespace ql {

// A packing (docs/packing.md): N_ unsigned activations in one word, K_ signed weights in the other; the sum of products i and j is field
// i * FI_ + j * FJ_ of the product, and fields are STRIDE_ bits apart. OUTER_: the weights of a word belong to K_ output channels, else to K_ taps of
// a kernel row. Operands of ACT_BITS_ and WEIGHT_BITS_ bits are cut into ACT_PARTS_ or WEIGHT_PARTS_ halves. CHAIN_ products are summed in the slices
// before they are unpacked; TRICK_: a field's top bit lies in the next field. ACT_PORT_, WEIGHT_PORT_, SUM_: bits of the ports and of the accumulator.
template <bool OUTER_, unsigned N_, unsigned K_, unsigned FI_, unsigned FJ_, unsigned STRIDE_, unsigned ACT_BITS_, unsigned WEIGHT_BITS_,
          unsigned ACT_PARTS_, unsigned WEIGHT_PARTS_, unsigned CHAIN_, bool TRICK_, unsigned ACT_PORT_, unsigned WEIGHT_PORT_, unsigned SUM_>
struct Packing {
    static const bool OUTER = OUTER_, TRICK = TRICK_;
    static const unsigned N = N_, K = K_, FI = FI_, FJ = FJ_, STRIDE = STRIDE_, ACT_BITS = ACT_BITS_, WEIGHT_BITS = WEIGHT_BITS_;
    static const unsigned ACT_PARTS = ACT_PARTS_, WEIGHT_PARTS = WEIGHT_PARTS_, PARTS = ACT_PARTS_ * WEIGHT_PARTS_, CHAIN = CHAIN_;
    static const unsigned FIELDS = (N_ - 1) * FI_ + (K_ - 1) * FJ_ + 1;
    typedef ap_int<ACT_PORT_> Acts;
    typedef ap_int<WEIGHT_PORT_> Weights;
    typedef ap_int<ACT_PORT_ + WEIGHT_PORT_> Product;
    typedef ap_int<SUM_> Sum;
};

// One slice: a word of activations times a word of weights.
template <typename P> inline typename P::Product slice(typename P::Acts acts, typename P::Weights weights) {
#pragma HLS INLINE
    const typename P::Product product = int64_t(acts) * int64_t(weights);
#pragma HLS BIND_OP variable = product op = mul impl = dsp
    return product;
}

// y[i * FI + j * FJ] = sum over lanes l of x[i * SIMD + l] * w[j][l] over all i and j of the packing
template <typename P, typename A, typename TW, unsigned IN, unsigned SIMD, unsigned K, unsigned FIELDS>
inline void packed_dot(const A (&x)[IN], const TW (&w)[K][SIMD], A (&y)[FIELDS]) {
#pragma HLS INLINE
    for (unsigned f = 0; f < FIELDS; ++f) {
#pragma HLS UNROLL
        y[f] = 0;
    }
#ifdef QL_SYNTHESIS_BODIES
    const unsigned act_bits = P::ACT_BITS / P::ACT_PARTS + P::ACT_BITS % P::ACT_PARTS;  // of a half
    const unsigned weight_bits = P::WEIGHT_BITS / P::WEIGHT_PARTS + P::WEIGHT_BITS % P::WEIGHT_PARTS;
parts:
    for (unsigned part = 0; part < P::PARTS; ++part) {
#pragma HLS UNROLL
        // of a cut weight the upper half is signed, the lower one is not; halves of activations never are
        const bool lower_weight = P::WEIGHT_PARTS == 2 && part == 0;
        const unsigned act_shift = P::ACT_PARTS == 2 && part ? act_bits : 0, weight_shift = P::WEIGHT_PARTS == 2 && part ? weight_bits : 0;
    chains:
        for (unsigned first = 0; first < SIMD; first += P::CHAIN) {
#pragma HLS UNROLL
            typename P::Sum total = 0;
            unsigned odd[FIELDS + 1] = {};  // the lowest bit of every field's sum
#pragma HLS ARRAY_PARTITION variable = odd complete
        chain:
            for (unsigned l = first; l < first + P::CHAIN && l < SIMD; ++l) {
#pragma HLS UNROLL
                int64_t a[P::N], b[K];
#pragma HLS ARRAY_PARTITION variable = a complete
#pragma HLS ARRAY_PARTITION variable = b complete
                int64_t acts = 0, weights = 0;
                for (unsigned i = 0; i < P::N; ++i) {
#pragma HLS UNROLL
                    const int64_t value = int64_t(x[i * SIMD + l]) >> act_shift;
                    a[i] = P::ACT_PARTS == 2 ? value & ((int64_t(1) << act_bits) - 1) : value;
                    acts += a[i] * (int64_t(1) << (i * P::FI * P::STRIDE));
                }
                for (unsigned j = 0; j < K; ++j) {
#pragma HLS UNROLL
                    const int64_t value = int64_t(w[j][l]) >> weight_shift;
                    b[j] = lower_weight ? value & ((int64_t(1) << weight_bits) - 1) : value;
                    weights += b[j] * (int64_t(1) << (j * P::FJ * P::STRIDE));
                }
                total = int64_t(total) + int64_t(slice<P>(acts, weights));
                for (unsigned i = 0; i < P::N; ++i) {
#pragma HLS UNROLL
                    for (unsigned j = 0; j < K; ++j) {
#pragma HLS UNROLL
                        odd[i * P::FI + j * P::FJ] ^= unsigned(a[i] & b[j] & 1);
                    }
                }
            }
            int64_t rest = int64_t(total);
        fields:
            for (unsigned f = 0; f < FIELDS; ++f) {
#pragma HLS UNROLL
                int64_t low = rest & ((int64_t(1) << P::STRIDE) - 1);
                if (P::TRICK) {
                    const int64_t top = int64_t(unsigned(rest >> P::STRIDE & 1) ^ odd[f + 1]) << P::STRIDE;
                    low = lower_weight ? low + top : low - top;
                } else if (!lower_weight && (low >> (P::STRIDE - 1) & 1)) {
                    low -= int64_t(1) << P::STRIDE;
                }
                y[f] += A(low * (int64_t(1) << (act_shift + weight_shift)));
                rest = (rest - low) >> P::STRIDE;
            }
        }
    }
#else
#pragma GCC unroll 16
    for (unsigned i = 0; i < P::N; ++i) {
#pragma GCC unroll 16
        for (unsigned j = 0; j < K; ++j) {
            A sum = 0;
            for (unsigned l = 0; l < SIMD; ++l) sum += x[i * SIMD + l] * A(w[j][l]);
            y[i * P::FI + j * P::FJ] += sum;
        }
    }
#endif
}

// For each of LINES * SEGMENTS segments of an image and each of GROUPS groups: NF blocks of PE output channels from SF words of N columns x SIMD channels,
// which are read once and held. EACH: output channel p of a block reads channel p alone. A value of x becomes the index (x - LO) >> SHIFT; a sum of
// indices s becomes base + SCALE * s.
//
// A segment makes N + TAPS - 1 sums per channel, of which the last TAPS - 1 go on in the next segment of its line; each word written has the first E of
// them, pixel by pixel, PE channels each. Row (g * NF + nf) * SF + sf of the weights belongs to that iteration: words of K taps, those of a channel side
// by side, or (OUTER) words of K channels. Iterations per image: LINES * SEGMENTS * GROUPS * NF * SF.
template <typename P, typename A, bool EACH, unsigned LINES, unsigned SEGMENTS, unsigned GROUPS, unsigned NF, unsigned SF, unsigned TAPS, unsigned E, int64_t LO, unsigned SHIFT,
          int SCALE, typename TI, typename TO, typename TW, typename TB, unsigned IN, unsigned OUT, unsigned ROWS, unsigned UNITS, unsigned SIMD,
          unsigned K, unsigned BASES, unsigned PE>
void packed(hls::stream<Word<TI, IN>>& in, hls::stream<Word<TO, OUT>>& out, const TW (&weight)[ROWS][UNITS][K][SIMD], const TB (&base)[BASES][PE],
            unsigned images) {
    static_assert(ROWS == GROUPS * NF * SF && K == P::K && OUT == E * PE, "one row of weights per iteration of a segment");
    static_assert(EACH ? SIMD == 1 && IN == P::N * PE : IN == P::N * SIMD, "one lane per value");
    static_assert(P::OUTER ? UNITS * K >= PE && TAPS == 1 : UNITS % PE == 0 && UNITS / PE * K >= TAPS, "words of weights for every channel and tap");
    const unsigned SPAN = P::N + TAPS - 1, SPILL = TAPS - 1, WORDS = P::OUTER ? 1 : UNITS / PE;
    Word<TI, IN> held[SF];
    A acc[PE][SPAN] = {};
    A carry[GROUPS * NF][PE][SPILL ? SPILL : 1] = {};
#pragma HLS AGGREGATE variable = held compact = bit
#pragma HLS ARRAY_PARTITION variable = acc complete dim = 0
#pragma HLS ARRAY_PARTITION variable = carry complete dim = 2
#pragma HLS ARRAY_PARTITION variable = carry complete dim = 3
#pragma HLS BIND_STORAGE variable = carry type = ram_s2p impl = lutram
#pragma HLS ARRAY_PARTITION variable = weight complete dim = 2
#pragma HLS ARRAY_RESHAPE variable = weight complete dim = 3
#pragma HLS ARRAY_RESHAPE variable = weight complete dim = 4
#pragma HLS ARRAY_PARTITION variable = base complete dim = 2
    unsigned segment = 0, g = 0, nf = 0, block = 0, sf = 0, row = 0;
    const unsigned total = images * LINES * SEGMENTS * GROUPS * NF * SF;
products:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        if (nf == 0) held[sf] = in.read();
        A x[IN];
#pragma HLS ARRAY_PARTITION variable = x complete
        for (unsigned k = 0; k < IN; ++k) {
#pragma HLS UNROLL
            x[k] = A((int64_t(held[sf].v[k]) - LO) >> SHIFT);
        }
        if (sf == 0) {
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                for (unsigned f = 0; f < SPAN; ++f) {
#pragma HLS UNROLL
                    acc[p][f] = segment && f < SPILL ? carry[block][p][f < SPILL ? f : 0] : A(0);
                }
            }
        }
        unsigned channel = 0, tap = 0;  // of the word of weights
    units:
        for (unsigned u = 0; u < UNITS; ++u) {
#pragma HLS UNROLL
            A y[P::FIELDS];
#pragma HLS ARRAY_PARTITION variable = y complete
            if (EACH) {
                A own[P::N];
#pragma HLS ARRAY_PARTITION variable = own complete
                for (unsigned n = 0; n < P::N; ++n) {
#pragma HLS UNROLL
                    own[n] = x[n * (IN / P::N) + channel];
                }
                packed_dot<P>(own, weight[row][u], y);
            } else {
                packed_dot<P>(x, weight[row][u], y);
            }
            if (P::OUTER) {
                for (unsigned j = 0; j < K && channel < PE; ++j, ++channel) {
#pragma HLS UNROLL
                    for (unsigned n = 0; n < P::N; ++n) {
#pragma HLS UNROLL
                        acc[channel][n] += y[n * P::FI + j * P::FJ];
                    }
                }
            } else {  // fields beyond the span belong to no tap
                for (unsigned f = 0; f < P::FIELDS && tap + f < SPAN; ++f) {
#pragma HLS UNROLL
                    acc[channel][tap + f] += y[f];
                }
                tap += K;
                if (tap == WORDS * K) {
                    tap = 0;
                    ++channel;
                }
            }
        }
        ++row;
        if (++sf == SF) {
            sf = 0;
            Word<TO, OUT> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                for (unsigned e = 0; e < E; ++e) {
#pragma HLS UNROLL
                    word.v[e * PE + p] = TO(A(base[BASES == 1 ? 0 : block][p]) + acc[p][e] * SCALE);
                }
                for (unsigned f = 0; f < SPILL; ++f) {
#pragma HLS UNROLL
                    carry[block][p][f] = acc[p][f + P::N];
                }
            }
            out.write(word);
            ++block;
            if (++nf == NF) {
                nf = 0;
                if (++g == GROUPS) {
                    g = 0;
                    block = row = 0;
                    if (++segment == SEGMENTS) segment = 0;
                }
            }
        }
    }
}

// The same where the index 0 means 0.
template <typename P, typename A, bool EACH, unsigned LINES, unsigned SEGMENTS, unsigned GROUPS, unsigned NF, unsigned SF, unsigned TAPS, unsigned E, int64_t LO, unsigned SHIFT,
          int SCALE, typename TI, typename TO, typename TW, unsigned IN, unsigned OUT, unsigned ROWS, unsigned UNITS, unsigned SIMD, unsigned K>
void packed(hls::stream<Word<TI, IN>>& in, hls::stream<Word<TO, OUT>>& out, const TW (&weight)[ROWS][UNITS][K][SIMD], unsigned images) {
#pragma HLS INLINE
    const int none[1][OUT / E] = {};
#pragma HLS ARRAY_PARTITION variable = none complete dim = 0
    packed<P, A, EACH, LINES, SEGMENTS, GROUPS, NF, SF, TAPS, E, LO, SHIFT, SCALE>(in, out, weight, none, images);
}

// For each output row and each of its SEGMENTS segments of N columns, in the order (group, kernel row, phase, word of the group): column n of segment s and
// phase p is column FIRST + (s * N + n) * SW + p * APART of the image; outside of it values are OUTSIDE. Inside they become the index (x - LO) >> SHIFT.
// Rows, fill and pace are those of `window`; SEGMENTS * GROUPS * KH * PHASES * PARTS words are written per output row. Iterations per image: G::iterations().
//
// Columns lie in N * SW banks, so that those of a segment are read at once.
template <unsigned H, unsigned W, unsigned GROUPS, unsigned PARTS, unsigned KH, unsigned PHASES, unsigned SH, unsigned SW, unsigned PT, unsigned DH, unsigned APART,
          unsigned OH, unsigned SEGMENTS, int FIRST, int64_t LO, unsigned SHIFT, int OUTSIDE, typename TI, typename TO, unsigned SIMD, unsigned LANES>
void segments(hls::stream<Word<TI, SIMD>>& in, hls::stream<Word<TO, LANES>>& out, unsigned images) {
    typedef Geometry<H, W * GROUPS * PARTS, KH, SH, PT, DH, OH, SEGMENTS * GROUPS * KH * PHASES * PARTS> G;
    static_assert(LANES % SIMD == 0 && FIRST <= 0, "whole columns, from the image's first one on");
    const unsigned N = LANES / SIMD, BANKS = N * SW, ROWS = G::ROWS, COLUMNS = (W + unsigned(-FIRST) + BANKS - 1) / BANKS;
    const unsigned BANK = unsigned(-FIRST) % BANKS, PLACE = unsigned(-FIRST) / BANKS;  // of the image's first column
    Word<TO, SIMD> rows[BANKS][ROWS][COLUMNS * GROUPS * PARTS];
#pragma HLS ARRAY_PARTITION variable = rows dim = 1 complete
#pragma HLS AGGREGATE variable = rows compact = bit
    unsigned to_read = 0, to_write = 0, length = 0;  // of this phase: words and iterations
    unsigned read_share = 0, write_share = 0, step = 0;
    unsigned read_row = 0, read_slot = 0, bank = BANK, place = PLACE, read_col = 0, read_part = 0;  // where the next word goes
    unsigned oy = 0, s = 0, g = 0, u = 0, phase = 0, part = 0;
    int base_row = 0, row = 0, base_col = 0, col = 0;  // col: that of lane 0
    unsigned base_slot = 0, slot = 0, turn = 0, turned = 0;  // lane 0 reads bank `turned` at place s + turn
    bool filling = false, start = true;
    const unsigned total = images * G::iterations();
segments:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = rows inter false
        QL_CYCLE();
        if (start) {  // an image begins: fill first, if the first row needs anything
            start = false;
            filling = G::fill() > 0;
            to_read = filling ? G::fill() : G::reads(0);
            to_write = filling ? 0 : G::OUT;
            length = to_read > to_write ? to_read : to_write;
            read_share = write_share = step = 0;
            read_row = read_slot = read_col = read_part = 0;
            bank = BANK;
            place = PLACE;
            oy = s = g = u = phase = part = turn = turned = 0;
            base_row = row = -int(PT);
            base_col = col = FIRST;
            base_slot = slot = (ROWS - PT % ROWS) % ROWS;  // as in `window`
        }
        write_share += to_write;
        if (write_share >= length) {
            write_share -= length;
            const bool in_rows = row >= 0 && row < int(H);
            const unsigned from = !in_rows ? 0 : ROWS == H ? unsigned(row) : slot;
#ifdef QL_SYNTHESIS_BODIES
            Word<TO, SIMD> read[BANKS];
            unsigned at[BANKS];
#pragma HLS ARRAY_PARTITION variable = read complete
#pragma HLS ARRAY_PARTITION variable = at complete
        banks:
            for (unsigned b = 0; b < BANKS; ++b) {
#pragma HLS UNROLL
                at[b] = s + turn + (b < turned);
                read[b] = rows[b][from][((at[b] < COLUMNS ? at[b] : 0) * GROUPS + g) * PARTS + part];
            }
#endif
            Word<TO, LANES> word;
        columns:
            for (unsigned n = 0; n < N; ++n) {
#pragma HLS UNROLL
                const int column = col + int(n * SW);
                const bool inside = in_rows && column >= 0 && column < int(W);
                const unsigned beyond = turned + n * SW, b = beyond < BANKS ? beyond : beyond - BANKS;
#ifdef QL_SYNTHESIS_BODIES
                const Word<TO, SIMD>& x = read[b];
#else
                const Word<TO, SIMD>& x = rows[b][from][inside ? ((s + turn + (b < turned)) * GROUPS + g) * PARTS + part : 0];
#endif
                for (unsigned l = 0; l < SIMD; ++l) {
#pragma HLS UNROLL
                    word.v[n * SIMD + l] = inside ? x.v[l] : TO(OUTSIDE);
                }
            }
            out.write(word);
            if (++part == PARTS) {
                part = 0;
                col += int(APART);
                turned += APART % BANKS;
                turn += APART / BANKS;
                if (turned >= BANKS) {
                    turned -= BANKS;
                    ++turn;
                }
                if (++phase == PHASES) {
                    phase = 0;
                    turn = turned = 0;
                    row += int(DH);
                    slot += DH;
                    if (slot >= ROWS) slot -= ROWS;
                    if (++u == KH) {
                        u = 0;
                        if (++g == GROUPS) {
                            g = 0;
                            base_col += int(BANKS);
                            if (++s == SEGMENTS) {
                                s = 0;
                                base_col = FIRST;
                                base_row += int(SH);
                                base_slot += SH;
                                if (base_slot >= ROWS) base_slot -= ROWS;
                            }
                        }
                        row = base_row;
                        slot = base_slot;
                    }
                    col = base_col;
                }
            }
        }
        read_share += to_read;
        if (read_share >= length) {
            read_share -= length;
            const Word<TI, SIMD> x = in.read();
            Word<TO, SIMD> index;
            for (unsigned l = 0; l < SIMD; ++l) {
#pragma HLS UNROLL
                index.v[l] = TO((int64_t(x.v[l]) - LO) >> SHIFT);
            }
            if (read_row < G::need(int(OH) - 1)) rows[bank][ROWS == H ? read_row : read_slot][place * GROUPS * PARTS + read_part] = index;
            if (++read_part == GROUPS * PARTS) {
                read_part = 0;
                if (++bank == BANKS) {
                    bank = 0;
                    ++place;
                }
                if (++read_col == W) {
                    read_col = 0;
                    bank = BANK;
                    place = PLACE;
                    ++read_row;
                    if (++read_slot == ROWS) read_slot = 0;
                }
            }
        }
        if (++step == length) {
            step = 0;
            if (!filling && ++oy == OH) {
                start = true;
            } else {
                filling = false;
                to_read = G::reads(oy);
                to_write = G::OUT;
                length = to_read > to_write ? to_read : to_write;
            }
        }
    }
}

// Words of segments become pixels: of the sums of a line, those from FIRST on are its OW pixels; segment s holds sums s * N ... s * N + N - 1, the last one
// of a line E. In: for each segment NF words of E * PE; out: for each pixel NF words of PE. Two buffers of a segment each: one is written out while the
// other is filled, both spread evenly. Iterations per image: NF + sum over segments of max(words written, NF if another one follows).
template <unsigned LINES, unsigned SEGMENTS, unsigned NF, unsigned N, unsigned E, unsigned FIRST, unsigned OW, unsigned ITERATIONS, typename T,
          unsigned LANES, unsigned PE>
void pixels(hls::stream<Word<T, LANES>>& in, hls::stream<Word<T, PE>>& out, unsigned images) {
    static_assert(LANES == E * PE, "E pixels of PE channels per word");
    Word<T, LANES> buffer[2][NF];
#pragma HLS AGGREGATE variable = buffer compact = bit
#pragma HLS BIND_STORAGE variable = buffer type = ram_s2p impl = lutram
    unsigned to_read = 0, to_write = 0, length = 0;  // of this phase: words and iterations
    unsigned read_share = 0, write_share = 0, step = 0;
    unsigned line = 0, s = 0, base = 0;  // the segment that is written, and its first sum
    unsigned e = 0, nf = 0, read_nf = 0, half = 0;
    bool filling = false, start = true;
    const unsigned total = images * ITERATIONS;
pixels:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
#pragma HLS DEPENDENCE variable = buffer inter false
        QL_CYCLE();
        if (start) {
            start = false;
            filling = true;
            to_read = length = NF;
            to_write = read_share = write_share = step = 0;
            line = s = base = e = nf = read_nf = 0;
        }
        write_share += to_write;
        if (write_share >= length) {
            write_share -= length;
            Word<T, PE> word;
            for (unsigned p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                word.v[p] = buffer[half][nf].v[e * PE + p];
            }
            out.write(word);
            if (++nf == NF) {
                nf = 0;
                ++e;
            }
        }
        read_share += to_read;
        if (read_share >= length) {
            read_share -= length;
            buffer[1 - half][read_nf] = in.read();
            ++read_nf;
        }
        if (++step == length) {
            step = 0;
            if (!filling) {
                base += N;
                if (++s == SEGMENTS) {
                    s = base = 0;
                    ++line;
                }
            }
            filling = false;
            half = 1 - half;
            read_nf = 0;
            if (line == LINES) {
                start = true;
            } else {
                const unsigned last = s + 1 == SEGMENTS, end = base + (last ? E : N);  // sums that are final with this segment
                const unsigned stop = end < FIRST + OW ? end : FIRST + OW;
                e = base < FIRST ? FIRST - base : 0;
                to_write = stop > base + e ? (stop - base - e) * NF : 0;
                to_read = last && line + 1 == LINES ? 0 : NF;
                length = to_read > to_write ? to_read : to_write;
            }
        }
    }
}

}  // namespace ql
