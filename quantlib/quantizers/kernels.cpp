// The quantizers' forward and backward in one pass over memory, for float and double on the CPU.
//
// Why they exist: a training step over the float network's, one thread of an AMD EPYC (AVX-512), with these kernels and with the tensor
// operations beside them (QUANTLIB_ENGINE=torch), NCHW / channels last; recipes/_training_speed.py:
//     inverted bottlenecks, 16 images of 64x64    1.10 / 1.13    1.55 / 2.25
//     inverted bottlenecks, 4 images of 32x32     1.30 / 1.54    1.94 / 2.28
//     MobileNetV2, 8 images of 64x64              1.17 / 1.33    1.48 / 1.79
//     dense 3x3, 4 images of 32x32                1.15 / 1.13    1.26 / 1.31
// A quantizer is held here where it saves 5 % of a step or more; the others are tensor operations alone.
//
// Every value is rounded as by the tensor operations of functions.py: no contraction into fused multiply-adds, no reciprocals, half to
// even. NaN stays NaN. Sums of gradients are taken in the working precision over short blocks and in double over these. A map is
// (outer, channels, inner) in memory: inner is 1 where channels come last, outer and channels are 1 where one constant serves all.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using i64 = std::int64_t;
constexpr i64 BLOCK = 1024;     // elements summed in the working precision
constexpr i64 LANES = 16;       // of them at a time
constexpr i64 GRAIN = 1 << 16;  // elements that are worth a thread

template <class T>
inline T least(T x, T lo) { return lo >= x ? lo : x; }  // NaN passes, -0 becomes lo = 0
template <class T>
inline T most(T x, T hi) { return hi <= x ? hi : x; }

/// f(part, begin, end) over 0..n, a whole number of `unit` elements each, on up to `threads` threads.
template <class F>
void split(i64 n, i64 unit, i64 threads, F f) {
    const i64 parts = std::max<i64>(1, std::min({threads, n * unit / GRAIN, n}));
    std::vector<std::thread> others;
    for (i64 p = 1; p < parts; ++p) others.emplace_back([=] { f(p, n * p / parts, n * (p + 1) / parts); });
    f(0, 0, n / parts);
    for (auto& t : others) t.join();
}

/// Sizes of a map: rows of channels (inner 1) and planes of one channel each are the two cases below.
struct Map {
    i64 outer, channels, inner;
};

/// Sums over a map, `S` of them per channel. body(i, c, sums) adds the terms of element i of channel c to sums[0..S).
/// sums_out is (S, channels).
template <class T, int S, class F>
void reduce(Map m, T* sums_out, i64 threads, F body) {
    const i64 c = m.channels, width = S * c;
    threads = std::max<i64>(1, std::min(threads, m.outer * c * m.inner / GRAIN));
    std::vector<double> totals(static_cast<std::size_t>(threads * width), 0.0);
    double* all = totals.data();
    if (m.inner == 1 && c > 1) {
        split(m.outer, c, threads, [=](i64 part, i64 begin, i64 end) {
            std::vector<T> block(static_cast<std::size_t>(width));
            double* mine = all + part * width;
            const i64 rows = BLOCK / LANES;
            for (i64 r = begin; r < end; r += rows) {
                std::fill(block.begin(), block.end(), T(0));
                T* __restrict sums = block.data();
                for (i64 k = r; k < std::min(end, r + rows); ++k) {
                    const i64 at = k * c;
#pragma GCC ivdep
                    for (i64 j = 0; j < c; ++j) {
                        T term[S];
                        body(at + j, j, term);
                        for (int s = 0; s < S; ++s) sums[s * c + j] += term[s];
                    }
                }
                for (i64 j = 0; j < width; ++j) mine[j] += sums[j];
            }
        });
    } else {
        const i64 planes = m.outer * c;
        // one long plane is cut into blocks, so that threads share it
        const bool one = planes == 1;
        const i64 units = one ? (m.inner + BLOCK - 1) / BLOCK : planes;
        split(units, one ? BLOCK : m.inner, threads, [=](i64 part, i64 begin, i64 end) {
            double* mine = all + part * width;
            for (i64 u = begin; u < end; ++u) {
                const i64 channel = one ? 0 : u % c;
                const i64 first = one ? u * BLOCK : u * m.inner;
                const i64 last = one ? std::min(m.inner, first + BLOCK) : first + m.inner;
                for (i64 at = first; at < last; at += BLOCK) {
                    const i64 stop = std::min(last, at + BLOCK);
                    T lanes[S * LANES] = {};
                    i64 i = at;
                    for (; i + LANES <= stop; i += LANES) {
#pragma GCC ivdep
                        for (i64 j = 0; j < LANES; ++j) {
                            T term[S];
                            body(i + j, channel, term);
                            for (int s = 0; s < S; ++s) lanes[s * LANES + j] += term[s];
                        }
                    }
                    for (; i < stop; ++i) {
                        T term[S];
                        body(i, channel, term);
                        for (int s = 0; s < S; ++s) lanes[s * LANES] += term[s];
                    }
                    for (int s = 0; s < S; ++s) {
                        double sum = 0;
                        for (i64 j = 0; j < LANES; ++j) sum += lanes[s * LANES + j];
                        mine[s * c + channel] += sum;
                    }
                }
            }
        });
    }
    for (i64 j = 0; j < width; ++j) {
        double total = 0;
        for (i64 p = 0; p < threads; ++p) total += all[p * width + j];
        sums_out[j] = T(total);
    }
}

/// body(i, c) for every element i of channel c.
template <class F>
void visit(Map m, i64 threads, F body) {
    if (m.inner == 1 && m.channels > 1) {
        split(m.outer, m.channels, threads, [=](i64, i64 begin, i64 end) {
            for (i64 r = begin; r < end; ++r) {
#pragma GCC ivdep
                for (i64 j = 0; j < m.channels; ++j) body(r * m.channels + j, j);
            }
        });
    } else if (m.outer * m.channels == 1) {
        split(m.inner, 1, threads, [=](i64, i64 begin, i64 end) {
#pragma GCC ivdep
            for (i64 i = begin; i < end; ++i) body(i, i64(0));
        });
    } else {
        split(m.outer * m.channels, m.inner, threads, [=](i64, i64 begin, i64 end) {
            for (i64 u = begin; u < end; ++u) {
                const i64 c = u % m.channels;
#pragma GCC ivdep
                for (i64 i = u * m.inner; i < (u + 1) * m.inner; ++i) body(i, c);
            }
        });
    }
}

// --- learned scale -------------------------------------------------------------------------------------------------------------------

template <class T>
void learned_scale(const void* from, const void* scale, void* to, Map m, double lo_, double hi_, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    const T* __restrict s = static_cast<const T*>(scale);
    T* __restrict y = static_cast<T*>(to);
    const T lo = T(lo_), hi = T(hi_);
    visit(m, threads, [=](i64 i, i64 c) { y[i] = most(least(std::rint(x[i] / s[c]), lo), hi) * s[c]; });
}

/// sums (channels): the gradient of each scale, times weight[c] * factor where there is a weight.
template <class T>
void learned_scale_back(const void* from, const void* scale, const void* grad, const void* weight, void* to, void* sums, Map m, double factor, double lo_, double hi_,
                        double below_, double above_, double floor_, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    const T* __restrict s = static_cast<const T*>(scale);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict dx = static_cast<T*>(to);
    const T lo = T(lo_), hi = T(hi_), below = T(below_), above = T(above_), floor = T(floor_);
    T* ds = static_cast<T*>(sums);
    reduce<T, 1>(m, ds, threads, [=](i64 i, i64 c, T* term) {
        const T u = least(x[i], floor) / s[c];  // floor: 0 behind a ReLU, else -infinity
        const T code = most(least(std::rint(u), lo), hi);
        const bool outside = (u <= below) | (u >= above) | (x[i] <= floor);
        dx[i] = outside ? T(0) : g[i];
        term[0] = g[i] * (outside ? code : code - u);
    });
    if (weight)
        for (i64 c = 0; c < m.channels; ++c) ds[c] = T(double(ds[c]) * double(static_cast<const T*>(weight)[c]) * factor);
}

// --- largest magnitude ---------------------------------------------------------------------------------------------------------------

/// Rows of a weight, contiguous each: (rows, group, place) in memory, where the logical order is (rows, place, group) if group > 1.
template <class T>
void max_abs(const void* from, void* to, void* scales, i64* where, i64 rows, i64 size, i64 group, double top_, double least_scale) {
    const T* __restrict w = static_cast<const T*>(from);
    T* __restrict y = static_cast<T*>(to);
    T* __restrict s = static_cast<T*>(scales);
    const T top = T(top_), smallest = T(least_scale);
    for (i64 r = 0; r < rows; ++r) {
        const T* __restrict row = w + r * size;
        T largest = 0;
        int nan = 0;
#pragma omp simd reduction(max : largest) reduction(| : nan)
        for (i64 i = 0; i < size; ++i) {
            const T a = std::fabs(row[i]);
            nan |= a != a;
            largest = a > largest ? a : largest;
        }
        i64 first = size, place = 0;    // the first in logical order, and where it lies
        const i64 span = size / group;  // memory p = k * span + i of logical i * group + k
        for (i64 at = 0; at < size && !(group == 1 && first < size); at += 256) {
            const i64 stop = std::min(size, at + 256);
            int any = nan;
#pragma omp simd reduction(| : any)
            for (i64 p = at; p < stop; ++p) any |= std::fabs(row[p]) == largest;
            for (i64 p = at; any && p < stop; ++p) {
                if (nan ? row[p] != row[p] : std::fabs(row[p]) == largest) {
                    const i64 logical = (p % span) * group + p / span;
                    if (logical < first) first = logical, place = p;
                }
            }
        }
        if (nan) largest = row[place];
        const T scale = least(largest, smallest) / top;
        s[r] = scale;
        where[r] = r * size + place;
        for (i64 i = 0; i < size; ++i) y[r * size + i] = most(least(std::rint(row[i] / scale), -top), top) * scale;
    }
}

template <class T>
void max_abs_back(const void* from, const void* value, const void* scales, const i64* where, const void* grad, const void* grad_scale,
                  void* to, i64 rows, i64 size, double top) {
    const T* __restrict w = static_cast<const T*>(from);
    const T* __restrict y = static_cast<const T*>(value);
    const T* __restrict s = static_cast<const T*>(scales);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict dw = static_cast<T*>(to);
    for (i64 r = 0; r < rows; ++r) {
        double total = 0;
        for (i64 at = r * size; at < (r + 1) * size; at += BLOCK) {
            const i64 stop = std::min((r + 1) * size, at + BLOCK);
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (i64 i = at; i < stop; ++i) {
                dw[i] = g[i];
                sum += g[i] * (y[i] - w[i]);
            }
            total += sum;
        }
        double share = total / s[r];
        if (grad_scale) share += static_cast<const T*>(grad_scale)[r];
        const T at_most = w[where[r]];
        dw[where[r]] += T(double((at_most > 0) - (at_most < 0)) * (share / top));
    }
}

// --- RPReLU --------------------------------------------------------------------------------------------------------------------------

template <class T>
void rprelu(const void* from, const void* before, const void* slopes, const void* after, void* to, Map m, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    const T* __restrict a = static_cast<const T*>(before);
    const T* __restrict k = static_cast<const T*>(slopes);
    const T* __restrict b = static_cast<const T*>(after);
    T* __restrict y = static_cast<T*>(to);
    visit(m, threads, [=](i64 i, i64 c) {
        const T u = x[i] + a[c];
        y[i] = least(u, T(0)) + most(u, T(0)) * k[c] + b[c];
    });
}

/// sums (3, channels): of dx, of dy * u where u <= 0, of dy.
template <class T>
void rprelu_back(const void* from, const void* before, const void* slopes, const void* grad, void* to, void* sums, Map m, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    const T* __restrict a = static_cast<const T*>(before);
    const T* __restrict k = static_cast<const T*>(slopes);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict dx = static_cast<T*>(to);
    reduce<T, 3>(m, static_cast<T*>(sums), threads, [=](i64 i, i64 c, T* term) {
        const T u = x[i] + a[c];
        const T positive = u <= T(0) ? T(0) : g[i], negative = g[i] - positive;
        const T d = positive + negative * k[c];
        dx[i] = d;
        term[0] = d, term[1] = negative * u, term[2] = g[i];
    });
}

// --- gated convolution ---------------------------------------------------------------------------------------------------------------

/// 3q = 2 high + low with high = sgn(q). Returns whether every q lies on thirds (to 1e-5) and |q| < 1.3.
template <class T>
bool thirds(const void* from, void* to_high, void* to_low, i64 n, i64 threads) {
    const T* __restrict q = static_cast<const T*>(from);
    T* __restrict high = static_cast<T*>(to_high);
    T* __restrict low = static_cast<T*>(to_low);
    std::vector<char> sound(static_cast<std::size_t>(threads), 1);
    char* fine = sound.data();
    split(n, 1, threads, [=](i64 part, i64 begin, i64 end) {
        bool all = true;
        for (i64 at = begin; at < end && all; at += BLOCK) {
            int bad = 0;
            for (i64 i = at; i < std::min(end, at + BLOCK); ++i) {
                const T v = q[i] * T(3), nearest = std::rint(v), sign = T((q[i] > 0) - (q[i] < 0));
                bad |= !((std::fabs(v - nearest) < T(1e-5)) & (std::fabs(nearest) < T(4)));
                high[i] = sign;
                low[i] = nearest - 2 * sign;
            }
            all = !bad;
        }
        fine[part] = all;
    });
    return std::all_of(sound.begin(), sound.end(), [](char c) { return c; });
}

/// What the sigmoid is taken of: (double / 3 - threshold) * 5.
template <class T>
void before_gate(const void* from, const void* thresholds, void* to, Map m, i64 threads) {
    const T* __restrict twice = static_cast<const T*>(from);
    const T* __restrict threshold = static_cast<const T*>(thresholds);
    T* __restrict z = static_cast<T*>(to);
    visit(m, threads, [=](i64 i, i64 c) { z[i] = (twice[i] / T(3) - threshold[c]) * T(5); });
}

/// (double + low where open) / 3 in the place of double; the number of open gates.
template <class T>
i64 merged(void* twice_, const void* low_, const void* soft_, i64 n, i64 threads) {
    T* __restrict twice = static_cast<T*>(twice_);
    const T* __restrict low = static_cast<const T*>(low_);
    const T* __restrict soft = static_cast<const T*>(soft_);
    std::vector<i64> counts(static_cast<std::size_t>(threads), 0);
    i64* open = counts.data();
    split(n, 1, threads, [=](i64 part, i64 begin, i64 end) {
        i64 count = 0;
        for (i64 i = begin; i < end; ++i) {
            const T mask = soft[i] > T(0.5) ? T(1) : T(0);
            count += soft[i] > T(0.5);
            twice[i] = (twice[i] + mask * low[i]) / T(3);
        }
        open[part] = count;
    });
    i64 total = 0;
    for (i64 c : counts) total += c;
    return total;
}

/// slope = dy * low * (1 - soft) * soft (0 where soft < 1/2 if sparse); high = dy + 5/3 slope, dlow = dy where open, both = high + dlow / 2;
/// sums (channels): of slope.
template <class T>
void gated_back(const void* grad, const void* low_, const void* soft_, void* high_, void* dlow_, void* both_, void* sums, Map m, i64 sparse,
                i64 threads) {
    const T* __restrict g = static_cast<const T*>(grad);
    const T* __restrict low = static_cast<const T*>(low_);
    const T* __restrict soft = static_cast<const T*>(soft_);
    T* __restrict high = static_cast<T*>(high_);
    T* __restrict dlow = static_cast<T*>(dlow_);
    T* __restrict both = static_cast<T*>(both_);
    const T always = sparse ? T(0) : T(1), steep = T(5.0 / 3.0);
    reduce<T, 1>(m, static_cast<T*>(sums), threads, [=](i64 i, i64, T* term) {
        const T s = soft[i], factor = s >= T(0.5) ? T(1) : always;
        const T slope = g[i] * low[i] * (T(1) - s) * s * factor;
        const T mask = s > T(0.5) ? T(1) : T(0);
        const T h = g[i] + slope * steep, l = g[i] * mask;
        high[i] = h, dlow[i] = l, both[i] = h + l * T(0.5);
        term[0] = slope;
    });
}

// --- divided clip --------------------------------------------------------------------------------------------------------------------

template <class T>
void divided_clip(const void* from, void* to, i64 n, const void* clip_, double levels_, double step_, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    T* __restrict y = static_cast<T*>(to);
    const T clip = *static_cast<const T*>(clip_), levels = T(levels_), step = T(step_);
    visit({1, 1, n}, threads, [=](i64 i, i64) { y[i] = std::rint(most(least(x[i], T(0)), clip) / clip * levels) * step; });
}

/// factor = -R / (2a), so that dx = ((sign(x - a) - sign(x)) * dy) * factor; sum of dy * ((u * (-2 / a) + sign(x - a)) + 1).
template <class T>
void divided_clip_back(const void* from, const void* grad, void* to, void* sum, i64 n, const void* clip_, const void* slope_,
                       const void* factor_, i64 threads) {
    const T* __restrict x = static_cast<const T*>(from);
    const T* __restrict g = static_cast<const T*>(grad);
    T* __restrict dx = static_cast<T*>(to);
    const T clip = *static_cast<const T*>(clip_), slope = *static_cast<const T*>(slope_), factor = *static_cast<const T*>(factor_);
    reduce<T, 1>({1, 1, n}, static_cast<T*>(sum), threads, [=](i64 i, i64, T* term) {
        const T over = x[i] - clip;
        const T above = over > 0 ? T(1) : over < 0 ? T(-1) : T(0), sign = x[i] > 0 ? T(1) : x[i] < 0 ? T(-1) : T(0);
        term[0] = g[i] * (most(least(x[i], T(0)), clip) * slope + above + T(1));
        dx[i] = (above - sign) * g[i] * factor;
    });
}

}  // namespace

#define KERNEL extern "C" __attribute__((visibility("default")))

KERNEL void ql_learned_scale(i64 wide, const void* x, const void* s, void* y, i64 o, i64 c, i64 n, double lo, double hi, i64 threads) {
    wide ? learned_scale<double>(x, s, y, {o, c, n}, lo, hi, threads) : learned_scale<float>(x, s, y, {o, c, n}, lo, hi, threads);
}
KERNEL void ql_learned_scale_back(i64 wide, const void* x, const void* s, const void* g, const void* w, void* dx, void* sums, i64 o, i64 c,
                                  i64 n, double factor, double lo, double hi, double below, double above, double floor, i64 threads) {
    wide ? learned_scale_back<double>(x, s, g, w, dx, sums, {o, c, n}, factor, lo, hi, below, above, floor, threads)
         : learned_scale_back<float>(x, s, g, w, dx, sums, {o, c, n}, factor, lo, hi, below, above, floor, threads);
}
KERNEL void ql_max_abs(i64 wide, const void* w, void* y, void* s, i64* where, i64 rows, i64 size, i64 group, double top, double smallest, i64) {
    wide ? max_abs<double>(w, y, s, where, rows, size, group, top, smallest) : max_abs<float>(w, y, s, where, rows, size, group, top, smallest);
}
KERNEL void ql_max_abs_back(i64 wide, const void* w, const void* y, const void* s, const i64* where, const void* g, const void* gs, void* dw,
                            i64 rows, i64 size, double top, i64) {
    wide ? max_abs_back<double>(w, y, s, where, g, gs, dw, rows, size, top) : max_abs_back<float>(w, y, s, where, g, gs, dw, rows, size, top);
}
KERNEL void ql_rprelu(i64 wide, const void* x, const void* a, const void* k, const void* b, void* y, i64 o, i64 c, i64 n, i64 threads) {
    wide ? rprelu<double>(x, a, k, b, y, {o, c, n}, threads) : rprelu<float>(x, a, k, b, y, {o, c, n}, threads);
}
KERNEL void ql_rprelu_back(i64 wide, const void* x, const void* a, const void* k, const void* g, void* dx, void* sums, i64 o, i64 c, i64 n,
                           i64 threads) {
    wide ? rprelu_back<double>(x, a, k, g, dx, sums, {o, c, n}, threads) : rprelu_back<float>(x, a, k, g, dx, sums, {o, c, n}, threads);
}
KERNEL i64 ql_thirds(i64 wide, const void* q, void* high, void* low, i64 n, i64 threads) {
    return wide ? thirds<double>(q, high, low, n, threads) : thirds<float>(q, high, low, n, threads);
}
KERNEL void ql_before_gate(i64 wide, const void* x, const void* t, void* z, i64 o, i64 c, i64 n, i64 threads) {
    wide ? before_gate<double>(x, t, z, {o, c, n}, threads) : before_gate<float>(x, t, z, {o, c, n}, threads);
}
KERNEL i64 ql_merged(i64 wide, void* twice, const void* low, const void* soft, i64 n, i64 threads) {
    return wide ? merged<double>(twice, low, soft, n, threads) : merged<float>(twice, low, soft, n, threads);
}
KERNEL void ql_gated_back(i64 wide, const void* g, const void* low, const void* soft, void* high, void* dlow, void* both, void* sums, i64 o,
                          i64 c, i64 n, i64 sparse, i64 threads) {
    wide ? gated_back<double>(g, low, soft, high, dlow, both, sums, {o, c, n}, sparse, threads)
         : gated_back<float>(g, low, soft, high, dlow, both, sums, {o, c, n}, sparse, threads);
}
KERNEL void ql_divided_clip(i64 wide, const void* x, void* y, i64 n, const void* clip, double levels, double step, i64 threads) {
    wide ? divided_clip<double>(x, y, n, clip, levels, step, threads) : divided_clip<float>(x, y, n, clip, levels, step, threads);
}
KERNEL void ql_divided_clip_back(i64 wide, const void* x, const void* g, void* dx, void* sum, i64 n, const void* clip, const void* slope,
                                 const void* factor, i64 threads) {
    wide ? divided_clip_back<double>(x, g, dx, sum, n, clip, slope, factor, threads)
         : divided_clip_back<float>(x, g, dx, sum, n, clip, slope, factor, threads);
}
