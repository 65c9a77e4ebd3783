"""Metal texts that the simulator's tests run, and plant faults in."""

import torch

from tilelang_ext.simulator import execute_msl

HEADER = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
"""

VECTOR_ADD = (
    HEADER
    + """
struct Params { int n[2]; float scale[2]; };
kernel void add(const device float* a [[buffer(0)]], const device float* b [[buffer(1)]],
                device float* c [[buffer(2)]], constant Params& p [[buffer(3)]],
                uint i [[thread_position_in_grid]]) {
  if (int(i) < p.n[0]) {
    c[i] = a[i] + p.scale[0] * b[i];
  }
}
"""
)

# C (64, 64) float32 = A (64, K) B (K, 64) float16, one threadgroup of 4 simdgroups, 32x32 of C each.
GEMM_K = 64
GEMM = (
    HEADER
    + """
[[kernel, max_total_threads_per_threadgroup(128)]] void gemm(
    const device half* A [[buffer(0)]], const device half* B [[buffer(1)]], device float* C [[buffer(2)]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]]) {
  alignas(16) threadgroup half a_s[64 * 16];
  alignas(16) threadgroup half b_s[16 * 64];
  simdgroup_matrix<float, 8, 8> c[16];
  simdgroup_matrix<half, 8, 8> a[4], b[4];
  const int row = (simd >> 1) * 32, column = (simd & 1) * 32;
  for (int i = 0; i < 16; ++i) c[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k = 0; k < 64; k += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // top
    const device half4* a_row = (const device half4*)(A + (thread_index / 2) * 64 + k + thread_index % 2 * 8);
    *(threadgroup half4*)(a_s + thread_index * 8) = a_row[0];
    *(threadgroup half4*)(a_s + thread_index * 8 + 4) = a_row[1];
    for (int i = 0; i < 8; ++i) b_s[thread_index + i * 128] = B[k * 64 + thread_index + i * 128];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles
    for (int kk = 0; kk < 16; kk += 8) {
      for (int i = 0; i < 4; ++i) simdgroup_load(a[i], a_s + (row + i * 8) * 16 + kk, 16);
      for (int j = 0; j < 4; ++j) simdgroup_load(b[j], b_s + kk * 64 + column + j * 8, 64);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          simdgroup_multiply_accumulate(c[i * 4 + j], a[i], b[j], c[i * 4 + j]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    const int q = lane >> 2, r = (q & 4) | ((lane >> 1) & 3), s = (q & 2) * 2 + (lane & 1) * 2;
    device float* place = C + (row + i / 4 * 8 + r) * 64 + column + i % 4 * 8 + s;
    *(device float2*)place = reinterpret_cast<thread vec<float, 2>&>(c[i].thread_elements());
  }
}
"""
)

# Sum of each row of x (rows, 256) by 256 threads: shuffles inside a simdgroup, threadgroup memory across.
ROW_SUM = (
    HEADER
    + """
template <typename T>
METAL_FUNC T fold(T x, ushort width) {
  for (ushort d = width / 2; d > 0; d /= 2) x += simd_shuffle_xor(x, d);
  return x;
}
kernel void row_sum(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                    uint3 group [[threadgroup_position_in_grid]], ushort3 thread_position [[thread_position_in_threadgroup]],
                    ushort lane [[thread_index_in_simdgroup]], ushort simd [[simdgroup_index_in_threadgroup]]) {
  threadgroup float partial[8];
  const float own = fold(x[group.x * 256 + thread_position.x], 32);
  if (lane == 0) partial[simd] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
  for (int i = 0; i < 8; ++i) total += partial[i];
  if (thread_position.x == 0) y[group.x] = total;
}
"""
)

# Softmax of each row of x (rows, 128) by one simdgroup, one float4 per lane.
SOFTMAX = (
    HEADER
    + """
kernel void softmax(const device float4* x [[buffer(0)]], device float4* y [[buffer(1)]],
                    uint row [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  float4 v = x[row * 32 + lane];
  const float top = simd_max(max(max(v.x, v.y), max(v.z, v.w)));
  v = fast::exp2((v - top) * M_LOG2E_F);
  v.xy = v.xy * 1.0f;
  const float sum = simd_sum(v.x + v.y + v.z + v.w);
  y[row * 32 + lane] = v / sum;
}
"""
)

# Histogram of x into 16 bins through threadgroup atomics, and its sum through device atomics.
HISTOGRAM = (
    HEADER
    + """
kernel void histogram(const device uint* x [[buffer(0)]], device atomic_uint* bins [[buffer(1)]],
                      device atomic_float* total [[buffer(2)]], uint i [[thread_position_in_grid]],
                      uint t [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint local[16];
  if (t < 16) atomic_store_explicit(&local[t], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&local[x[i] & 15u], 1u, memory_order_relaxed);
  atomic_fetch_add_explicit(total, float(x[i]), memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t < 16) atomic_fetch_add_explicit(&bins[t], atomic_load_explicit(&local[t], memory_order_relaxed), memory_order_relaxed);
}
"""
)

# One lane's value travels to its neighbour through threadgroup memory, inside a simdgroup.
EXCHANGE = (
    HEADER
    + """
kernel void exchange(device int* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup int box[32];
  box[lane] = lane * 3;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[lane] = box[lane ^ 1];
}
"""
)

# C (M, N) float32 += A (M, K) B (K, N) half by one simdgroup through Metal 4's matmul2d; TA and TB: stored transposed.
MATMUL2D = (
    """#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
"""
    + HEADER
    + """
constant constexpr int M = @M@, N = @N@, K = @K@;
constant constexpr bool TA = @TA@, TB = @TB@;
template <int columns, typename T, typename Tensor>
METAL_FUNC void each(const device T* memory, thread Tensor& tensor, int count) {
  const ushort lane = __metal_get_thread_index_in_simdgroup(ushort());
  const ushort q = lane >> 2, r = (q & 4) | ((lane >> 1) & 3), c = ((q & 2) | (lane & 1)) * 4;
  for (int i = 0; i < count; ++i) {
    const int fragment = i / 8, row = fragment / (columns / 16) * 16, column = fragment % (columns / 16) * 16;
    tensor[i] = memory[(row + r + i % 8 / 4 * 8) * columns + column + c + i % 4];
  }
}
kernel void matmul(const device half* A [[buffer(0)]], const device half* B [[buffer(1)]], device float* C [[buffer(2)]],
                   ushort lane [[thread_index_in_simdgroup]]) {
  constexpr auto desc = mpp::tensor_ops::matmul2d_descriptor(
      M, N, K, TA, TB, true, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<desc, metal::execution_simdgroup> op;
  auto a = op.get_left_input_cooperative_tensor<half, half, float>();
  auto b = op.get_right_input_cooperative_tensor<half, half, float>();
  auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
  each<TA ? M : K>(A, a, M * K / 32);
  each<TB ? K : N>(B, b, K * N / 32);
  each<N>(C, c, M * N / 32);
  op.run(a, b, c);
  const ushort q = lane >> 2, r = (q & 4) | ((lane >> 1) & 3), s = ((q & 2) | (lane & 1)) * 4;
  for (int i = 0; i < M * N / 32; i += 4) {
    const int fragment = i / 8, row = fragment / (N / 16) * 16 + i % 8 / 4 * 8, column = fragment % (N / 16) * 16;
    *(device float4*)(C + (row + r) * N + column + s) = *(thread float4*)(&c[i]);
  }
}
"""
)


def plant(source: str, old: str, new: str) -> str:
    """The text with one place changed; the place must exist once."""
    assert source.count(old) == 1, (old, source.count(old))
    return source.replace(old, new)


def line_of(source: str, fragment: str) -> int:
    """Number of the only line that holds `fragment`."""
    lines = [i for i, line in enumerate(source.splitlines(), 1) if fragment in line]
    assert len(lines) == 1, (fragment, lines)
    return lines[0]


def run_gemm(source=GEMM, **options):
    """Report, C and float64 reference of one launch."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 64, generator=generator).half()
    b = torch.randn(64, 64, generator=generator).half()
    c = torch.full((64, 64), float("nan"))
    report = execute_msl(source, "gemm", [a, b, c], grid=(1, 1, 1), threads=(128, 1, 1), **options)
    return report, c, a.double() @ b.double()
