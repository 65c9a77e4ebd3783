// The few names of C and C++ headers that TileLang's templates use: no standard library is included.
#pragma once
#include "../engine.h"

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using size_t = unsigned long;
using uintptr_t = unsigned long;
using intptr_t = long;

namespace std {

using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::size_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;

template <class T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}

template <class A, class B>
struct pair {
  A first;
  B second;
};
template <class A, class B>
constexpr pair<A, B> make_pair(A a, B b) {
  return {a, b};
}

template <bool value_>
struct bool_constant {
  static constexpr bool value = value_;
};
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B>
inline constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <bool condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;
template <bool condition, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool condition, class A, class B>
using conditional_t = typename conditional<condition, A, B>::type;

}  // namespace std

template <class... A>
inline int printf(const char* format, A... values) {
  sim::print(format, values...);
  return 0;
}
