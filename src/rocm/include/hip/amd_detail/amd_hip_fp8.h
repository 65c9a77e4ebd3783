// Stand-in for ROCm's <hip/amd_detail/amd_hip_fp8.h>: the fp8 types of HIP as bytes that convert to and from float.
// Used where ROCm is not installed.
#pragma once

#include <hip/hip_runtime.h>
#include <stdint.h>

typedef uint8_t __hip_fp8_storage_t;
typedef uint16_t __hip_fp8x2_storage_t;
typedef uint32_t __hip_fp8x4_storage_t;

enum __hip_fp8_interpretation_t { __HIP_E4M3 = 0, __HIP_E5M2 = 1, __HIP_E4M3_FNUZ = 2, __HIP_E5M2_FNUZ = 3 };
enum __hip_saturation_t { __HIP_NOSAT = 0, __HIP_SATFINITE = 1 };

// value = mantissa / 2^mantissa_bits * 2^(exponent - bias); the FNUZ flavours have a larger bias, one NaN (0x80), no
// infinity.
struct __hip_fp8_format {
  int mantissa_bits, bias;
  bool fnuz;
  unsigned max, infinity, nan;  // magnitudes; infinity is nan where there is none

  __host__ __device__ constexpr explicit __hip_fp8_format(__hip_fp8_interpretation_t kind)
      : mantissa_bits(kind & 1 ? 2 : 3),
        bias((kind & 1 ? 15 : 7) + (kind & 2 ? 1 : 0)),
        fnuz(kind & 2),
        max(kind & 2 ? 0x7f : (kind & 1 ? 0x7b : 0x7e)),
        infinity(kind & 2 ? 0x80 : (kind & 1 ? 0x7c : 0x7f)),
        nan(kind & 2 ? 0x80 : 0x7f) {}
};

__host__ __device__ inline float __hip_fp8_to_float(__hip_fp8_storage_t code, __hip_fp8_interpretation_t kind) {
  const __hip_fp8_format format(kind);
  const unsigned magnitude = code & 0x7f;
  const bool negative = code & 0x80;
  if (format.fnuz ? code == 0x80 : magnitude > format.infinity || magnitude == format.nan) return __builtin_nanf("");
  if (!format.fnuz && magnitude == format.infinity) return negative ? -__builtin_inff() : __builtin_inff();
  const int exponent = static_cast<int>(magnitude >> format.mantissa_bits);
  const int mantissa = static_cast<int>(magnitude & ((1u << format.mantissa_bits) - 1));
  const int significand = exponent ? mantissa + (1 << format.mantissa_bits) : mantissa;
  const int power = (exponent ? exponent : 1) - format.bias - format.mantissa_bits;  // -19 to 13: a normal float
  const float value =
      static_cast<float>(significand) * __builtin_bit_cast(float, static_cast<unsigned>(127 + power) << 23);
  return negative ? -value : value;
}

// Rounds to nearest even; past the largest value it saturates or gives infinity (NaN where the format has none).
__host__ __device__ inline __hip_fp8_storage_t __hip_cvt_float_to_fp8(float value, __hip_saturation_t saturation,
                                                                      __hip_fp8_interpretation_t kind) {
  const __hip_fp8_format format(kind);
  const unsigned bits = __builtin_bit_cast(unsigned, value);
  const unsigned sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<__hip_fp8_storage_t>(format.fnuz ? 0x80 : sign | format.nan);
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const int smallest = 1 - format.bias;
  // What is below the last mantissa bit of the result: 23 - mantissa_bits bits of a normal result, more of a subnormal
  // one.
  int dropped = 23 - format.mantissa_bits + (exponent < smallest ? smallest - exponent : 0);
  unsigned code = 0;
  if (dropped < 25) {
    const unsigned significand = (magnitude & 0x7fffff) | 0x800000;
    code = significand >> dropped;
    const unsigned rest = significand & ((1u << dropped) - 1), tie = 1u << (dropped - 1);
    code += rest > tie || (rest == tie && (code & 1));
    if (exponent >= smallest) code += static_cast<unsigned>(exponent - smallest) << format.mantissa_bits;
  }
  if (code > format.max) {
    code = saturation == __HIP_SATFINITE ? format.max : format.infinity;
    if (format.fnuz && saturation != __HIP_SATFINITE) return 0x80;
  }
  if (format.fnuz && code == 0) return 0;  // FNUZ has no negative zero
  return static_cast<__hip_fp8_storage_t>(sign | code);
}

#define TILELANG_EXT_FP8_TYPES(NAME, PAIR, QUAD, KIND)                                                   \
  struct NAME {                                                                                          \
    __hip_fp8_storage_t __x;                                                                             \
    NAME() = default;                                                                                    \
    __host__ __device__ NAME(float value) : __x(__hip_cvt_float_to_fp8(value, __HIP_SATFINITE, KIND)) {} \
    __host__ __device__ operator float() const { return __hip_fp8_to_float(__x, KIND); }                 \
  };                                                                                                     \
  struct PAIR {                                                                                          \
    __hip_fp8x2_storage_t __x;                                                                           \
  };                                                                                                     \
  struct QUAD {                                                                                          \
    __hip_fp8x4_storage_t __x;                                                                           \
  };

TILELANG_EXT_FP8_TYPES(__hip_fp8_e4m3, __hip_fp8x2_e4m3, __hip_fp8x4_e4m3, __HIP_E4M3)
TILELANG_EXT_FP8_TYPES(__hip_fp8_e5m2, __hip_fp8x2_e5m2, __hip_fp8x4_e5m2, __HIP_E5M2)
TILELANG_EXT_FP8_TYPES(__hip_fp8_e4m3_fnuz, __hip_fp8x2_e4m3_fnuz, __hip_fp8x4_e4m3_fnuz, __HIP_E4M3_FNUZ)
TILELANG_EXT_FP8_TYPES(__hip_fp8_e5m2_fnuz, __hip_fp8x2_e5m2_fnuz, __hip_fp8x4_e5m2_fnuz, __HIP_E5M2_FNUZ)

#undef TILELANG_EXT_FP8_TYPES
