// Vectors of MSL: components by name, swizzles, constructors from parts, operators by element.
#pragma once
#include "types.h"

namespace metal {

template <class T, int N>
struct vec_data {
  T e[N];
};
template <class T>
struct alignas(2 * sizeof(T)) vec_data<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
  };
  SIM_FN constexpr vec_data() = default;
};
template <class T>
struct alignas(4 * sizeof(T)) vec_data<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
  };
  SIM_FN constexpr vec_data() = default;
};
template <class T>
struct alignas(4 * sizeof(T)) vec_data<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
  };
  SIM_FN constexpr vec_data() = default;
};

template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

template <class T>
constexpr int vec_size = 0;  // of a scalar
template <class T, int N>
constexpr int vec_size<vec<T, N>> = N;
template <class T, int N>
constexpr int vec_size<packed_vec<T, N>> = N;
template <class T>
struct vec_element {
  using type = T;
};
template <class T, int N>
struct vec_element<vec<T, N>> {
  using type = T;
};
template <class T>
constexpr bool is_scalar_v = is_arithmetic_v<remove_cv_t<T>> || __is_enum(T);

// What `v.xz` names where it is assigned to.
template <class V, int... I>
struct swizzle_reference {
  V& v;
  template <class U>
  SIM_FN constexpr void operator=(const U& u) {
    vec<typename vec_element<V>::type, sizeof...(I)> value(u);
    int k = 0;
    ((v.e[I] = value.e[k++]), ...);
  }
#define SIM_ASSIGN(op)                                 \
  template <class U>                                   \
  SIM_FN constexpr void operator op## = (const U& u) { \
    *this = v.template swizzle<I...>() op u;           \
  }
  SIM_ASSIGN(+)
  SIM_ASSIGN(-)
  SIM_ASSIGN(*)
  SIM_ASSIGN(/)
#undef SIM_ASSIGN
};

template <class T, int N>
struct vec : vec_data<T, N> {
  using vec_data<T, N>::e;

  SIM_FN constexpr vec() = default;
  template <class U, enable_if_t<is_scalar_v<U>, int> = 0>
  SIM_FN constexpr vec(U s) {
    for (int i = 0; i < N; ++i) e[i] = T(s);
  }
  template <class U>
  SIM_FN explicit constexpr vec(const vec<U, N>& o) {
    for (int i = 0; i < N; ++i) e[i] = T(o.e[i]);
  }
  SIM_FN constexpr vec(const packed_vec<T, N>& o) {
    for (int i = 0; i < N; ++i) e[i] = o.e[i];
  }
  template <class A, class B, class... Rest>
  SIM_FN constexpr vec(const A& a, const B& b, const Rest&... rest) {
    static_assert(components<A> + components<B> + (components<Rest> + ... + 0) == N,
                  "a vector takes as many components as it has");
    int i = 0;
    put(i, a), put(i, b);
    (put(i, rest), ...);
  }
  // In braces there may be fewer; the others are zero.
  SIM_FN constexpr vec(std::initializer_list<T> values) {
    int i = 0;
    for (const T& value : values) e[i++] = value;
    while (i < N) e[i++] = T(0);
  }
  SIM_FN constexpr T& operator[](unsigned long i) { return e[i]; }
  SIM_FN constexpr const T& operator[](unsigned long i) const { return e[i]; }

  template <int... I>
  SIM_FN constexpr vec<T, sizeof...(I)> swizzle() const {
    return vec<T, sizeof...(I)>(e[I]...);
  }
  template <int... I>
  SIM_FN constexpr swizzle_reference<vec, I...> swizzle_ref() {
    return {*this};
  }

 private:
  template <class A>
  static constexpr int components = vec_size<A> ? vec_size<A> : 1;
  template <class A>
  SIM_FN constexpr void put(int& i, const A& a) {
    if constexpr (vec_size<A> > 0)
      for (int k = 0; k < vec_size<A>; ++k) e[i++] = T(a.e[k]);
    else
      e[i++] = T(a);
  }
};

template <class T, int N>
struct packed_vec {
  T e[N];
  packed_vec() = default;
  SIM_FN constexpr packed_vec(const vec<T, N>& o) {
    for (int i = 0; i < N; ++i) e[i] = o.e[i];
  }
  template <class... A>
  SIM_FN constexpr packed_vec(const A&... a) : packed_vec(vec<T, N>(a...)) {}
  SIM_FN constexpr T& operator[](unsigned long i) { return e[i]; }
  SIM_FN constexpr const T& operator[](unsigned long i) const { return e[i]; }
};

#define SIM_BINARY(op)                                                             \
  template <class T, int N>                                                        \
  SIM_FN constexpr vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<T, N> r;                                                                   \
    for (int i = 0; i < N; ++i) r.e[i] = T(a.e[i] op b.e[i]);                      \
    return r;                                                                      \
  }                                                                                \
  template <class T, int N, class S, enable_if_t<is_scalar_v<S>, int> = 0>         \
  SIM_FN constexpr vec<T, N> operator op(const vec<T, N>& a, S s) {                \
    return a op vec<T, N>(s);                                                      \
  }                                                                                \
  template <class T, int N, class S, enable_if_t<is_scalar_v<S>, int> = 0>         \
  SIM_FN constexpr vec<T, N> operator op(S s, const vec<T, N>& a) {                \
    return vec<T, N>(s) op a;                                                      \
  }                                                                                \
  template <class T, int N, class U>                                               \
  SIM_FN constexpr vec<T, N>& operator op## = (vec<T, N> & a, const U& b) {        \
    return a = a op vec<T, N>(b);                                                  \
  }
SIM_BINARY(+)
SIM_BINARY(-)
SIM_BINARY(*)
SIM_BINARY(/)
SIM_BINARY(%)
SIM_BINARY(&)
SIM_BINARY(|)
SIM_BINARY(^)
SIM_BINARY(<<)
SIM_BINARY(>>)
#undef SIM_BINARY
#define SIM_COMPARE(op)                                                               \
  template <class T, int N>                                                           \
  SIM_FN constexpr vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<bool, N> r;                                                                   \
    for (int i = 0; i < N; ++i) r.e[i] = a.e[i] op b.e[i];                            \
    return r;                                                                         \
  }                                                                                   \
  template <class T, int N, class S, enable_if_t<is_scalar_v<S>, int> = 0>            \
  SIM_FN constexpr vec<bool, N> operator op(const vec<T, N>& a, S s) {                \
    return a op vec<T, N>(s);                                                         \
  }                                                                                   \
  template <class T, int N, class S, enable_if_t<is_scalar_v<S>, int> = 0>            \
  SIM_FN constexpr vec<bool, N> operator op(S s, const vec<T, N>& a) {                \
    return vec<T, N>(s) op a;                                                         \
  }
SIM_COMPARE(==)
SIM_COMPARE(!=)
SIM_COMPARE(<)
SIM_COMPARE(>)
SIM_COMPARE(<=)
SIM_COMPARE(>=)
SIM_COMPARE(&&)
SIM_COMPARE(||)
#undef SIM_COMPARE
#define SIM_UNARY(op)                                          \
  template <class T, int N>                                    \
  SIM_FN constexpr vec<T, N> operator op(const vec<T, N>& a) { \
    vec<T, N> r;                                               \
    for (int i = 0; i < N; ++i) r.e[i] = T(op a.e[i]);         \
    return r;                                                  \
  }
SIM_UNARY(-)
SIM_UNARY(+)
SIM_UNARY(~)
SIM_UNARY(!)
#undef SIM_UNARY

template <int N>
SIM_FN constexpr bool any(const vec<bool, N>& v) {
  bool r = false;
  for (int i = 0; i < N; ++i) r |= v.e[i];
  return r;
}
template <int N>
SIM_FN constexpr bool all(const vec<bool, N>& v) {
  bool r = true;
  for (int i = 0; i < N; ++i) r &= v.e[i];
  return r;
}

}  // namespace metal

#define SIM_VECTORS(T)                           \
  using T##2 = metal::vec<T, 2>;                 \
  using T##3 = metal::vec<T, 3>;                 \
  using T##4 = metal::vec<T, 4>;                 \
  using packed_##T##2 = metal::packed_vec<T, 2>; \
  using packed_##T##3 = metal::packed_vec<T, 3>; \
  using packed_##T##4 = metal::packed_vec<T, 4>;
SIM_VECTORS(bool)
SIM_VECTORS(char)
SIM_VECTORS(uchar)
SIM_VECTORS(short)
SIM_VECTORS(ushort)
SIM_VECTORS(int)
SIM_VECTORS(uint)
SIM_VECTORS(long)
SIM_VECTORS(ulong)
SIM_VECTORS(half)
SIM_VECTORS(float)
SIM_VECTORS(bfloat)
#undef SIM_VECTORS
