// The math library: float, half and bfloat through float, rounded to the type; vectors by element.
#pragma once
#include "vec.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX half(65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_E_F 2.71828182845904523536f
#define M_E_H half(M_E_F)
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG2E_H half(M_LOG2E_F)
#define M_LOG10E_F 0.43429448190325182765f
#define M_LOG10E_H half(M_LOG10E_F)
#define M_LN2_F 0.69314718055994530942f
#define M_LN2_H half(M_LN2_F)
#define M_LN10_F 2.30258509299404568402f
#define M_LN10_H half(M_LN10_F)
#define M_PI_F 3.14159265358979323846f
#define M_PI_H half(M_PI_F)
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_2_H half(M_PI_2_F)
#define M_PI_4_F 0.78539816339744830962f
#define M_PI_4_H half(M_PI_4_F)
#define M_1_PI_F 0.31830988618379067154f
#define M_1_PI_H half(M_1_PI_F)
#define M_2_PI_F 0.63661977236758134308f
#define M_2_PI_H half(M_2_PI_F)
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_2_SQRTPI_H half(M_2_SQRTPI_F)
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT2_H half(M_SQRT2_F)
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_SQRT1_2_H half(M_SQRT1_2_F)

namespace metal {

// By element, for every arity; `f` is called with scalars.
template <class F, class T, int N, class... More>
SIM_FN constexpr auto by_element(F f, const vec<T, N>& a, const More&... more) {
  vec<decltype(f(a.e[0], more.e[0]...)), N> r;
  for (int i = 0; i < N; ++i) r.e[i] = f(a.e[i], more.e[i]...);
  return r;
}

#define SIM_FLOAT1(name, expression)                         \
  SIM_FN inline float name(float x) { return expression; }   \
  SIM_FN inline half name(half h) {                          \
    float x = h;                                             \
    return half(expression);                                 \
  }                                                          \
  SIM_FN inline bfloat name(bfloat h) {                      \
    float x = h;                                             \
    return bfloat(expression);                               \
  }                                                          \
  template <class T, enable_if_t<is_integral_v<T>, int> = 0> \
  SIM_FN inline float name(T i) {                            \
    float x = float(i);                                      \
    return expression;                                       \
  }                                                          \
  template <class T, int N>                                  \
  SIM_FN inline vec<T, N> name(const vec<T, N>& v) {         \
    return by_element([](T x) { return name(x); }, v);       \
  }
#define SIM_FLOAT2(name, expression)                                     \
  SIM_FN inline float name(float x, float y) { return expression; }      \
  SIM_FN inline half name(half a, half b) {                              \
    float x = a, y = b;                                                  \
    return half(expression);                                             \
  }                                                                      \
  SIM_FN inline bfloat name(bfloat a, bfloat b) {                        \
    float x = a, y = b;                                                  \
    return bfloat(expression);                                           \
  }                                                                      \
  template <class T, int N>                                              \
  SIM_FN inline vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) { \
    return by_element([](T x, T y) { return name(x, y); }, a, b);        \
  }
SIM_FLOAT1(exp, __builtin_expf(x))
SIM_FLOAT1(exp2, __builtin_exp2f(x))
SIM_FLOAT1(exp10, __builtin_powf(10.0f, x))
SIM_FLOAT1(log, __builtin_logf(x))
SIM_FLOAT1(log2, __builtin_log2f(x))
SIM_FLOAT1(log10, __builtin_log10f(x))
SIM_FLOAT1(sin, __builtin_sinf(x))
SIM_FLOAT1(cos, __builtin_cosf(x))
SIM_FLOAT1(tan, __builtin_tanf(x))
SIM_FLOAT1(asin, __builtin_asinf(x))
SIM_FLOAT1(acos, __builtin_acosf(x))
SIM_FLOAT1(atan, __builtin_atanf(x))
SIM_FLOAT1(sinh, __builtin_sinhf(x))
SIM_FLOAT1(cosh, __builtin_coshf(x))
SIM_FLOAT1(tanh, __builtin_tanhf(x))
SIM_FLOAT1(asinh, __builtin_asinhf(x))
SIM_FLOAT1(acosh, __builtin_acoshf(x))
SIM_FLOAT1(atanh, __builtin_atanhf(x))
SIM_FLOAT1(sqrt, __builtin_sqrtf(x))
SIM_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
SIM_FLOAT1(floor, __builtin_floorf(x))
SIM_FLOAT1(ceil, __builtin_ceilf(x))
SIM_FLOAT1(trunc, __builtin_truncf(x))
SIM_FLOAT1(round, __builtin_roundf(x))
SIM_FLOAT1(rint, __builtin_rintf(x))
SIM_FLOAT1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
SIM_FLOAT1(fabs, __builtin_fabsf(x))
SIM_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
SIM_FLOAT1(sign, float((x > 0.0f) - (x < 0.0f)))
SIM_FLOAT1(sinpi, __builtin_sinf(M_PI_F* x))
SIM_FLOAT1(cospi, __builtin_cosf(M_PI_F* x))
SIM_FLOAT2(pow, __builtin_powf(x, y))
SIM_FLOAT2(powr, __builtin_powf(x, y))
SIM_FLOAT2(fmin, __builtin_fminf(x, y))
SIM_FLOAT2(fmax, __builtin_fmaxf(x, y))
SIM_FLOAT2(fmod, __builtin_fmodf(x, y))
SIM_FLOAT2(atan2, __builtin_atan2f(x, y))
SIM_FLOAT2(copysign, __builtin_copysignf(x, y))
SIM_FLOAT2(divide, x / y)
SIM_FLOAT2(step, float(y >= x))
#undef SIM_FLOAT1
#undef SIM_FLOAT2

// One rounding, of the exact value: half and bfloat products are exact in double, and so is nearly every sum.
SIM_FN inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SIM_FN inline half fma(half a, half b, half c) { return half((double)a * b + (double)c); }
SIM_FN inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
template <class T, int N>
SIM_FN inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  return by_element([](T x, T y, T z) { return fma(x, y, z); }, a, b, c);
}
SIM_FN inline float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
SIM_FN inline half ldexp(half x, int n) { return half(__builtin_ldexpf(x, n)); }

#define SIM_TEST(name, expression)                        \
  SIM_FN inline bool name(float x) { return expression; } \
  SIM_FN inline bool name(half h) {                       \
    float x = h;                                          \
    return expression;                                    \
  }                                                       \
  SIM_FN inline bool name(bfloat h) {                     \
    float x = h;                                          \
    return expression;                                    \
  }                                                       \
  template <class T, int N>                               \
  SIM_FN inline vec<bool, N> name(const vec<T, N>& v) {   \
    return by_element([](T x) { return name(x); }, v);    \
  }
SIM_TEST(isnan, __builtin_isnan(x))
SIM_TEST(isinf, __builtin_isinf(x))
SIM_TEST(isfinite, __builtin_isfinite(x))
SIM_TEST(signbit, __builtin_signbit(x))
#undef SIM_TEST

// min, max, clamp, abs: integers and floats; arguments of two types meet in their common type.
template <class A, class B>
using common = decltype(true ? declval<A>() : declval<B>());
template <class A>
concept Scalar = is_arithmetic_v<A>;
template <Scalar A, Scalar B>
SIM_FN constexpr auto min(A a, B b) {
  using T = common<A, B>;
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fminf(float(a), float(b)));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <Scalar A, Scalar B>
SIM_FN constexpr auto max(A a, B b) {
  using T = common<A, B>;
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fmaxf(float(a), float(b)));
  else
    return T(a) < T(b) ? T(b) : T(a);
}
template <Scalar A>
SIM_FN constexpr A abs(A a) {
  if constexpr (is_floating_point_v<A>) return A(__builtin_fabsf(float(a)));
  if constexpr (is_unsigned_v<A>) return a;
  return a < A(0) ? A(-a) : a;
}
template <class T, class A, class B>
SIM_FN constexpr auto clamp(T x, A low, B high) {
  return min(max(x, low), high);
}
#define SIM_VECTOR2(name)                                                   \
  template <class T, int N>                                                 \
  SIM_FN constexpr vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) { \
    return by_element([](T x, T y) { return T(name(x, y)); }, a, b);        \
  }                                                                         \
  template <class T, int N, Scalar S>                                       \
  SIM_FN constexpr vec<T, N> name(const vec<T, N>& a, S b) {                \
    return name(a, vec<T, N>(b));                                           \
  }
SIM_VECTOR2(min)
SIM_VECTOR2(max)
#undef SIM_VECTOR2
template <class T, int N>
SIM_FN constexpr vec<T, N> abs(const vec<T, N>& v) {
  return by_element([](T x) { return abs(x); }, v);
}
SIM_FN inline float min3(float a, float b, float c) { return min(min(a, b), c); }
SIM_FN inline float max3(float a, float b, float c) { return max(max(a, b), c); }

template <Scalar A, Scalar B>
SIM_FN constexpr auto select(A a, B b, bool c) {
  return c ? common<A, B>(b) : common<A, B>(a);
}
template <class T, int N>
SIM_FN constexpr vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, bool c) {
  return c ? b : a;
}
template <class T, int N, class C>
SIM_FN constexpr vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<C, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r.e[i] = c.e[i] ? b.e[i] : a.e[i];
  return r;
}
template <class T>
SIM_FN constexpr T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T, int N>
SIM_FN constexpr T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T r = a.e[0] * b.e[0];
  for (int i = 1; i < N; ++i) r = T(r + a.e[i] * b.e[i]);
  return r;
}

// ---- integers

#define SIM_INTEGER1(name, expression)                       \
  template <class T, enable_if_t<is_integral_v<T>, int> = 0> \
  SIM_FN constexpr T name(T v) {                             \
    constexpr int bits = sizeof(T) * 8;                      \
    const auto x = make_unsigned_t<T>(v);                    \
    (void)bits;                                              \
    return T(expression);                                    \
  }                                                          \
  template <class T, int N>                                  \
  SIM_FN constexpr vec<T, N> name(const vec<T, N>& v) {      \
    return by_element([](T x) { return name(x); }, v);       \
  }
SIM_INTEGER1(popcount, __builtin_popcountl(x))
SIM_INTEGER1(clz, x ? __builtin_clzl(x) - (64 - bits) : bits)
SIM_INTEGER1(ctz, x ? __builtin_ctzl(x) : bits)
SIM_INTEGER1(reverse_bits, __builtin_bitreverse64(x) >> (64 - bits))
#undef SIM_INTEGER1
SIM_FN inline int mulhi(int a, int b) { return int((long)a * b >> 32); }
SIM_FN inline uint mulhi(uint a, uint b) { return uint((ulong)a * b >> 32); }
template <class T>
SIM_FN constexpr T extract_bits(T x, uint offset, uint bits) {
  return bits == 0 ? T(0) : T(T(x << (sizeof(T) * 8 - offset - bits)) >> (sizeof(T) * 8 - bits));
}
template <class T>
SIM_FN constexpr T insert_bits(T base, T insert, uint offset, uint bits) {
  const T mask = T(((bits == sizeof(T) * 8 ? T(0) : T(1) << bits) - 1) << offset);
  return T((base & ~mask) | ((insert << offset) & mask));
}
template <class T>
SIM_FN constexpr T rotate(T x, T n) {
  const uint k = uint(n) % (sizeof(T) * 8);
  using U = make_unsigned_t<T>;
  return k ? T(U(x) << k | U(x) >> (sizeof(T) * 8 - k)) : x;
}

namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

}  // namespace metal
