// Elementwise groups: a chain of steps over blocks of one map, all intermediate values in small slots that stay in the cache.
//
// Constants that depend on the channel are laid out over one block (`tile` elements, a multiple of the channels), so that every
// loop runs over contiguous memory. Slots hold int32, or int64 where an edge of the group needs it. A step never writes a slot it reads.
#pragma once
#include "common.hpp"

namespace ql {

enum Step {  // in the order of STEPS in elementwise.py
    LOAD, STORE, ADD, REQUANT, LINE, MEND, COMPARE, SEARCH, LOOKUP, DIGIT, JOIN, MULTIPLY, GATE, OFFSET
};

/// y = clamp((x*mul + add) >> shift, lo, hi), or with mul2, add2 where x < kink. A is wide enough for every product.
template <class A, class S, class M>
inline void requant(const S* __restrict x, S* __restrict y, i64 n, int shift, A lo, A hi, const M* __restrict mul,
                    const A* __restrict add) {
    for (i64 i = 0; i < n; ++i) {
        A v = (static_cast<A>(x[i]) * static_cast<A>(mul[i]) + add[i]) >> shift;
        v = v < lo ? lo : v;
        y[i] = static_cast<S>(v > hi ? hi : v);
    }
}

template <class A, class S, class M>
inline void requant_kink(const S* __restrict x, S* __restrict y, i64 n, int shift, A lo, A hi, const M* __restrict mul,
                         const A* __restrict add, const S* __restrict kink, const M* __restrict mul2, const A* __restrict add2) {
    for (i64 i = 0; i < n; ++i) {
        const M m = x[i] >= kink[i] ? mul[i] : mul2[i];
        const A a = x[i] >= kink[i] ? add[i] : add2[i];
        A v = (static_cast<A>(x[i]) * static_cast<A>(m) + a) >> shift;
        v = v < lo ? lo : v;
        y[i] = static_cast<S>(v > hi ? hi : v);
    }
}

template <class A, class S, class M>
inline void requant_step(Reader& r, const S* x, S* y, i64 n) {
    const i64 kinked = r(), shift = r(), lo = r(), hi = r();
    const M* mul = r.table<M>();
    const A* add = r.table<A>();
    const S* kink = r.table<S>();
    const M* mul2 = r.table<M>();
    const A* add2 = r.table<A>();
    if (kinked)
        requant_kink<A, S, M>(x, y, n, int(shift), A(lo), A(hi), mul, add, kink, mul2, add2);
    else
        requant<A, S, M>(x, y, n, int(shift), A(lo), A(hi), mul, add);
}

/// y = clamp((clamp(x, low, high)*mul + add) >> shift, lo, hi): thresholds that lie on a line, see lines.py. The sum is right modulo 2^32.
template <class S>
inline void line(const S* __restrict x, S* __restrict y, i64 n, int shift, i32 lo, i32 hi, const S* __restrict low,
                 const S* __restrict high, const S* __restrict mul, const S* __restrict add) {
    for (i64 i = 0; i < n; ++i) {
        const S above = x[i] < low[i] ? low[i] : x[i], v = above > high[i] ? high[i] : above;
        i32 code = static_cast<i32>(static_cast<u32>(v) * static_cast<u32>(mul[i]) + static_cast<u32>(add[i])) >> shift;
        code = code < lo ? lo : code;
        y[i] = code > hi ? hi : code;
    }
}

/// count (+)= #{l < L : x >= t[l*tile + i]}
template <int L, bool FIRST, class S>
inline void compare(const S* __restrict x, S* __restrict count, i64 n, const S* __restrict t, i64 tile) {
    for (i64 i = 0; i < n; ++i) {
        S c = FIRST ? S(0) : count[i];
        for (int l = 0; l < L; ++l) c += x[i] >= t[l * tile + i];
        count[i] = c;
    }
}

template <bool FIRST, class S>
inline void compare_some(i64 levels, const S* x, S* count, i64 n, const S* t, i64 tile) {
    if (levels >= 4) return compare<4, FIRST>(x, count, n, t, tile);
    if (levels == 3) return compare<3, FIRST>(x, count, n, t, tile);
    if (levels == 2) return compare<2, FIRST>(x, count, n, t, tile);
    return compare<1, FIRST>(x, count, n, t, tile);
}

/// y = base + step*y: turns counts into codes; step is negative where the sign of the op is.
template <class S>
inline void finish(S* __restrict y, i64 n, const S* __restrict base, const S* __restrict step) {
    for (i64 i = 0; i < n; ++i) y[i] = base[i] + step[i] * y[i];
}

/// #{k < levels : x >= t[k]} for ascending t.
template <class S>
inline S reached(S x, const S* t, i64 levels) {
    i64 low = 0, high = levels;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (x >= t[middle])
            low = middle + 1;
        else
            high = middle;
    }
    return static_cast<S>(low);
}

template <class S>
void map_block(Reader r, i64 steps, u8* arena, S* slots, i64 tile, i64 at, i64 n) {
    for (i64 k = 0; k < steps; ++k) {
        const i64 kind = r();
        const S* __restrict x = slots + r() * tile;
        S* __restrict y = slots + r() * tile;
        switch (kind) {
            case LOAD: {
                const i64 code = r(), offset = r();
                load(code, arena + offset, at, y, n);
                break;
            }
            case STORE: {
                const i64 code = r(), offset = r();
                store(code, x, arena + offset, at, n);
                break;
            }
            case ADD: {
                const S* __restrict z = slots + r() * tile;
                for (i64 i = 0; i < n; ++i) y[i] = x[i] + z[i];
                break;
            }
            case REQUANT: {
                const i64 wide = r();  // 0: int32 throughout, 1: int64 sums of int32 factors, 2: int64 factors
                if (sizeof(S) == 4 && wide == 0)
                    requant_step<i32, S, i32>(r, x, y, n);
                else if (sizeof(S) == 4 && wide == 1)
                    requant_step<i64, S, i32>(r, x, y, n);
                else
                    requant_step<i64, S, i64>(r, x, y, n);
                break;
            }
            case LINE: {
                const int shift = int(r());
                const i32 lo = i32(r()), hi = i32(r());
                const S* low = r.table<S>();
                const S* high = r.table<S>();
                const S* mul = r.table<S>();
                const S* add = r.table<S>();
                line(x, y, n, shift, lo, hi, low, high, mul, add);
                break;
            }
            case MEND: {  // the channels whose thresholds lie on no line: searched, over what the line gave
                const i64 levels = r(), channels = r(), some = r();
                const i32* which = r.table<i32>();
                const S* base = r.table<S>();
                const S* step = r.table<S>();
                const S* t = r.table<S>();
                for (i64 k = 0; k < some; ++k)
                    for (i64 i = which[k]; i < n; i += channels) y[i] = base[k] + step[k] * reached(x[i], t + k * levels, levels);
                break;
            }
            case COMPARE: {
                i64 levels = r();
                const S* base = r.table<S>();
                const S* step = r.table<S>();
                const S* t = r.table<S>();
                compare_some<true>(levels, x, y, n, t, tile);
                for (i64 l = 4; l < levels; l += 4) compare_some<false>(levels - l, x, y, n, t + l * tile, tile);
                finish(y, n, base, step);
                break;
            }
            case SEARCH: {
                const i64 levels = r();
                const S* base = r.table<S>();
                const S* step = r.table<S>();
                const S* t = r.table<S>();
                const i32* row = r.table<i32>();
                for (i64 i = 0; i < n; ++i) y[i] = base[i] + step[i] * reached(x[i], t + row[i] * levels, levels);
                break;
            }
            case LOOKUP: {
                const S lo = S(r());
                const i32* row = r.table<i32>();
                const S* table = r.table<S>();
                for (i64 i = 0; i < n; ++i) y[i] = table[row[i] + (x[i] - lo)];
                break;
            }
            case DIGIT: {  // y = number of a row: z (or the row where the channel starts) + place value of the code
                const S* __restrict z = slots + r() * tile;
                const i64 first = r();
                const S lo = S(r());
                const S* row = r.table<S>();
                const S* table = r.table<S>();
                const S* from = first ? row : z;
                for (i64 i = 0; i < n; ++i) y[i] = from[i] + table[x[i] - lo];
                break;
            }
            case JOIN: {  // z: number of the row of thresholds
                const S* __restrict z = slots + r() * tile;
                const i64 levels = r(), rows = r();
                const S* base = r.table<S>();
                const S* step = r.table<S>();
                const S* t = r.table<S>();
                if (levels <= 15) {
                    for (i64 i = 0; i < n; ++i) y[i] = 0;
                    for (i64 l = 0; l < levels; ++l)
                        for (i64 i = 0; i < n; ++i) y[i] += x[i] >= t[l * rows + z[i]];
                    for (i64 i = 0; i < n; ++i) y[i] = base[z[i]] + step[z[i]] * y[i];
                } else {
                    for (i64 i = 0; i < n; ++i) y[i] = base[z[i]] + step[z[i]] * reached(x[i], t + z[i] * levels, levels);
                }
                break;
            }
            case MULTIPLY: {
                const S* __restrict z = slots + r() * tile;
                for (i64 i = 0; i < n; ++i) y[i] = x[i] * z[i];
                break;
            }
            case GATE: {  // one factor per channel, loaded from its map
                S* __restrict z = slots + r() * tile;
                const i64 channels = r(), code = r(), offset = r();
                load(code, arena + offset, 0, z, channels);
                for (i64 p = 0; p < n; p += channels)
                    for (i64 c = 0; c < channels; ++c) y[p + c] = x[p + c] * z[c];
                break;
            }
            default: {  // OFFSET: y = x*factor + offset[z]
                const S* __restrict z = slots + r() * tile;
                const S* factor = r.table<S>();
                const S* offset = r.table<S>();
                for (i64 i = 0; i < n; ++i) y[i] = x[i] * factor[i] + offset[z[i]];
            }
        }
    }
}

template <class S>
void map_group(Reader r, u8* arena) {
    const i64 numel = r(), tile = r(), scratch = r(), steps = r();
    for (i64 at = 0; at < numel; at += tile)
        map_block<S>(r, steps, arena, reinterpret_cast<S*>(arena + scratch), tile, at, std::min(tile, numel - at));
}

}  // namespace ql
