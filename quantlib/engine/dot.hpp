// Convolutions with weights of 8 or 16 bits: sixteen output channels side by side, sums in int32.
//
// A word of a segment is four bytes of the padded input: four unsigned bytes (where the machine multiplies bytes, AVX-512 VNNI) or two
// int16. Weights: [group][block of 16][segment][word][output][4 int8 or 2 int16], zero beyond the segment's end.
#pragma once
#include "window.hpp"

namespace ql {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr bool BYTES = true;
#else
constexpr bool BYTES = false;
#endif

inline i32 word_at(const u8* p) {
    i32 v;
    std::memcpy(&v, p, 4);
    return v;
}

#if defined(__AVX512BW__)
struct Sums {
    __m512i v;
    static constexpr int PIXELS = 4, WIDE = 4;
    static Sums zero() { return {_mm512_setzero_si512()}; }
    static Sums same(i32 x) { return {_mm512_set1_epi32(x)}; }
    static Sums load(const void* p) { return {_mm512_loadu_si512(p)}; }
    void pairs(Sums x, Sums w) { v = _mm512_add_epi32(v, _mm512_madd_epi16(x.v, w.v)); }
    void bytes([[maybe_unused]] Sums x, [[maybe_unused]] Sums w) {
#if defined(__AVX512VNNI__)
        v = _mm512_dpbusd_epi32(v, x.v, w.v);
#endif
    }
    void put(i32* to, const i32* add, i64 n) const {
        _mm512_mask_storeu_epi32(to, n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1), _mm512_add_epi32(v, _mm512_loadu_si512(add)));
    }
};
#else
struct Sums {
#if defined(__AVX2__)
    static constexpr int PARTS = 2, LANES = 8, PIXELS = 4, WIDE = 1;
    __m256i v[PARTS];
    static __m256i get(const u8* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static __m256i spread(i32 x) { return _mm256_set1_epi32(x); }
    static __m256i step(__m256i a, __m256i x, __m256i w) { return _mm256_add_epi32(a, _mm256_madd_epi16(x, w)); }
#elif defined(__x86_64__)
    static constexpr int PARTS = 4, LANES = 4, PIXELS = 2, WIDE = 1;
    __m128i v[PARTS];
    static __m128i get(const u8* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __m128i spread(i32 x) { return _mm_set1_epi32(x); }
    static __m128i step(__m128i a, __m128i x, __m128i w) { return _mm_add_epi32(a, _mm_madd_epi16(x, w)); }
#else
    static constexpr int PARTS = 16, LANES = 1, PIXELS = 1, WIDE = 1;
    i32 v[PARTS];
    static i32 get(const u8* p) { return word_at(p); }
    static i32 spread(i32 x) { return x; }
    static i32 step(i32 a, i32 x, i32 w) {
        i16 p[2], q[2];
        std::memcpy(p, &x, 4);
        std::memcpy(q, &w, 4);
        return a + p[0] * q[0] + p[1] * q[1];
    }
#endif
    static Sums zero() { return same(0); }
    static Sums same(i32 x) {
        Sums s;
        for (int k = 0; k < PARTS; ++k) s.v[k] = spread(x);
        return s;
    }
    static Sums load(const void* p) {
        Sums s;
        for (int k = 0; k < PARTS; ++k) s.v[k] = get(static_cast<const u8*>(p) + k * LANES * 4);
        return s;
    }
    void pairs(const Sums& x, const Sums& w) {
        for (int k = 0; k < PARTS; ++k) v[k] = step(v[k], x.v[k], w.v[k]);
    }
    void bytes(const Sums&, const Sums&) {}
    void put(i32* to, const i32* add, i64 n) const {
        i32 all[BLOCK];
        std::memcpy(all, v, sizeof all);
        for (i64 k = 0; k < std::min(n, BLOCK); ++k) to[k] = all[k] + add[k];
    }
};
#endif

/// P pixels x B blocks of outputs; x: corners of the windows, `size` bytes of weights per block.
template <bool PACKED, int P, int B>
inline void dot_tile(const Window& w, const u8* x, const i8* weight, i64 size, i32* to, const i32* add, i64 wanted) {
    Sums sums[P][B];
    for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b) sums[p][b] = Sums::zero();
    for (i64 s = 0; s < w.segments; ++s) {
        const u8* from = x + w.offset[s];
        for (i64 k = 0; k < w.length; ++k, weight += 4 * BLOCK) {
            Sums row[B];
            for (int b = 0; b < B; ++b) row[b] = Sums::load(weight + b * size);
            for (int p = 0; p < P; ++p) {
                const Sums v = Sums::same(word_at(from + p * w.stride_w * w.pixel + 4 * k));
                for (int b = 0; b < B; ++b) {
                    if (PACKED)
                        sums[p][b].bytes(v, row[b]);
                    else
                        sums[p][b].pairs(v, row[b]);
                }
            }
        }
    }
    for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b) sums[p][b].put(to + p * w.outputs + b * BLOCK, add + b * BLOCK, wanted - b * BLOCK);
}

template <bool PACKED, int P>
inline void dot_pixels(const Window& w, const u8* x, const i8* weight, i32* to, const i32* add) {
    const i64 size = w.segments * w.length * 4 * BLOCK;
    i64 b = 0;
    const auto left = [&] { return w.per_group - b * BLOCK; };
    if (Sums::WIDE == 4)
        for (; b + 4 <= w.blocks; b += 4)
            dot_tile<PACKED, P, Sums::WIDE>(w, x, weight + b * size, size, to + b * BLOCK, add + b * BLOCK, left());
    for (; b < w.blocks; ++b) dot_tile<PACKED, P, 1>(w, x, weight + b * size, size, to + b * BLOCK, add + b * BLOCK, left());
}

template <bool PACKED>
inline void dot_conv(Reader r, u8* arena) {
    const Window w(r);
    const i64 zero = r(), direct = r();
    const i8* weight = r.table<i8>();
    if (!direct) {
        if (PACKED)
            pad<u8>(w, arena, u8(zero));
        else
            pad<i16>(w, arena, i16(0));
    }
    i32* line = reinterpret_cast<i32*>(arena + w.line);
    const i64 size = w.blocks * w.segments * w.length * 4 * BLOCK;
    for (i64 row = 0; row < w.out_h; ++row) {
        const u8* first = arena + w.buffer + row * w.stride_h * w.cols * w.pixel;
        for (i64 g = 0; g < w.groups; ++g) {
            i64 col = 0;
            const auto at = [&] { return first + col * w.stride_w * w.pixel + g * w.group; };
            const auto to = [&] { return line + col * w.outputs + g * w.per_group; };
            for (; col + Sums::PIXELS <= w.out_w; col += Sums::PIXELS)
                dot_pixels<PACKED, Sums::PIXELS>(w, at(), weight + g * size, to(), w.correct(row, col, g));
            for (; col < w.out_w; ++col) dot_pixels<PACKED, 1>(w, at(), weight + g * size, to(), w.correct(row, col, g));
        }
        store(w.to_code, line, arena + w.to, row * w.out_w * w.outputs, w.out_w * w.outputs);
    }
}

/// Any integers: the buffer holds S, weights [group][segment][word][output] of S, sums in S. `length` counts elements here.
template <class S>
inline void wide_conv(Reader r, u8* arena) {
    const Window w(r);
    const S* weight = r.table<S>();
    pad<S>(w, arena, S(0));
    S* line = reinterpret_cast<S*>(arena + w.line);
    for (i64 row = 0; row < w.out_h; ++row) {
        for (i64 col = 0; col < w.out_w; ++col)
            for (i64 g = 0; g < w.groups; ++g) {
                const u8* x = arena + w.buffer + (row * w.stride_h * w.cols + col * w.stride_w) * w.pixel + g * w.group;
                const S* k = weight + g * w.segments * w.length * w.per_group;
                S* __restrict acc = line + col * w.outputs + g * w.per_group;
                std::fill(acc, acc + w.per_group, S(0));
                for (i64 s = 0; s < w.segments; ++s) {
                    const S* v = reinterpret_cast<const S*>(x + w.offset[s]);
                    for (i64 i = 0; i < w.length; ++i, k += w.per_group) {
                        const S n = v[i];
                        for (i64 o = 0; o < w.per_group; ++o) acc[o] += n * k[o];
                    }
                }
            }
        store(w.to_code, line, arena + w.to, row * w.out_w * w.outputs, w.out_w * w.outputs);
    }
}

using Shorts = std::uint16_t __attribute__((vector_size(64)));  // sums modulo 2^16; what is not used may be any number
constexpr i64 SHORTS = 32;

/// P pixels x 32 channels; x: corners of the windows, `left` channels are wanted.
template <int P>
inline void depthwise_tile(const Window& w, const u8* x, const i16* weight, i16* to, i64 left) {
    Shorts sums[P] = {};
    for (i64 s = 0; s < w.segments; ++s) {
        Shorts k, v;
        std::memcpy(&k, weight + s * SHORTS, sizeof k);
        for (int p = 0; p < P; ++p) {
            std::memcpy(&v, x + w.offset[s] + p * w.stride_w * w.pixel, sizeof v);
            sums[p] += v * k;
        }
    }
    for (int p = 0; p < P; ++p) {
        if (left >= SHORTS)
            std::memcpy(to + p * w.channels, &sums[p], sizeof(Shorts));
        else
            std::memcpy(to + p * w.channels, &sums[p], std::size_t(left) * 2);
    }
}

/// One tap per segment and one output per channel, all sums in int16: weights [block of 32 channels][tap][channel].
inline void depthwise_short(Reader r, u8* arena) {
    const Window w(r);
    const i16* weight = r.table<i16>();
    pad<i16>(w, arena, i16(0));
    i16* line = reinterpret_cast<i16*>(arena + w.line);
    constexpr i64 P = 4;
    for (i64 row = 0; row < w.out_h; ++row) {
        const u8* first = arena + w.buffer + row * w.stride_h * w.cols * w.pixel;
        for (i64 c = 0; c < w.channels; c += SHORTS) {
            const i16* k = weight + c * w.segments;
            i64 col = 0;
            const auto at = [&] { return first + col * w.stride_w * w.pixel + c * 2; };
            for (; col + P <= w.out_w; col += P) depthwise_tile<P>(w, at(), k, line + col * w.channels + c, w.channels - c);
            for (; col < w.out_w; ++col) depthwise_tile<1>(w, at(), k, line + col * w.channels + c, w.channels - c);
        }
        store(w.to_code, line, arena + w.to, row * w.out_w * w.outputs, w.out_w * w.outputs);
    }
}

/// One tap per segment and one output per channel: weights [tap][channel] of S.
template <class S>
inline void depthwise_conv(Reader r, u8* arena) {
    const Window w(r);
    const S* weight = r.table<S>();
    pad<S>(w, arena, S(0));
    S* line = reinterpret_cast<S*>(arena + w.line);
    for (i64 row = 0; row < w.out_h; ++row) {
        for (i64 col = 0; col < w.out_w; ++col) {
            S* __restrict acc = line + col * w.channels;
            std::fill(acc, acc + w.channels, S(0));
            for (i64 s = 0; s < w.segments; ++s) {
                const S* __restrict x =
                    reinterpret_cast<const S*>(arena + w.buffer + (row * w.stride_h * w.cols + col * w.stride_w) * w.pixel + w.offset[s]);
                const S* __restrict k = weight + s * w.channels;
                for (i64 c = 0; c < w.channels; ++c) acc[c] += x[c] * k[c];
            }
        }
        store(w.to_code, line, arena + w.to, row * w.out_w * w.outputs, w.out_w * w.outputs);
    }
}

}  // namespace ql
