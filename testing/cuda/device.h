// What the CUDA text of these kernels calls, on a CPU, with one CPU thread per thread of the block. Lane layouts of
// matrix instructions, swizzles and descriptors are those of the PTX ISA (9.7.15 mma, 9.7.16 wgmma), written from it,
// not from the generator. Instructions of a warp meet at a barrier, so a kernel needs as many of them in each lane as
// it would on a GPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

using uint = uint32_t;
using uchar = uint8_t;
struct Index3 {
  int x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx;

struct Warp {
  std::barrier<> meet{32};
  const void* pointer[32];
  uint32_t a[32][4], b[32][4];
};
struct Block {
  explicit Block(int threads) : meet(threads), warps(threads / 32) {}
  std::barrier<> meet;
  std::vector<Warp> warps;
};
inline thread_local Block* block;
inline thread_local uint8_t* shared_memory;
constexpr int kSharedBytes = 227 * 1024;
void meet(std::barrier<>& barrier);
inline void __syncthreads() { meet(block->meet); }
inline Warp& warp() { return block->warps[threadIdx.x / 32]; }
inline int lane() { return threadIdx.x % 32; }

inline void __syncwarp() { meet(warp().meet); }
int __shfl_sync(uint32_t, int value, int source);

// --- numbers ---
struct fp8_e4_t {
  uint8_t code;
};
struct fp8_e8_t {
  uint8_t code;
};
struct fp8_e5_t {
  uint8_t code;
};
#define FP8_VECTOR(name, element, n)        \
  struct __attribute__((aligned(n))) name { \
    element codes[n];                       \
  }
FP8_VECTOR(fp8_e4_2_t, fp8_e4_t, 2);
FP8_VECTOR(fp8_e4_4_t, fp8_e4_t, 4);
FP8_VECTOR(fp8_e4_8_t, fp8_e4_t, 8);
FP8_VECTOR(fp8_e4_16_t, fp8_e4_t, 16);
FP8_VECTOR(fp8_e5_2_t, fp8_e5_t, 2);
FP8_VECTOR(fp8_e5_4_t, fp8_e5_t, 4);
FP8_VECTOR(fp8_e5_8_t, fp8_e5_t, 8);
FP8_VECTOR(fp8_e5_16_t, fp8_e5_t, 16);
template <typename... Codes>
fp8_e4_16_t make_fp8_e4_16_t(Codes... codes) {
  const fp8_e4_t values[16] = {codes...};
  fp8_e4_16_t result;
  std::memcpy(&result, values, sizeof result);
  return result;
}
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint1 {
  uint x;
};
#define VECTOR_2(name, element)              \
  struct alignas(2 * sizeof(element)) name { \
    element x, y;                            \
  };                                         \
  inline name make_##name(element x, element y) { return {x, y}; }
VECTOR_2(uchar2, uint8_t)
VECTOR_2(ushort2, uint16_t)
VECTOR_2(int2, int)
VECTOR_2(uint2, uint)
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint1 make_uint1(uint x) { return {x}; }
using std::max;
using std::min;

// A binary float of so many exponent and mantissa bits; the largest exponent is infinity and NaN but in E4M3.
float decode(uint bits, int exponent_bits, int mantissa_bits, bool e4m3 = false);
inline float half_value(uint bits) { return decode(bits & 0xffff, 5, 10); }
uint half_bits(float value);  // of a value that a half holds
struct half_t {
  uint16_t bits;
  half_t() = default;
  explicit half_t(float value) : bits(half_bits(value)) {}
  explicit operator float() const { return half_value(bits); }
};
inline uint __pack_half2(half_t low, half_t high) { return low.bits | uint(high.bits) << 16; }
struct __half2 {
  uint bits;
};
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
uint __byte_perm(uint x, uint y, uint selector);

inline float bfloat16_value(uint bits) {
  const uint word = bits << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {  // ties to even
    uint word;
    std::memcpy(&word, &value, 4);
    bits = std::isnan(value) ? 0x7fff : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return bfloat16_value(bits); }
};
struct __nv_bfloat162 {
  bfloat16_t x, y;
};
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {bfloat16_t(value.x), bfloat16_t(value.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
using __nv_fp8x2_storage_t = uint16_t;
enum { __NV_SATFINITE, __NV_E4M3 };
uint e4m3_code(float value);  // the nearest, ties to even, the largest for what is larger
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 v, int, int) {
  return uint16_t(e4m3_code(v.x) | e4m3_code(v.y) << 8);
}
#define CUDART_NAN_F NAN
inline uint __pack_half2(bfloat16_t low, bfloat16_t high) { return low.bits | uint(high.bits) << 16; }
inline uint __pack_nv_bfloat162(bfloat16_t low, bfloat16_t high) { return low.bits | uint(high.bits) << 16; }

// Launches run one after the other here.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

void AtomicAdd(float* sum, float value);

inline int AtomicAddRet(int* sum, int value) { return std::atomic_ref<int>(*sum).fetch_add(value); }
inline void AtomicAdd(int* sum, int value) { AtomicAddRet(sum, value); }

namespace tl {
template <typename To, typename Byte>
To broadcast(Byte byte) {
  static_assert(sizeof(Byte) == 1);
  To result;
  std::memset(&result, *reinterpret_cast<uchar*>(&byte), sizeof(To));
  return result;
}
template <typename T>
T from_uint1(uint1 v) {
  T pair;
  std::memcpy(&pair, &v, 4);
  return pair;
}
inline uint1 to_uint1(__half2 v) { return {v.bits}; }
inline __half2 mul2(__half2 a, __half2 b) {
  uint bits = 0;
  for (int i = 0; i < 32; i += 16) bits |= half_bits(half_value(a.bits >> i) * half_value(b.bits >> i)) << i;
  return {bits};
}
inline __nv_bfloat162 mul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  auto product = [](bfloat16_t x, bfloat16_t y) { return bfloat16_t(bfloat16_value(x.bits) * bfloat16_value(y.bits)); };
  return {product(a.x, b.x), product(a.y, b.y)};
}
inline uint1 to_uint1(__nv_bfloat162 v) { return {uint(v.x.bits | v.y.bits << 16)}; }

// --- copies ---
template <int N>
void cp_async_gs(void* to, const void* from) {
  std::memcpy(to, from, N);
}
template <int N>
void cp_async_gs_conditional(void* to, const void* from, bool condition) {
  condition ? void(std::memcpy(to, from, N)) : void(std::memset(to, 0, N));
}
inline void cp_async_commit() {}
template <int>
void cp_async_wait() {}
inline void fence_proxy_async() {}

int warp_reduce_max(int value);
float warp_reduce_sum(float value);

// --- matrix instructions of a warp ---
template <int N>
void ldmatrix(const void* row, void* to) {
  Warp& w = warp();
  w.pointer[lane()] = row;
  meet(w.meet);
  for (int i = 0; i < N; ++i)
    std::memcpy(static_cast<char*>(to) + 4 * i,
                static_cast<const char*>(w.pointer[8 * i + lane() / 4]) + lane() % 4 * 4, 4);
  meet(w.meet);
}
inline void ptx_ldmatrix_x4(const void* row, void* to) { ldmatrix<4>(row, to); }
inline void ptx_ldmatrix_x2(const void* row, void* to) { ldmatrix<2>(row, to); }

enum class DataType { kFloat16, kBFloat16, kFloat8_e4m3, kFloat8_e5m2, kFloat32 };
constexpr bool is_wide(DataType type) { return type == DataType::kFloat16 || type == DataType::kBFloat16; }
template <DataType T>
float value(uint bits) {
  if (T == DataType::kFloat16) return half_value(bits);
  if (T == DataType::kBFloat16) return bfloat16_value(bits & 0xffff);
  static const std::vector<float> values = [] {
    std::vector<float> table(256);
    for (int code = 0; code < 256; ++code)
      table[code] = T == DataType::kFloat8_e4m3 ? decode(code, 4, 3, true) : decode(code, 5, 2);
    return table;
  }();
  return values[bits & 0xff];
}
template <DataType TA, DataType TB, DataType TC, int M, int N, int K, bool, bool>
void mma_sync(float* c, const unsigned* a, const unsigned* b) {
  static_assert(M == 16 && N == 8 && TC == DataType::kFloat32 && K == (is_wide(TA) ? 16 : 32));
  constexpr int per_word = K / 8, bits = 32 / per_word;
  Warp& w = warp();
  std::memcpy(w.a[lane()], a, 16);
  std::memcpy(w.b[lane()], b, 8);
  meet(w.meet);
  for (int e = 0; e < 4; ++e) {
    const int row = lane() / 4 + e / 2 * 8, col = lane() % 4 * 2 + e % 2;
    for (int k = 0; k < K; ++k) {
      const int quarter = k % (K / 2) / per_word, half = k / (K / 2), shift = k % per_word * bits;
      c[e] += value<TA>(w.a[row % 8 * 4 + quarter][row / 8 + half * 2] >> shift) *
              value<TB>(w.b[col * 4 + quarter][half] >> shift);
    }
  }
  meet(w.meet);
}

// --- matrix instructions of four warps, which read shared memory through descriptors ---
struct GmmaDescriptor {
  uint64_t bits;
  uint64_t operator+(int offset) const { return bits + offset; }
};
template <int Swizzle, int Leading, int Stride>
void initialize_wgmma_descriptor(GmmaDescriptor& descriptor, const void* start) {
  const uint64_t address = static_cast<const uint8_t*>(start) - shared_memory;
  descriptor.bits =
      (address >> 4 & 0x3fff) | uint64_t(Leading) << 16 | uint64_t(Stride) << 32 | uint64_t(Swizzle) << 62;
}
// One code of a K-major operand: rows of 128, 64 or 32 bytes, whose 16-byte parts are permuted by address bits 7 and
// up.
inline uint8_t element(uint64_t descriptor, int row, int k) {
  const int swizzle = descriptor >> 62, width = 256 >> swizzle, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint64_t address = ((descriptor & 0x3fff) << 4) + row / 8 * stride + row % 8 * width + k;
  address ^= (address >> 7 & (width / 16 - 1)) << 4;
  return shared_memory[address];
}
// A number of 16 bits of an operand whose rows lie side by side: panels of 64, 32 or 16 rows, of twice as many bytes for each k.
inline uint wide_element_of_columns(uint64_t descriptor, int row, int k) {
  const int swizzle = descriptor >> 62, width = 256 >> swizzle, panel_rows = width / 2;
  const int panel = (descriptor >> 16 & 0x3fff) << 4, eight_k = (descriptor >> 32 & 0x3fff) << 4;
  if (!swizzle) std::abort();
  uint64_t address = ((descriptor & 0x3fff) << 4) + row / panel_rows * panel + k / 8 * eight_k + k % 8 * width;
  address += row % panel_rows * 2;
  address ^= (address >> 7 & (width / 16 - 1)) << 4;
  return shared_memory[address] | shared_memory[address + 1] << 8;
}
template <DataType T, bool OfColumns>
uint code_of(uint64_t descriptor, int row, int k) {
  static_assert(is_wide(T) || !OfColumns);
  if (OfColumns) return wide_element_of_columns(descriptor, row, k);
  if (!is_wide(T)) return element(descriptor, row, k);
  return element(descriptor, row, 2 * k) | element(descriptor, row, 2 * k + 1) << 8;
}
template <DataType TA, DataType TB, DataType TC, int M, int N, int K, bool, bool Y, int, int, typename CodeOfA>
void wgmma(CodeOfA code_of_a, uint64_t b, uint32_t* c_bits, int accumulate) {
  static_assert(M == 64 && K == (is_wide(TA) ? 16 : 32) && TC == DataType::kFloat32);
  float* c = reinterpret_cast<float*>(c_bits);
  for (int e = 0; e < N / 2; ++e) {
    const int row = lane() / 4 + e / 2 % 2 * 8, col = e / 4 * 8 + lane() % 4 * 2 + e % 2;
    float sum = accumulate ? c[e] : 0.0f;
    for (int k = 0; k < K; ++k) sum += value<TA>(code_of_a(row, k)) * value<TB>(code_of<TB, Y>(b, col, k));
    c[e] = sum;
  }
}
template <DataType TA, DataType TB, DataType TC, int M, int N, int K, bool X, bool Y, int S, int T>
void wgmma_ss(uint64_t a, uint64_t b, uint32_t* c, int accumulate) {
  const int first = threadIdx.x % 128 / 32 * 16;
  wgmma<TA, TB, TC, M, N, K, X, Y, S, T>([=](int row, int k) { return code_of<TA, X>(a, first + row, k); }, b, c,
                                         accumulate);
}
template <DataType TA, DataType TB, DataType TC, int M, int N, int K, bool X, bool Y, int S, int T>
void wgmma_rs(const uint32_t* a, uint64_t b, uint32_t* c, int accumulate) {
  Warp& w = warp();
  std::memcpy(w.a[lane()], a, 16);
  meet(w.meet);
  constexpr int per_word = K / 8, bits = 32 / per_word;
  auto code_of_a = [&](int row, int k) {
    return w.a[row % 8 * 4 + k % (K / 2) / per_word][row / 8 + k / (K / 2) * 2] >> k % per_word * bits;
  };
  wgmma<TA, TB, TC, M, N, K, X, Y, S, T>(code_of_a, b, c, accumulate);
  meet(w.meet);
}
template <typename T>
void warpgroup_fence_operand(T*, int) {}
inline void warpgroup_arrive() { meet(warp().meet); }  // .sync.aligned: the lanes of a warp meet
inline void warpgroup_commit_batch() {}
template <int>
void warpgroup_wait() {
  meet(warp().meet);
}
}  // namespace tl

// --- a program ---
// Its tensors, which come from files of their names and go back to them, and what it runs: a function that launches
// kernels.
struct Tensor {
  const char* name;
  size_t size;
  char* bytes = nullptr;
  char* data() const { return bytes; }
};
void launch(int grid_x, int grid_y, int threads, void (*kernel)());
int run_on_files(Tensor* tensors, int count, void (*run)());
