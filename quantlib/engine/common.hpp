// Types, the program reader and conversions between stored and computed integers.
//
// A program is a flat array of int64 words written by program.py; every number and every pointer takes one word. A record
// starts with its kind and its length. Maps are stored channel-last in the narrowest of int8, int16, int32, int64.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ql {

using u8 = std::uint8_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

struct Reader {
    const i64* at;
    i64 operator()() { return *at++; }
    template <class T>
    const T* table() { return reinterpret_cast<const T*>(*at++); }
};

/// Calls f with a value of the stored type that `code` names: 0 int8, 1 int16, 2 int32, 3 int64.
template <class F>
inline void visit(i64 code, F f) {
    switch (code) {
        case 0: f(i8{}); break;
        case 1: f(i16{}); break;
        case 2: f(i32{}); break;
        default: f(i64{});
    }
}

/// Kept out of line: many kernels end in it, and a copy in each would double the time of compilation.
template <class A, class B>
__attribute__((noinline)) void convert(const A* __restrict x, B* __restrict y, i64 n) {
    for (i64 i = 0; i < n; ++i) y[i] = static_cast<B>(x[i]);
}

/// Stored integers -> computed ones (S is int32 or int64).
template <class S>
inline void load(i64 code, const u8* from, i64 at, S* to, i64 n) {
    visit(code, [&](auto zero) { convert(reinterpret_cast<const decltype(zero)*>(from) + at, to, n); });
}

/// Computed integers -> stored ones; the caller knows that they fit.
template <class S>
inline void store(i64 code, const S* from, u8* to, i64 at, i64 n) {
    visit(code, [&](auto zero) { convert(from, reinterpret_cast<decltype(zero)*>(to) + at, n); });
}

}  // namespace ql
