// Data movement, pools and the saturating classifier.
#pragma once
#include <limits>

#include "common.hpp"

namespace ql {

/// Codes of one image, channel-first int64, into its stored form.
inline void image_in(Reader r, const i64* image, u8* arena) {
    const i64 channels = r(), places = r(), code = r(), offset = r();
    visit(code, [&](auto zero) {
        auto* y = reinterpret_cast<decltype(zero)*>(arena + offset);
        for (i64 c = 0; c < channels; ++c)
            for (i64 p = 0; p < places; ++p) y[p * channels + c] = static_cast<decltype(zero)>(image[c * places + p]);
    });
}

/// A stored map, channel-first int64, for one image of output `index`.
inline void image_out(Reader r, i64 image, i64* const* outputs, const u8* arena) {
    const i64 channels = r(), places = r(), code = r(), offset = r(), index = r();
    i64* y = outputs[index] + image * channels * places;
    visit(code, [&](auto zero) {
        const auto* x = reinterpret_cast<const decltype(zero)*>(arena + offset);
        for (i64 c = 0; c < channels; ++c)
            for (i64 p = 0; p < places; ++p) y[c * places + p] = x[p * channels + c];
    });
}

/// Runs of `length` elements from several sources, each with its own starts; what no run covers is 0.
inline void gather(Reader r, u8* arena) {
    const i64 to = r(), offset = r(), bytes = r(), clear = r(), sources = r();
    if (clear) std::memset(arena + offset, 0, std::size_t(bytes));
    for (i64 s = 0; s < sources; ++s) {
        const i64 from = r(), start = r(), length = r(), runs = r();
        const i32* src = r.table<i32>();
        const i32* dst = r.table<i32>();
        visit(to, [&](auto t) {
            visit(from, [&](auto f) {
                if constexpr (sizeof f <= sizeof t) {  // an output's interval holds those of its inputs
                    const auto* __restrict x = reinterpret_cast<const decltype(f)*>(arena + start);
                    auto* __restrict y = reinterpret_cast<decltype(t)*>(arena + offset);
                    if (length == 1)
                        for (i64 k = 0; k < runs; ++k) y[dst[k]] = x[src[k]];
                    else
                        for (i64 k = 0; k < runs; ++k) convert(x + src[k], y + dst[k], length);
                }
            });
        });
    }
}

template <int B>
inline void rows_of(const u8* table, const i32* row, i64 numel, u8* y) {
    for (i64 i = 0; i < numel; ++i) std::memcpy(y + i * B, table + i64(row[i]) * B, B);
}

/// Thermometer codes: each integer picks a row of `bits` signs.
inline void thermometer(Reader r, u8* arena) {
    const i64 channels = r(), places = r(), code = r(), from = r(), to = r(), bits = r(), lo = r();
    const i32* base = r.table<i32>();
    const u8* table = r.table<u8>();
    visit(code, [&](auto zero) {
        const auto* x = reinterpret_cast<const decltype(zero)*>(arena + from);
        u8* y = arena + to;
        i32 row[64];
        for (i64 p = 0; p < places; ++p)
            for (i64 c0 = 0; c0 < channels; c0 += 64) {
                const i64 n = std::min<i64>(64, channels - c0);
                for (i64 c = 0; c < n; ++c) row[c] = base[c0 + c] + static_cast<i32>(x[p * channels + c0 + c] - lo);
                u8* out = y + (p * channels + c0) * bits;
                switch (bits) {
                    case 8: rows_of<8>(table, row, n, out); break;
                    case 16: rows_of<16>(table, row, n, out); break;
                    case 32: rows_of<32>(table, row, n, out); break;
                    default:
                        for (i64 c = 0; c < n; ++c) std::memcpy(out + c * bits, table + i64(row[c]) * bits, std::size_t(bits));
                }
            }
    });
}

/// Windows over a map: the greatest value (S is the stored type) or the sum (S is int32 or int64) of the taps inside the image.
template <class T, class S, class Fold>
inline void pool(Reader& r, const T* x, S* acc, i64 code, u8* y, S start, Fold fold) {
    const i64 h = r(), w = r(), c = r(), oh = r(), ow = r(), kh = r(), kw = r(), sh = r(), sw = r();
    const i64 top = r(), left = r(), dh = r(), dw = r();
    for (i64 row = 0; row < oh; ++row)
        for (i64 col = 0; col < ow; ++col) {
            std::fill(acc, acc + c, start);
            for (i64 u = 0; u < kh; ++u) {
                const i64 i = row * sh - top + u * dh;
                if (i < 0 || i >= h) continue;
                for (i64 v = 0; v < kw; ++v) {
                    const i64 j = col * sw - left + v * dw;
                    if (j < 0 || j >= w) continue;
                    fold(acc, x + (i * w + j) * c, c);
                }
            }
            store(code, acc, y, (row * ow + col) * c, c);
        }
}

inline void max_pool(Reader r, u8* arena) {
    const i64 from_code = r(), from = r(), to_code = r(), to = r(), scratch = r();
    visit(from_code, [&](auto zero) {
        using T = decltype(zero);
        pool(r, reinterpret_cast<const T*>(arena + from), reinterpret_cast<T*>(arena + scratch), to_code, arena + to,
             std::numeric_limits<T>::min(), [](T* __restrict acc, const T* __restrict x, i64 n) {
                 for (i64 i = 0; i < n; ++i) acc[i] = acc[i] < x[i] ? x[i] : acc[i];
             });
    });
}

template <class S>
inline void sum_pool(Reader r, u8* arena) {
    const i64 from_code = r(), from = r(), to_code = r(), to = r(), scratch = r();
    visit(from_code, [&](auto zero) {
        using T = decltype(zero);
        pool(r, reinterpret_cast<const T*>(arena + from), reinterpret_cast<S*>(arena + scratch), to_code, arena + to, S(0),
             [](S* __restrict acc, const T* __restrict x, i64 n) {
                 for (i64 i = 0; i < n; ++i) acc[i] += static_cast<S>(x[i]);
             });
    });
}

/// acc[o] = clamp(acc[o] + ((w[k][o]*x[k] + half) >> shift), lo, hi) for k in order.
template <class S>
inline void saturating_dense(Reader r, u8* arena) {
    const i64 from_code = r(), from = r(), to_code = r(), to = r(), scratch = r(), taps = r(), outputs = r(), shift = r();
    const S half = S(r()), lo = S(r()), hi = S(r());
    const S* weight = r.table<S>();
    const S* bias = r.table<S>();
    S* x = reinterpret_cast<S*>(arena + scratch);
    S* acc = x + taps;
    load(from_code, arena + from, 0, x, taps);
    std::copy(bias, bias + outputs, acc);
    for (i64 k = 0; k < taps; ++k) {
        const S* w = weight + k * outputs;
        for (i64 o = 0; o < outputs; ++o) {
            const S v = acc[o] + ((w[o] * x[k] + half) >> shift);
            acc[o] = std::min(std::max(v, lo), hi);
        }
    }
    store(to_code, acc, arena + to, 0, outputs);
}

}  // namespace ql
