// HIP's vector types, bfloat16 and half.
#pragma once
#include "standard.h"

#define SIM_VECTOR_TYPES(T, name)                                                                     \
  struct name##1 { T x; };                                                                            \
  struct __attribute__((aligned(2 * sizeof(T)))) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                                      \
  struct __attribute__((aligned(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16))) name##4 { T x, y, z, w; }; \
  inline name##1 make_##name##1(T x) { return {x}; }                                                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                          \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                  \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }                          \
  SIM_VECTOR_OPERATOR(name, +)                                                                        \
  SIM_VECTOR_OPERATOR(name, -)                                                                        \
  SIM_VECTOR_OPERATOR(name, *)                                                                        \
  SIM_VECTOR_OPERATOR(name, /)
#define SIM_VECTOR_OPERATOR(name, op)                                                                                 \
  inline name##1 operator op(name##1 a, name##1 b) { return {decltype(a.x)(a.x op b.x)}; }                            \
  inline name##2 operator op(name##2 a, name##2 b) { return {decltype(a.x)(a.x op b.x), decltype(a.x)(a.y op b.y)}; } \
  inline name##4 operator op(name##4 a, name##4 b) {                                                                  \
    return {decltype(a.x)(a.x op b.x), decltype(a.x)(a.y op b.y), decltype(a.x)(a.z op b.z),                          \
            decltype(a.x)(a.w op b.w)};                                                                               \
  }
#define SIM_VECTOR_COMPLEMENT(name)                                                              \
  inline name##1 operator~(name##1 a) { return {decltype(a.x)(~a.x)}; }                          \
  inline name##2 operator~(name##2 a) { return {decltype(a.x)(~a.x), decltype(a.x)(~a.y)}; }     \
  inline name##4 operator~(name##4 a) {                                                          \
    return {decltype(a.x)(~a.x), decltype(a.x)(~a.y), decltype(a.x)(~a.z), decltype(a.x)(~a.w)}; \
  }
SIM_VECTOR_TYPES(signed char, char)
SIM_VECTOR_TYPES(unsigned char, uchar)
SIM_VECTOR_TYPES(short, short)
SIM_VECTOR_TYPES(unsigned short, ushort)
SIM_VECTOR_TYPES(int, int)
SIM_VECTOR_TYPES(unsigned, uint)
SIM_VECTOR_TYPES(long, long)
SIM_VECTOR_TYPES(unsigned long, ulong)
SIM_VECTOR_TYPES(long long, longlong)
SIM_VECTOR_TYPES(unsigned long long, ulonglong)
SIM_VECTOR_TYPES(float, float)
SIM_VECTOR_TYPES(double, double)
SIM_VECTOR_COMPLEMENT(char)
SIM_VECTOR_COMPLEMENT(uchar)
SIM_VECTOR_COMPLEMENT(short)
SIM_VECTOR_COMPLEMENT(ushort)
SIM_VECTOR_COMPLEMENT(int)
SIM_VECTOR_COMPLEMENT(uint)
SIM_VECTOR_COMPLEMENT(long)
SIM_VECTOR_COMPLEMENT(ulong)
SIM_VECTOR_COMPLEMENT(longlong)
SIM_VECTOR_COMPLEMENT(ulonglong)
#undef SIM_VECTOR_COMPLEMENT
#undef SIM_VECTOR_TYPES
#undef SIM_VECTOR_OPERATOR

struct hip_bfloat16 {
  unsigned short data;

  hip_bfloat16() = default;
  explicit constexpr hip_bfloat16(float value) : data() {
    const unsigned bits = __builtin_bit_cast(unsigned, value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    data = (nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest even
  }
  constexpr operator float() const { return __builtin_bit_cast(float, unsigned(data) << 16); }
};
#define SIM_BFLOAT_OPERATOR(op)                                                                                  \
  inline hip_bfloat16 operator op(hip_bfloat16 a, hip_bfloat16 b) { return hip_bfloat16(float(a) op float(b)); } \
  inline hip_bfloat16& operator op## = (hip_bfloat16 & a, hip_bfloat16 b) { return a = a op b; }
SIM_BFLOAT_OPERATOR(+)
SIM_BFLOAT_OPERATOR(-)
SIM_BFLOAT_OPERATOR(*)
SIM_BFLOAT_OPERATOR(/)
#undef SIM_BFLOAT_OPERATOR
inline hip_bfloat16 operator-(hip_bfloat16 a) { return hip_bfloat16(-float(a)); }
using __hip_bfloat16 = hip_bfloat16;

using __half = _Float16;
struct __attribute__((aligned(4))) __half2 {
  _Float16 x, y;
};
using half2 = __half2;
inline float __half2float(_Float16 h) { return h; }
inline _Float16 __float2half(float f) { return _Float16(f); }
