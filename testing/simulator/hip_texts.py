"""HIP texts that the simulator's tests run, and plant faults in."""

from pathlib import Path

import tilelang
import torch

from tilelang_ext.simulator import execute_hip

TEMPLATES = Path(tilelang.__file__).parent / "src"
HEADER = """#include <hip/hip_runtime.h>
#include <tl_templates/hip/copy.h>
#include <tl_templates/hip/reduce.h>
"""

# C (64, 64) float32 = A (64, K) B (64, K)^T float16, one group of 2 waves, 32 rows of C each.
GEMM = (
    HEADER
    + """
typedef __attribute__((__vector_size__(4 * sizeof(_Float16)))) _Float16 half_x4;
typedef __attribute__((__vector_size__(4 * sizeof(float)))) float float_x4;
extern "C" __global__ void __launch_bounds__(128) gemm(const _Float16* __restrict__ A, const _Float16* __restrict__ B,
                                                       float* __restrict__ C, int K) {
  __shared__ __align__(16) _Float16 a_s[64 * 32];
  __shared__ __align__(16) _Float16 b_s[64 * 32];
  const int lane = threadIdx.x % 64, wave = threadIdx.x / 64;
  float_x4 c[2][4] = {};
  for (int k = 0; k < K; k += 32) {
    __syncthreads();  // top
    for (int i = 0; i < 2; ++i) {
      const int row = threadIdx.x / 4 + i * 32, column = threadIdx.x % 4 * 8;
      *(uint4*)(a_s + row * 32 + column) = *(const uint4*)(A + row * K + k + column);
      *(uint4*)(b_s + row * 32 + column) = *(const uint4*)(B + row * K + k + column);
    }
    __syncthreads();  // tiles
    for (int kk = 0; kk < 32; kk += 16) {
      half_x4 a[2], b[4];
      for (int i = 0; i < 2; ++i) a[i] = *(half_x4*)(a_s + (wave * 32 + i * 16 + lane % 16) * 32 + kk + lane / 16 * 4);
      for (int j = 0; j < 4; ++j) b[j] = *(half_x4*)(b_s + (j * 16 + lane % 16) * 32 + kk + lane / 16 * 4);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          c[i][j] = __builtin_amdgcn_mfma_f32_16x16x16f16(a[i], b[j], c[i][j], 0, 0, 0);
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int e = 0; e < 4; ++e)
        C[(wave * 32 + i * 16 + lane / 16 * 4 + e) * 64 + j * 16 + lane % 16] = c[i][j][e];
}
"""
)

# A lane's value travels to its neighbour through LDS, inside a wave.
EXCHANGE = (
    HEADER
    + """
extern "C" __global__ void exchange(int* y) {
  __shared__ int box[64];
  const int lane = threadIdx.x;
  box[lane] = lane * 3;
  __builtin_amdgcn_wave_barrier();
  y[lane] = box[lane ^ 1];
}
"""
)

# Loads straight to LDS, and what waits for them.
ASYNC = (
    HEADER
    + """
extern "C" __global__ void copy(const int* x, int* y) {
  __shared__ int box[128];
  tl::cp_async_gs<4>(box + threadIdx.x / 64 * 64 + threadIdx.x % 64, x + threadIdx.x);
  tl::cp_async_commit();
  tl::cp_async_wait<0>();
  tl::wave_barrier();
  y[threadIdx.x] = box[threadIdx.x ^ 64];
}
"""
)

# Sum over each row of x (groups, 256) by 256 threads: LDS across waves, shuffles inside.
ROW_SUM = (
    HEADER
    + """
extern "C" __global__ void row_sum(const float* x, float* y, float bias) {
  __shared__ float work[256];
  const float own = x[blockIdx.x * blockDim.x + threadIdx.x];
  const float total = tl::AllReduce<tl::SumOp, 256, 1>::run(own, work);
  if (threadIdx.x == 0) y[blockIdx.x] = total + bias;
}
"""
)

# C's registers of each thread, and a running sum, by templates alone.
TEMPLATE_GEMM = (
    HEADER
    + """
#include <tl_templates/hip/gemm.h>
#include <tl_templates/hip/scan.h>
#include <tl_templates/hip/hip_fp8.h>
#include <tl_templates/hip/hip_fp4.h>
#include <tl_templates/hip/debug.h>
using Compute = tl::GemmTensorOp<64, 64, 32, 2, 1, false, true, false, 1, half_t, half_t, float>;
extern "C" __global__ void gemm(const half_t* A, const half_t* B, float* C, float* sums) {
  __shared__ half_t a_s[64 * 32], b_s[64 * 32];
  __shared__ float ones[128], scanned[128];
  for (int i = threadIdx.x; i < 64 * 32; i += 128) {
    const int place = Compute::make_swizzle_layout<32, 2>(i / 32, i % 32);
    a_s[place] = A[i];
    b_s[place] = B[i];
  }
  ones[threadIdx.x] = 1;
  __syncthreads();
  float c[32] = {};
  tl::gemm_ss<64, 64, 32, 2, 1, false, true, false, 1>(a_s, b_s, c);
  for (int i = 0; i < 32; ++i) C[threadIdx.x * 32 + i] = c[i];
  tl::CumSum1D<128>::run<float>(ones, scanned, 128);
  __syncthreads();
  sums[threadIdx.x] = scanned[threadIdx.x];
  debug_print_var("sum", scanned[0]);
}
"""
)

# Histogram of x into 16 bins through LDS atomics, and its sum and maximum through device atomics.
HISTOGRAM = (
    HEADER
    + """
extern "C" __global__ void histogram(const unsigned* x, unsigned* bins, float* total, unsigned* most) {
  __shared__ unsigned local[16];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  AtomicAdd(&local[x[i] & 15], 1u);
  AtomicAdd(total, float(x[i]));
  AtomicMax(most, x[i]);
  __syncthreads();
  if (threadIdx.x < 16) AtomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}
"""
)


def run(source, entry, arguments, *, arch="gfx942", grid=1, threads=64, **options):
    return execute_hip(
        source,
        entry,
        arguments,
        arch=arch,
        grid=(grid, 1, 1),
        threads=(threads, 1, 1),
        include_directories=(TEMPLATES,),
        **options,
    )


def run_gemm(source=GEMM, *, K=64, **options):
    """Report, C and float64 reference of one launch."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, K, generator=generator).half()
    b = torch.randn(64, K, generator=generator).half()
    c = torch.full((64, 64), float("nan"))
    report = run(source, "gemm", [a, b, c, K], threads=128, **options)
    return report, c, a.double() @ b.double().T


def run_exchange(source=EXCHANGE, **options):
    y = torch.zeros(64, dtype=torch.int32)
    return run(source, "exchange", [y], **options), y
