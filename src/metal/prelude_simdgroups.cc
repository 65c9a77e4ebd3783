/*!
 * \file prelude_simdgroups.cc
 * \brief What the lanes of a simdgroup exchange: shuffles, reductions, scans.
 *
 * How a text is written: see prelude_table.h.
 */
#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {

std::vector<Helper> SimdgroupHelpers() {
  return {
      // ---- lanes of a simdgroup --------------------------------------------------------------------------------
      {"lane_xor", {}, R"(
// simd_shuffle_xor for the types that it lacks too.
template <typename T>
inline T lane_xor(T x, ushort mask) { return simd_shuffle_xor(x, mask); }
inline bool lane_xor(bool x, ushort mask) { return simd_shuffle_xor(ushort(x), mask) != 0; }
inline bfloat lane_xor(bfloat x, ushort mask) { return as_type<bfloat>(simd_shuffle_xor(as_type<ushort>(x), mask)); }
inline long lane_xor(long x, ushort mask) { return as_type<long>(simd_shuffle_xor(as_type<uint2>(x), mask)); }
inline ulong lane_xor(ulong x, ushort mask) { return as_type<ulong>(simd_shuffle_xor(as_type<uint2>(x), mask)); }
)"},
      {"lane_up", {}, R"(
// simd_shuffle_up for the types that it lacks too.
template <typename T>
inline T lane_up(T x, ushort delta) { return simd_shuffle_up(x, delta); }
inline bool lane_up(bool x, ushort delta) { return simd_shuffle_up(ushort(x), delta) != 0; }
inline bfloat lane_up(bfloat x, ushort delta) { return as_type<bfloat>(simd_shuffle_up(as_type<ushort>(x), delta)); }
inline long lane_up(long x, ushort delta) { return as_type<long>(simd_shuffle_up(as_type<uint2>(x), delta)); }
inline ulong lane_up(ulong x, ushort delta) { return as_type<ulong>(simd_shuffle_up(as_type<uint2>(x), delta)); }
)"},
      {"lane_at", {}, R"(
// simd_shuffle for the types that it lacks too.
template <typename T>
inline T lane_at(T x, ushort lane) { return simd_shuffle(x, lane); }
inline bool lane_at(bool x, ushort lane) { return simd_shuffle(ushort(x), lane) != 0; }
inline bfloat lane_at(bfloat x, ushort lane) { return as_type<bfloat>(simd_shuffle(as_type<ushort>(x), lane)); }
inline long lane_at(long x, ushort lane) { return as_type<long>(simd_shuffle(as_type<uint2>(x), lane)); }
inline ulong lane_at(ulong x, ushort lane) { return as_type<ulong>(simd_shuffle(as_type<uint2>(x), lane)); }
)"},
      {"SumOp", {}, R"(
struct SumOp {
  template <typename T>
  T operator()(T a, T b) const { return T(a + b); }
};
)"},
      {"MaxOp", {}, R"(
struct MaxOp {
  template <typename T>
  T operator()(T a, T b) const { return max(a, b); }
  bfloat operator()(bfloat a, bfloat b) const { return bfloat(max(float(a), float(b))); }
};
)"},
      {"MinOp", {}, R"(
struct MinOp {
  template <typename T>
  T operator()(T a, T b) const { return min(a, b); }
  bfloat operator()(bfloat a, bfloat b) const { return bfloat(min(float(a), float(b))); }
};
)"},
      {"MaxOpNan", {"max_nan"}, R"(
struct MaxOpNan {
  template <typename T>
  T operator()(T a, T b) const { return T(max_nan(float(a), float(b))); }
};
)"},
      {"MinOpNan", {"min_nan"}, R"(
struct MinOpNan {
  template <typename T>
  T operator()(T a, T b) const { return T(min_nan(float(a), float(b))); }
};
)"},
      {"BitAndOp", {}, R"(
struct BitAndOp {
  template <typename T>
  T operator()(T a, T b) const { return T(a & b); }
};
)"},
      {"BitOrOp", {}, R"(
struct BitOrOp {
  template <typename T>
  T operator()(T a, T b) const { return T(a | b); }
};
)"},
      {"BitXorOp", {}, R"(
struct BitXorOp {
  template <typename T>
  T operator()(T a, T b) const { return T(a ^ b); }
};
)"},
      {"all_reduce", {"lane_xor"}, R"(
// Combine the values of the threads whose indices differ in the bits from SCALE up to THREADS; each gets the same bits.
template <typename Op, int THREADS, int SCALE, typename T>
inline T all_reduce(T x) {
  for (int mask = THREADS / 2; mask >= SCALE; mask /= 2) {
    x = Op()(x, lane_xor(x, ushort(mask)));
  }
  return x;
}
)"},
      {"all_reduce_shared", {"all_reduce"}, R"(
// The same over several simdgroups, numbered from thread FIRST: lanes first where FIRST is a simdgroup's first, then one value
// a thread through threadgroup memory. Every thread of the threadgroup must arrive, whether it takes part or not. Values are
// combined in one order for all, so that replicas agree to the bit.
template <typename Op, int THREADS, int SCALE, int FIRST, int BATCH, int STRIDE, typename T>
inline void all_reduce_shared(thread T* x, threadgroup T* workspace, uint thread_index, bool takes_part = true) {
  constexpr int lanes = FIRST % 32 == 0 ? 32 : 1;
  constexpr int step = SCALE > lanes ? SCALE : lanes;
  const int self = int(thread_index) - FIRST;
  const int base = self & ~(THREADS - step);
  for (int b = 0; takes_part && b < BATCH; ++b) {
    workspace[b * STRIDE + self] = all_reduce<Op, lanes, SCALE>(x[b]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int b = 0; takes_part && b < BATCH; ++b) {
    T sum = workspace[b * STRIDE + base];
    for (int other = step; other < THREADS; other += step) {
      sum = Op()(sum, workspace[b * STRIDE + base + other]);
    }
    x[b] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
template <typename Op, int THREADS, int SCALE, int FIRST, typename T>
inline T all_reduce_shared(T x, threadgroup T* workspace, uint thread_index, bool takes_part = true) {
  all_reduce_shared<Op, THREADS, SCALE, FIRST, 1, 0>(&x, workspace, thread_index, takes_part);
  return x;
}
)"},
      {"all_reduce_batch", {"all_reduce"}, R"(
template <typename Op, int THREADS, int SCALE, int BATCH, typename T>
inline void all_reduce_batch(thread T* x) {
  for (int b = 0; b < BATCH; ++b) {
    x[b] = all_reduce<Op, THREADS, SCALE>(x[b]);
  }
}
)"},
      {"inclusive_scan", {"lane_up", "lane_at"}, R"(
// Inclusive scan along lines of `length` elements, one simdgroup a line, 32 elements at a time.
template <typename Op, int THREADS, bool REVERSE, typename T>
inline void inclusive_scan(threadgroup const T* src, threadgroup T* dst, int lines, int length, int src_line,
                           int src_step, int dst_line, int dst_step, uint thread_index) {
  const int lane = int(thread_index % 32);
  for (int line = int(thread_index / 32); line < lines; line += THREADS / 32) {
    T carry = T(0);
    for (int begin = 0; begin < length; begin += 32) {
      const int i = begin + lane;
      const int at = REVERSE ? length - 1 - i : i;
      T x = i < length ? src[line * src_line + at * src_step] : T(0);
      for (int delta = 1; delta < 32; delta *= 2) {
        T left = lane_up(x, ushort(delta));
        x = lane >= delta ? Op()(left, x) : x;
      }
      x = begin > 0 ? Op()(carry, x) : x;
      if (i < length) {
        dst[line * dst_line + at * dst_step] = x;
      }
      carry = lane_at(x, ushort(31));
    }
  }
}
)"},
  };
}

}  // namespace metal
}  // namespace tilelang_ext
