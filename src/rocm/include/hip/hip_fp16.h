// Stand-in for ROCm's <hip/hip_fp16.h>: the names that TileLang's HIP text uses, no more. Used where ROCm is not
// installed.
#pragma once

#include <hip/hip_runtime.h>

struct __half {
  _Float16 data;
  __half() = default;
  __host__ __device__ __half(float value) : data(static_cast<_Float16>(value)) {}
  __host__ __device__ __half(_Float16 value) : data(value) {}
  __host__ __device__ operator _Float16() const { return data; }
};

struct __half2 {
  _Float16 x, y;
};

using half = __half;
using half2 = __half2;

__device__ inline __half __float2half(float value) { return __half(value); }
__device__ inline __half __float2half_rn(float value) { return __half(value); }
__device__ inline float __half2float(__half value) { return static_cast<float>(value.data); }
