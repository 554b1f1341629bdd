// Convolutions with signs as weights: bit 1 stands for -1, a sum of products is (bits) - 2 * (differing bits).
//
// Inputs are signs (one plane) or the odd codes -3..3 = 2m + l (two planes). Planes are packed with eight channels per byte, pixel after
// pixel, so that every segment starts at a byte; outside the image all bits are 0, and the correction of the border's class takes back what
// those taps add.
// Weights: [group][block of 16][word][output] of 64 bits, each segment filled with zeros to whole words.
#pragma once
#include "window.hpp"

namespace ql {

enum Gate { PLAIN, GATED, MERGED };

#if defined(__AVX512F__) && defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__)
#define QL_VPOPCNT 1
#endif

/// The planes of n codes: bit 1 where m (and l) is -1. Bits beyond n in the last byte are 0.
template <int PLANES>
inline void pack(const i8* x, i64 n, u8* high, u8* low) {
    i64 i = 0;
#if defined(QL_VPOPCNT)
    for (; i < n; i += 64) {
        const i64 left = std::min<i64>(64, n - i);
        const __mmask64 mask = left == 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        const __m512i v = _mm512_maskz_loadu_epi8(mask, x + i);
        const u64 a = _cvtmask64_u64(_mm512_movepi8_mask(v)), b = _cvtmask64_u64(_mm512_mask_testn_epi8_mask(mask, v, _mm512_set1_epi8(2)));
        const std::size_t bytes = std::size_t((left + 7) / 8);
        if (left == 64) {
            std::memcpy(high + i / 8, &a, 8);
            if (PLANES == 2) std::memcpy(low + i / 8, &b, 8);
        } else {
            std::memcpy(high + i / 8, &a, bytes);
            if (PLANES == 2) std::memcpy(low + i / 8, &b, bytes);
        }
    }
#else
    const auto squeeze = [](u64 ones) { return u8((ones * 0x0102040810204080u) >> 56); };  // bit 0 of byte k -> bit k (little endian)
    constexpr u64 ONES = 0x0101010101010101u;
    for (; i < n; i += 8) {
        u64 v = 0, mask = ONES;
        if (n - i >= 8) {
            std::memcpy(&v, x + i, 8);
        } else {
            std::memcpy(&v, x + i, std::size_t(n - i));
            mask = ONES >> (8 * (8 - (n - i)));
        }
        high[i / 8] = squeeze((v >> 7) & mask);
        if (PLANES == 2) low[i / 8] = squeeze(~(v >> 1) & mask);
    }
#endif
}

/// Both planes of the map inside a border of zero bits; the second plane lies `plane` bytes behind the first.
template <int PLANES>
inline void pack_map(const Window& w, u8* arena, i64 plane) {
    u8* y = arena + w.buffer;
    const i8* x = reinterpret_cast<const i8*>(arena + w.from);
    const i64 line = w.cols * w.pixel, each = w.channels / w.groups;
    if (w.rows != w.height || w.cols != w.width) std::memset(y, 0, std::size_t(plane * PLANES));
    for (i64 i = 0; i < w.height; ++i) {
        u8* to = y + (w.top + i) * line + w.left * w.pixel;
        const i8* row = x + i * w.width * w.channels;
        if (each % 8 == 0)
            pack<PLANES>(row, w.width * w.channels, to, to + plane);
        else
            for (i64 k = 0; k < w.width * w.groups; ++k) pack<PLANES>(row + k * each, each, to + k * w.group, to + k * w.group + plane);
    }
}

struct Signs {
    i64 plane, words, per_segment;  // bytes of a plane; 64-bit words of a window and of a segment
    u64 last;                       // the valid bits of a segment's last word
    const u64* weight;
    i64 gate;
    const i32* open;  // thresholds of the gate, like one row of `correction`
    i32* second;      // row of gated low sums where a merge follows
};

/// 2 * high + low of one block's sums, the low ones only where the gate is open; apart where a merge follows.
template <int PLANES>
inline void combine(i64 mode, const i32* high, i32* low, const i32* gate, i32* __restrict to, i32* __restrict second, i64 n) {
    if (PLANES == 1) {
        std::memcpy(to, high, std::size_t(n) * 4);
        return;
    }
    if (mode != PLAIN)
        for (i64 o = 0; o < BLOCK; ++o) low[o] = high[o] >= gate[o] ? low[o] : 0;
    if (mode == MERGED) {
        std::memcpy(to, high, std::size_t(n) * 4);
        std::memcpy(second, low, std::size_t(n) * 4);
    } else {
        for (i64 o = 0; o < BLOCK; ++o) low[o] += 2 * high[o];
        std::memcpy(to, low, std::size_t(n) * 4);
    }
}

/// P pixels x one block of 16 outputs. x: the windows' corners per pixel and plane (vectors), or the windows' masked words (scalar).
template <int PLANES, int P, class X>
inline void sign_tile(const Window& w, const Signs& s, const X* x, const u64* weight, i32* to, i32* second, const i32* const* add,
                      const i32* gate, i64 n) {
#if defined(QL_VPOPCNT)
    __m512i sums[P][PLANES][2];
    for (int p = 0; p < P; ++p)
        for (int l = 0; l < PLANES; ++l) sums[p][l][0] = sums[p][l][1] = _mm512_setzero_si512();
    const __m512i whole = _mm512_set1_epi64(-1), last = _mm512_set1_epi64(i64(s.last));
    for (i64 k = 0; k < w.segments; ++k)
        for (i64 i = 0; i < s.per_segment; ++i, weight += BLOCK) {
            const __m512i a = _mm512_loadu_si512(weight), b = _mm512_loadu_si512(weight + 8), mask = i + 1 < s.per_segment ? whole : last;
            const i64 at = w.offset[k] + 8 * i;
            for (int p = 0; p < P; ++p)
                for (int l = 0; l < PLANES; ++l) {
                    i64 word;
                    std::memcpy(&word, x[p * PLANES + l] + at, 8);
                    const __m512i v = _mm512_set1_epi64(word);  // 0x60: (v ^ weight) & mask
                    sums[p][l][0] = _mm512_add_epi64(sums[p][l][0], _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(mask, v, a, 0x60)));
                    sums[p][l][1] = _mm512_add_epi64(sums[p][l][1], _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(mask, v, b, 0x60)));
                }
        }
    const __mmask16 mask = n >= BLOCK ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int p = 0; p < P; ++p) {
        __m512i v[2];
        for (int l = 0; l < PLANES; ++l) {
            const __m512i differ = _mm512_permutex2var_epi32(sums[p][l][0], even, sums[p][l][1]);
            v[l] = _mm512_sub_epi32(_mm512_loadu_si512(add[p]), _mm512_add_epi32(differ, differ));
        }
        __m512i y = v[0];
        if (PLANES == 2 && s.gate != MERGED) {
            const __mmask16 open = s.gate == PLAIN ? __mmask16(0xffff) : _mm512_cmpge_epi32_mask(v[0], _mm512_loadu_si512(gate));
            y = _mm512_add_epi32(v[0], v[0]);
            y = _mm512_mask_add_epi32(y, open, y, v[1]);
        } else if (PLANES == 2) {
            const __mmask16 open = _mm512_cmpge_epi32_mask(v[0], _mm512_loadu_si512(gate));
            _mm512_mask_storeu_epi32(second + p * w.outputs, mask, _mm512_maskz_mov_epi32(open, v[1]));
        }
        _mm512_mask_storeu_epi32(to + p * w.outputs, mask, y);
    }
#else
    i32 sums[P][2][BLOCK];
    for (i64 o = 0; o < BLOCK; ++o) {
        i64 differ[P][PLANES] = {};
        for (i64 k = 0; k < s.words; ++k)
            for (int p = 0; p < P; ++p)
                for (int l = 0; l < PLANES; ++l)
                    differ[p][l] += __builtin_popcountll(x[(p * PLANES + l) * s.words + k] ^ weight[k * BLOCK + o]);
        for (int p = 0; p < P; ++p)
            for (int l = 0; l < PLANES; ++l) sums[p][l][o] = static_cast<i32>(add[p][o] - 2 * differ[p][l]);
    }
    for (int p = 0; p < P; ++p)
        combine<PLANES>(s.gate, sums[p][0], sums[p][1], gate, to + p * w.outputs, second + p * w.outputs, std::min(n, BLOCK));
#endif
}

template <int PLANES, int P>
inline void sign_pixels(const Window& w, const Signs& s, const u8* x, i64 row, i64 col, i64 g, [[maybe_unused]] u64* patch, i32* line) {
    const i32* add[P];
    const u8* corner[P * PLANES];
    for (int p = 0; p < P; ++p) {
        add[p] = w.correct(row, col + p, g);
        for (int l = 0; l < PLANES; ++l) corner[p * PLANES + l] = x + p * w.stride_w * w.pixel + l * s.plane;
    }
#if defined(QL_VPOPCNT)
    const u8* const* from = corner;
#else
    const u64* from = patch;
    for (const u8* c : corner)
        for (i64 k = 0; k < w.segments; ++k, patch += s.per_segment) {
            const u8* word = c + w.offset[k];
            if (s.per_segment == 1)  // a call of memcpy costs more than one word
                std::memcpy(patch, word, 8);
            else
                std::memcpy(patch, word, std::size_t(s.per_segment) * 8);
            patch[s.per_segment - 1] &= s.last;
        }
#endif
    for (i64 b = 0; b < w.blocks; ++b) {
        const i64 at = col * w.outputs + g * w.per_group + b * BLOCK;
        const i32* shifted[P];
        for (int p = 0; p < P; ++p) shifted[p] = add[p] + b * BLOCK;
        sign_tile<PLANES, P>(w, s, from, s.weight + (g * w.blocks + b) * s.words * BLOCK, line + at, s.second + at, shifted,
                             s.open + (g * w.blocks + b) * BLOCK, w.per_group - b * BLOCK);
    }
}

/// The fixed-point merge of the two sums of a row, see FixedMerge. S holds every intermediate.
template <class S>
inline void merge_row(Reader r, i32* __restrict high, const i32* __restrict low, i64 n) {
    const S msb = S(r()), lsb = S(r()), one = S(1) << r();
    const int shift = int(r());
    const S lo = S(r()), hi = S(r()), half = (S(1) << shift) >> 1;
    const auto clamp = [&](S v) { return v < lo ? lo : v > hi ? hi : v; };
    for (i64 i = 0; i < n; ++i) {
        const S t = clamp((msb * clamp(high[i] * one) + half) >> shift);
        high[i] = static_cast<i32>(clamp((t * (S(1) << shift) + lsb * clamp(low[i] * one) + half) >> shift));
    }
}

template <int PLANES>
inline void sign_conv(Reader r, u8* arena) {
    const Window w(r);
    Signs s;
    u64* patch = reinterpret_cast<u64*>(arena + r());
    s.plane = r();
    s.per_segment = w.length;
    s.words = w.segments * w.length;
    s.last = u64(r());
    s.weight = r.table<u64>();
    s.gate = r();
    s.open = r.table<i32>();
    s.second = reinterpret_cast<i32*>(arena + r());
    const i64 wide = r();
    pack_map<PLANES>(w, arena, s.plane);
    i32* line = reinterpret_cast<i32*>(arena + w.line);
    constexpr i64 P = 4;
    for (i64 row = 0; row < w.out_h; ++row) {
        const u8* first = arena + w.buffer + row * w.stride_h * w.cols * w.pixel;
        for (i64 g = 0; g < w.groups; ++g) {
            i64 col = 0;
            const auto at = [&] { return first + col * w.stride_w * w.pixel + g * w.group; };
            for (; col + P <= w.out_w; col += P) sign_pixels<PLANES, P>(w, s, at(), row, col, g, patch, line);
            for (; col < w.out_w; ++col) sign_pixels<PLANES, 1>(w, s, at(), row, col, g, patch, line);
        }
        const i64 n = w.out_w * w.outputs;
        if (s.gate == MERGED) {
            if (wide)
                merge_row<i64>(r, line, s.second, n);
            else
                merge_row<i32>(r, line, s.second, n);
        }
        store(w.to_code, line, arena + w.to, row * n, n);
    }
}

}  // namespace ql
