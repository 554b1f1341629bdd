// Arbitrary-width integers for simulation where the vendor's headers are not installed: one native member, wrapping on assignment.
//
// Up to 64 bits. A value converts to its native type in expressions, so there is no bit growth to rely on: kernels compute in int or int64_t
// and assign once. What this header means is what the vendor's means for such code; a test compiles networks against both.
#pragma once
#include <cstdint>
#include <type_traits>

namespace ql {
template <int W, bool SIGNED> struct native {
    static_assert(W >= 1 && W <= 64, "the simulation header holds 1 to 64 bits");
    typedef typename std::conditional<(W <= 8), int8_t, typename std::conditional<(W <= 16), int16_t,
        typename std::conditional<(W <= 32), int32_t, int64_t>::type>::type>::type signed_type;
    typedef typename std::make_unsigned<signed_type>::type unsigned_type;
    typedef typename std::conditional<SIGNED, signed_type, unsigned_type>::type type;
    static const int spare = 8 * int(sizeof(type)) - W;

    template <typename X> static type wrap(X x) {
        return type(type(unsigned_type(unsigned_type(x) << spare)) >> spare);
    }
};
}  // namespace ql

template <int W, bool SIGNED> struct ql_integer {
    typedef ql::native<W, SIGNED> N;
    typedef typename N::type type;
    type m;

    ql_integer() = default;
    template <typename X, typename = typename std::enable_if<std::is_arithmetic<X>::value || std::is_enum<X>::value>::type>
    ql_integer(X x) : m(N::wrap(x)) {}
    operator type() const { return m; }
    int to_int() const { return int(m); }
    int64_t to_int64() const { return int64_t(m); }
    uint64_t to_uint64() const { return uint64_t(m); }
};

template <int W> struct ap_int : ql_integer<W, true> {
    typedef ql_integer<W, true> Base;
    ap_int() = default;
    template <typename X, typename = typename std::enable_if<std::is_arithmetic<X>::value || std::is_enum<X>::value>::type>
    ap_int(X x) : Base(x) {}
    template <int V> ap_int(const ap_int<V>& x) : Base(x.m) {}
    template <int V, bool S> ap_int(const ql_integer<V, S>& x) : Base(x.m) {}
    ap_int& operator+=(int64_t x) { return *this = ap_int(int64_t(this->m) + x); }
    ap_int& operator-=(int64_t x) { return *this = ap_int(int64_t(this->m) - x); }
};

template <int W> struct ap_uint : ql_integer<W, false> {
    typedef ql_integer<W, false> Base;
    ap_uint() = default;
    template <typename X, typename = typename std::enable_if<std::is_arithmetic<X>::value || std::is_enum<X>::value>::type>
    ap_uint(X x) : Base(x) {}
    template <int V> ap_uint(const ap_uint<V>& x) : Base(x.m) {}
    template <int V, bool S> ap_uint(const ql_integer<V, S>& x) : Base(x.m) {}
    ap_uint& operator+=(uint64_t x) { return *this = ap_uint(uint64_t(this->m) + x); }
    ap_uint& operator-=(uint64_t x) { return *this = ap_uint(uint64_t(this->m) - x); }
};
