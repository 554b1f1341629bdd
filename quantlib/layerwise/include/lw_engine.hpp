// The engine: reads the program step by step and runs each step on its units, which work side by side.
#pragma once
#include "lw_finish.hpp"
#include "lw_memory.hpp"
#include "lw_units.hpp"

namespace lw {

template <typename E>
void compute(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], hls::stream<Bus>& xs, hls::stream<Bus>& ws, hls::stream<Vector<E>>& ys) {
    if (s[KIND] == GATHER) arrive<E>(s, xs, ys);
    if (E::HAS_XNOR && s[KIND] == XNOR) {
        Xnor<E> unit;
        sweep<E>(s, addresses, unit, xs, ws, ys);
    }
    if (E::HAS_MULTIPLY && s[KIND] == MULTIPLY && s[MODE] != SATURATE) {
        Multiply<E> unit;
        sweep<E>(s, addresses, unit, xs, ws, ys);
    }
    if (E::HAS_SATURATE && s[KIND] == MULTIPLY && s[MODE] == SATURATE) saturate<E>(s, addresses, xs, ws, ys);
    if (E::HAS_WINDOW && s[KIND] == WINDOW) {
        Window<E> unit;
        sweep<E>(s, addresses, unit, xs, ws, ys);
    }
    if (E::HAS_WHOLE && s[KIND] == WHOLE) whole<E>(s, xs, ys);
}

// One step; the units are processes, joined by streams.
template <typename E>
void run(const Step& s, const Micro (&micros)[3][E::MICROS], const uint32_t (&addresses)[5][E::ADDRESSES], const Bus* weights, const Bus* tables,
         const Bus* maps, const Bus* sides, Bus* results, uint32_t slot) {
#pragma HLS DATAFLOW
    hls::stream<Bus> xs("xs"), ws("ws"), entries("entries"), operands("operands"), out("out");
    hls::stream<Vector<E>> ys("ys");
#pragma HLS STREAM variable = xs depth = 32
#pragma HLS STREAM variable = ws depth = 32
#pragma HLS STREAM variable = entries depth = 32
#pragma HLS STREAM variable = operands depth = 64
#pragma HLS STREAM variable = ys depth = 64
#pragma HLS STREAM variable = out depth = 64
    read_weights<E>(s, addresses[0], weights, entries, ws);
    read_maps<E>(s, addresses[1], maps, slot, entries, xs);
    read_operands<E>(s, micros[0], addresses[2], tables, sides, slot, operands);
    compute<E>(s, addresses[3], xs, ws, ys);
    finish<E>(s, micros[1], ys, operands, out);
    write_results<E>(s, micros[2], addresses[4], results, slot, out);
}

inline Bus program_word(const Bus* program, uint32_t at) {
    LW_COUNT(PROGRAM);
    return program[at];
}

// All steps for all images. The first word of the program: steps, words of the arena, words of an image's slot (its input and its outputs).
// `each` is called after every step of an image; in synthesis it does nothing.
template <typename E, typename EACH>
void engine(const Bus* program, const Bus* weights, const Bus* tables, const Bus* maps, const Bus* sides, Bus* results, unsigned images, EACH each) {
    Micro micros[3][E::MICROS];
    uint32_t addresses[5][E::ADDRESSES];
#pragma HLS ARRAY_PARTITION variable = micros dim = 1 complete
#pragma HLS BIND_STORAGE variable = micros type = ram_2p impl = lutram
#pragma HLS ARRAY_PARTITION variable = addresses dim = 1 complete
#pragma HLS ARRAY_PARTITION variable = addresses dim = 2 cyclic factor = 16
images:
    for (unsigned n = 0; n < images; ++n) {
        const Bus head = program[0];
        const unsigned steps = unsigned(head.v[0]);
        const uint32_t slot = uint32_t(head.v[1]) + n * uint32_t(head.v[2]);
        uint32_t at = 1;
    steps:
        for (unsigned k = 0; k < steps; ++k) {
            Step s;
        fields:
            for (unsigned i = 0; i < STEP_WORDS; ++i) {
                const Bus word = program_word(program, at++);
                for (unsigned j = 0; j < 8; ++j) {
#pragma HLS UNROLL
                    s.f[8 * i + j] = int64_t(word.v[j]);
                }
            }
        micros:
            for (int i = 0; i < s[MICROS]; ++i) {
                const Bus w = program_word(program, at++);
                const Micro m = {int64_t(w.v[0]), int64_t(w.v[1]), int64_t(w.v[2]), int64_t(w.v[3]),
                                 int64_t(w.v[4]), int64_t(w.v[5]), int64_t(w.v[6]), int64_t(w.v[7])};
                micros[0][i] = micros[1][i] = micros[2][i] = m;
            }
        addresses:
            for (int i = 0; i < s[ADDRESSES]; i += 16) {
                const Bus word = program_word(program, at++);
                for (unsigned j = 0; j < 16; ++j) {
#pragma HLS UNROLL
                    for (unsigned copy = 0; copy < 5; ++copy) {
#pragma HLS UNROLL
                        if (unsigned(i) + j < E::ADDRESSES) addresses[copy][unsigned(i) + j] = uint32_t(word.v[j / 2] >> (j % 2 * 32));
                    }
                }
            }
            run<E>(s, micros, addresses, weights, tables, maps, sides, results, slot);
            each(n, k);
        }
    }
}

}  // namespace lw
