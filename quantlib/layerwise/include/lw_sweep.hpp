// The loop that all units over windows share: tiles of rows in banks, groups of outputs, pixels, and the terms of a pixel.
//
// A unit U has ROWS output rows side by side, IN channels of a vector per term, OUT of the 32 outputs per term, HALVES weight memories, and
//   layout()              where its memories lie
//   keep(bank, at, ...)   a vector of the tile            take(half, i, word)  a word of weights
//   clear()               a new pixel                     term(...)            one term of all rows
//   result(row, group)    the vector of a row, when all its terms are in
#pragma once
#include "lw_step.hpp"

namespace lw {

// Which channels and outputs of a group exist, and what follows from it.
// A term: the tile, the weight memory and the place in it, the row of the tile and the column of the map that the first of `rows` output rows reads,
// the input group among those stored, the chunk of its channels and the part of the outputs.
struct Term {
    int tile;
    unsigned half, weight;
    int row, x, rows, g, stored, c, p;
};

inline int chunks(int channels, int each) { return (channels + each - 1) / each; }

template <typename E, typename U>
void sweep(const Step& s, const uint32_t (&addresses)[E::ADDRESSES], U& unit, hls::stream<Bus>& xs, hls::stream<Bus>& ws, hls::stream<Vector<E>>& ys) {
    unit.layout();
    const bool channelwise = U::CHANNELWISE;
    const int width = s[WIDTH], together = s[TOGETHER];
    const unsigned beats = beats_of(unsigned(s[BITS]));
    Walk at;
    at.start(s);
    unsigned half = 0;
    bool held = false;  // the weights of this group are there already
tiles:
    for (at.tile = 0; at.tile < s[OUT_HEIGHT]; at.tile += s[TILE_ROWS]) {
        at.clip(s);
    groups:
        for (at.group = 0; at.group < s[GROUPS_OUT]; ++at.group) {
            at.clip(s);
            if (channelwise || at.group == 0) {
                const int groups = channelwise ? 1 : s[GROUPS_IN];
            load_groups:
                for (int g = 0; g < groups; ++g) {
                load_rows:
                    for (int y = at.from(s); y < at.to(s); ++y) {
                        const unsigned row = unsigned(y - at.first(s));
                        unsigned place = (row / U::BANKS * unsigned(groups) + unsigned(g)) * unsigned(width);
                        unit.row();
                    load:
                        for (unsigned i = 0; i < unsigned(width) * beats; ++i) {
#pragma HLS PIPELINE II = 1
                            LW_COUNT(COMPUTE);
                            if (unit.keep(row % U::BANKS, place, s, xs)) ++place;
                        }
                    }
                }
            }
            const uint32_t* range = &addresses[s[RANGES] + 3 * at.group];
            const int first = channelwise ? 0 : int(range[0]), last = channelwise ? 0 : int(range[1]), stored = channelwise ? 1 : s[GROUPS_IN];
            const unsigned words = range[2];
            if (!held) {
            weights:
                for (unsigned i = 0; i < words; ++i) {
#pragma HLS PIPELINE II = 1
                    LW_COUNT(COMPUTE);
                    unit.take(half, i, s, ws.read());
                }
            }
            // while this group is worked on, the weights of the next one arrive
            const bool another = at.group + 1 < s[GROUPS_OUT] || at.tile + s[TILE_ROWS] < s[OUT_HEIGHT];
            const unsigned ahead = U::HALVES == 2 && another ? addresses[s[RANGES] + 3 * (at.group + 1 < s[GROUPS_OUT] ? at.group + 1 : 0) + 2] : 0;
            const int parts = chunks(at.group + 1 == s[GROUPS_OUT] ? s[LAST_OUT] : int(LANES), int(U::OUT));
            const int in_chunks = chunks(LANES, int(U::IN)), last_chunks = chunks(s[LAST_IN], int(U::IN));
            const int pixel = s[KERNEL_H] * s[KERNEL_W] * parts;  // terms per chunk of inputs
            const int terms = pixel * (channelwise ? 1 : (last - first) * in_chunks + (last == s[GROUPS_IN] - 1 ? last_chunks : in_chunks));
            const int length = terms > together ? terms : together;
            int columns = 0;  // of all blocks, times the groups of rows
            bool more = true;
        count:
            while (more) {
                columns += chunks(at.block_rows, together) * at.block_cols;
                more = at.block(s);
            }
            const unsigned work = unsigned(columns) * unsigned(length) + unsigned(together), total = work > ahead ? work : ahead;
            int sub = 0, col = 0, rows = least(together, at.block_rows);  // where in the block
            int g = first, u = 0, v = 0, c = 0, p = 0, k = 0, done = 0, ready = 0;
            unsigned weight = 0;
            unit.clear();
            unit.begin(half);
        terms:
            for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
                LW_COUNT(COMPUTE);
                if (U::HALVES == 2 && i < ahead) unit.take(1 - half, i, s, ws.read());
                if (k < ready) ys.write(unit.result(unsigned(k), s));
                if (done < columns) {
                    if (k < terms) {
                        const int row = (at.block_row + sub) * s[STRIDE_H] + u * s[DILATION_H];
                        const int x = (at.block_col + col) * s[STRIDE_W] - s[LEFT] + v * s[DILATION_W];
                        unit.term(s, Term{at.tile, half, weight, row, x, rows, g, stored, c, p});
                        ++weight;
                        if (++p == parts) {
                            p = 0;
                            const int limit = channelwise ? 1 : g == s[GROUPS_IN] - 1 ? last_chunks : in_chunks;
                            if (++c == limit) {
                                c = 0;
                                if (++v == s[KERNEL_W]) {
                                    v = 0;
                                    if (++u == s[KERNEL_H]) {
                                        u = 0;
                                        ++g;
                                    }
                                }
                            }
                        }
                    }
                    if (++k == length) {
                        k = 0;
                        weight = 0;
                        g = first;
                        ready = rows;
                        unit.hold();
                        unit.clear();
                        ++done;
                        if (++col == at.block_cols) {
                            col = 0;
                            sub += together;
                            if (sub >= at.block_rows) {
                                sub = 0;
                                at.block(s);
                            }
                            rows = least(together, at.block_rows - sub);
                        }
                    }
                } else {
                    ++k;
                }
            }
            held = U::HALVES == 2;
            if (U::HALVES == 2) half = 1 - half;
        }
    }
}

}  // namespace lw
