// Stand-in for ROCm's <hip/hip_bfloat16.h>: a bfloat16 that converts, rounding to nearest even. Used where ROCm is not
// installed.
#pragma once

#include <hip/hip_runtime.h>

struct hip_bfloat16 {
  unsigned short data;

  hip_bfloat16() = default;
  __host__ __device__ explicit hip_bfloat16(float value) {
    unsigned bits = __builtin_bit_cast(unsigned, value);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    bits = is_nan ? bits | 0x00400000 : bits + 0x7fff + ((bits >> 16) & 1);
    data = static_cast<unsigned short>(bits >> 16);
  }
  __host__ __device__ operator float() const { return __builtin_bit_cast(float, static_cast<unsigned>(data) << 16); }
};

__host__ __device__ inline hip_bfloat16 operator+(hip_bfloat16 a, hip_bfloat16 b) {
  return hip_bfloat16(static_cast<float>(a) + static_cast<float>(b));
}
__host__ __device__ inline hip_bfloat16 operator-(hip_bfloat16 a, hip_bfloat16 b) {
  return hip_bfloat16(static_cast<float>(a) - static_cast<float>(b));
}
__host__ __device__ inline hip_bfloat16 operator*(hip_bfloat16 a, hip_bfloat16 b) {
  return hip_bfloat16(static_cast<float>(a) * static_cast<float>(b));
}
__host__ __device__ inline hip_bfloat16 operator/(hip_bfloat16 a, hip_bfloat16 b) {
  return hip_bfloat16(static_cast<float>(a) / static_cast<float>(b));
}
