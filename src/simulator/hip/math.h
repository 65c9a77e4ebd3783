// The math functions of HIP that TileLang's code generator names: C's, by precision, and those on half and bfloat16.
#pragma once
#include "types.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define HUGE_VAL __builtin_inf()

#define SIM_MATH1(name)                                                            \
  inline float name##f(float x) { return __builtin_##name##f(x); }                 \
  inline float __##name##f(float x) { return __builtin_##name##f(x); }             \
  inline double name(double x) { return __builtin_##name(x); }                     \
  inline float name(float x) { return __builtin_##name##f(x); }                    \
  inline _Float16 h##name(_Float16 x) { return _Float16(__builtin_##name##f(x)); } \
  inline hip_bfloat16 h##name(hip_bfloat16 x) { return hip_bfloat16(__builtin_##name##f(x)); }
SIM_MATH1(exp)
SIM_MATH1(exp2)
SIM_MATH1(exp10)
SIM_MATH1(log)
SIM_MATH1(log2)
SIM_MATH1(log10)
SIM_MATH1(log1p)
SIM_MATH1(expm1)
SIM_MATH1(sin)
SIM_MATH1(cos)
SIM_MATH1(tan)
SIM_MATH1(asin)
SIM_MATH1(acos)
SIM_MATH1(atan)
SIM_MATH1(sinh)
SIM_MATH1(cosh)
SIM_MATH1(tanh)
SIM_MATH1(asinh)
SIM_MATH1(acosh)
SIM_MATH1(atanh)
SIM_MATH1(erf)
SIM_MATH1(sqrt)
SIM_MATH1(floor)
SIM_MATH1(ceil)
SIM_MATH1(trunc)
SIM_MATH1(rint)
SIM_MATH1(round)
SIM_MATH1(nearbyint)
#undef SIM_MATH1
#define SIM_MATH2(name)                                                        \
  inline float name##f(float x, float y) { return __builtin_##name##f(x, y); } \
  inline double name(double x, double y) { return __builtin_##name(x, y); }    \
  inline float name(float x, float y) { return __builtin_##name##f(x, y); }
SIM_MATH2(pow)
SIM_MATH2(fmod)
SIM_MATH2(fmax)
SIM_MATH2(fmin)
SIM_MATH2(atan2)
SIM_MATH2(copysign)
SIM_MATH2(hypot)
SIM_MATH2(nextafter)
#undef SIM_MATH2

inline float fabsf(float x) { return __builtin_fabsf(x); }
inline double fabs(double x) { return __builtin_fabs(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float ldexpf(float x, int e) { return __builtin_ldexpf(x, e); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline _Float16 hrsqrt(_Float16 x) { return _Float16(1.0f / __builtin_sqrtf(x)); }
inline _Float16 __ocml_sqrt_f16(_Float16 x) { return _Float16(__builtin_sqrtf(x)); }
inline _Float16 __ocml_pown_f16(_Float16 x, int n) { return _Float16(__builtin_powif(x, n)); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

// Of any one type, as clang's HIP headers have them; the built-in types follow.
template <class T>
inline T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
inline T min(T a, T b) {
  return a < b ? a : b;
}
#define SIM_ORDER(T)                               \
  inline T max(T a, T b) { return a < b ? b : a; } \
  inline T min(T a, T b) { return b < a ? b : a; }
SIM_ORDER(int)
SIM_ORDER(unsigned)
SIM_ORDER(long)
SIM_ORDER(unsigned long)
SIM_ORDER(long long)
SIM_ORDER(unsigned long long)
#undef SIM_ORDER
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline int abs(int x) { return x < 0 ? -x : x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) { return __builtin_bitreverse32(x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline double __hiloint2double(int high, int low) {
  return __builtin_bit_cast(double, (unsigned long)(unsigned)high << 32 | (unsigned)low);
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

// Four products of bytes, signed or not.
inline int __builtin_amdgcn_sudot4(bool a_signed, int a, bool b_signed, int b, int c, bool) {
  for (int i = 0; i < 4; ++i) {
    const int x = a >> 8 * i & 255, y = b >> 8 * i & 255;
    c += (a_signed ? (signed char)x : x) * (b_signed ? (signed char)y : y);
  }
  return c;
}
inline int __builtin_amdgcn_sdot4(int a, int b, int c, bool clamp) {
  return __builtin_amdgcn_sudot4(true, a, true, b, c, clamp);
}
