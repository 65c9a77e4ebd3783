// Eight- and four-bit floats: their values, and the types that TileLang's hip_fp8.h is written with.
#pragma once
#include "standard.h"

enum __hip_fp8_interpretation_t { __HIP_E4M3 = 0, __HIP_E5M2 = 1, __HIP_E4M3_FNUZ = 2, __HIP_E5M2_FNUZ = 3 };
enum __hip_saturation_t { __HIP_NOSAT = 0, __HIP_SATFINITE = 1 };
using __hip_fp8_storage_t = unsigned char;

namespace sim {

// A code's value, by the OCP "8-bit Floating Point Specification" and, for FNUZ, arXiv 2206.02915: one more of bias,
// one NaN, which is the code of negative zero, and no infinity.
template <__hip_fp8_interpretation_t kind>
constexpr float fp8_value(unsigned char code) {
  constexpr bool fnuz = kind & 2;
  constexpr int mantissa_bits = kind & 1 ? 2 : 3, exponent_bits = 7 - mantissa_bits;
  constexpr int bias = (1 << (exponent_bits - 1)) - 1 + fnuz;
  const unsigned magnitude = code & 0x7f, mantissa = magnitude & ((1 << mantissa_bits) - 1);
  const float sign = code & 0x80 ? -1.0f : 1.0f;
  if (fnuz && code == 0x80) return __builtin_nanf("");
  if (kind == __HIP_E4M3 && magnitude == 0x7f) return __builtin_nanf("");
  if (kind == __HIP_E5M2 && magnitude > 0x7c) return __builtin_nanf("");
  if (kind == __HIP_E5M2 && magnitude == 0x7c) return sign * __builtin_inff();
  int exponent = magnitude >> mantissa_bits;
  float value = exponent ? 1.0f + float(mantissa) / (1 << mantissa_bits) : float(mantissa) / (1 << mantissa_bits);
  if (!exponent) exponent = 1;
  for (int e = bias; e < exponent; ++e) value *= 2;
  for (int e = exponent; e < bias; ++e) value /= 2;
  return sign * value;
}

template <__hip_fp8_interpretation_t kind>
struct Fp8Values {
  float of[256];
  constexpr Fp8Values() : of() {
    for (int code = 0; code < 256; ++code) of[code] = fp8_value<kind>(code);
  }
};
template <__hip_fp8_interpretation_t kind>
inline constexpr Fp8Values<kind> fp8_values;

// E2M1 of the OCP "Microscaling Formats (MX) Specification".
inline constexpr float kFp4Values[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};

// E8M0: 2^(code - 127), 255 is NaN.
inline float e8m0_value(unsigned char code) {
  if (code == 255) return __builtin_nanf("");
  return __builtin_bit_cast(float, code ? unsigned(code) << 23 : 1u << 22);
}

// The nearest code, to even; finite values beyond the largest saturate, infinity has the format's infinity or NaN.
template <__hip_fp8_interpretation_t kind>
inline unsigned char fp8_code(float value) {
  constexpr unsigned largest = kind & 2 ? 0x7f : kind == __HIP_E4M3 ? 0x7e : 0x7b;
  const unsigned sign = __builtin_signbit(value) ? 0x80 : 0;
  const float magnitude = __builtin_fabsf(value);
  if (value != value || magnitude == __builtin_inff()) {
    if (kind & 2) return 0x80;
    return sign | (kind == __HIP_E4M3 || value != value ? 0x7f : 0x7c);
  }
  unsigned below = 0;  // the largest code at or below the value
  for (unsigned step = 64; step; step /= 2)
    if (below + step <= largest && fp8_values<kind>.of[below + step] <= magnitude) below += step;
  unsigned code = below;
  if (below < largest) {
    const float down = magnitude - fp8_values<kind>.of[below], up = fp8_values<kind>.of[below + 1] - magnitude;
    if (up < down || (up == down && below % 2)) ++code;
  }
  return kind & 2 && code == 0 ? 0 : sign | code;
}

}  // namespace sim

inline __hip_fp8_storage_t __hip_cvt_float_to_fp8(float value, __hip_saturation_t, __hip_fp8_interpretation_t kind) {
  switch (kind) {
    case __HIP_E4M3:
      return sim::fp8_code<__HIP_E4M3>(value);
    case __HIP_E5M2:
      return sim::fp8_code<__HIP_E5M2>(value);
    case __HIP_E4M3_FNUZ:
      return sim::fp8_code<__HIP_E4M3_FNUZ>(value);
    case __HIP_E5M2_FNUZ:
      return sim::fp8_code<__HIP_E5M2_FNUZ>(value);
  }
}

#define SIM_FP8_TYPES(suffix, kind)                                      \
  struct __hip_fp8_##suffix {                                            \
    unsigned char __x;                                                   \
    __hip_fp8_##suffix() = default;                                      \
    __hip_fp8_##suffix(float value) : __x(sim::fp8_code<kind>(value)) {} \
    operator float() const { return sim::fp8_values<kind>.of[__x]; }     \
  };                                                                     \
  struct __hip_fp8x2_##suffix {                                          \
    unsigned short __x;                                                  \
  };                                                                     \
  struct __hip_fp8x4_##suffix {                                          \
    unsigned __x;                                                        \
  };
SIM_FP8_TYPES(e4m3, __HIP_E4M3)
SIM_FP8_TYPES(e5m2, __HIP_E5M2)
SIM_FP8_TYPES(e4m3_fnuz, __HIP_E4M3_FNUZ)
SIM_FP8_TYPES(e5m2_fnuz, __HIP_E5M2_FNUZ)
#undef SIM_FP8_TYPES
