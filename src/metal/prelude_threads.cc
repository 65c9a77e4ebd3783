/*!
 * \file prelude_threads.cc
 * \brief Bits and votes of threads, atomics that Metal lacks, and the order of threadgroups.
 *
 * How a text is written: see prelude_table.h.
 */
#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {

std::vector<Helper> ThreadHelpers() {
  return {
      // ---- bits and votes --------------------------------------------------------------------------------------
      {"find_first_set", {}, R"(
// The place of the lowest bit, counted from one; 0 without a bit.
inline int find_first_set(int x) { return x == 0 ? 0 : int(ctz(uint(x))) + 1; }
inline int find_first_set(uint x) { return find_first_set(int(x)); }
)"},
      {"find_nth_set", {}, R"(
// The place of the n-th bit of a mask from `base` on, upwards for n > 0, downwards for n < 0, at `base` for 0; or all ones.
inline uint find_nth_set(uint mask, uint base, int n) {
  if (n == 0) return base < 32u && ((mask >> base) & 1u) ? base : 0xffffffffu;
  for (int i = int(base); i >= 0 && i < 32; i += n > 0 ? 1 : -1) {
    if ((mask >> uint(i)) & 1u) n += n > 0 ? -1 : 1;
    if (n == 0) return uint(i);
  }
  return 0xffffffffu;
}
)"},
      {"match_any", {}, R"(
// The lanes of a mask that run and hold the same bits, bit by bit.
inline uint match_bits(uint mask, uint x) {
  for (uint i = 0; i < 32; ++i) {
    const bool bit = (x >> i) & 1u;
    const uint lanes = uint(ulong(simd_ballot(bit)));
    mask &= bit ? lanes : ~lanes;
  }
  return mask;
}
template <typename T>
inline uint match_any(uint mask, T x) {
  return match_bits(mask & uint(ulong(simd_ballot(true))), uint(x));
}
inline uint match_any(uint mask, ulong x) { return match_bits(match_any(mask, uint(x)), uint(x >> 32)); }
inline uint match_any(uint mask, long x) { return match_any(mask, ulong(x)); }
inline uint match_any(uint mask, float x) { return match_any(mask, as_type<uint>(x)); }
inline uint match_any(uint mask, half x) { return match_any(mask, as_type<ushort>(x)); }
)"},
      {"match_all", {"match_any"}, R"(
template <typename T>
inline uint match_all(uint mask, T x) {
  mask &= uint(ulong(simd_ballot(true)));
  return match_any(mask, x) == mask ? mask : 0u;
}
)"},
      {"group_count", {}, R"(
// How many threads of N simdgroups vote yes; a barrier of the threadgroup.
template <int N>
inline int group_count(bool vote, threadgroup uint* votes, uint lane, uint simdgroup) {
  const uint here = popcount(uint(ulong(simd_ballot(vote))));
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  if (lane == 0) votes[simdgroup] = here;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint total = 0;
  for (int i = 0; i < N; ++i) total += votes[i];
  return int(total);
}
)"},
      {"group_all", {"group_count"}, R"(
template <int N>
inline int group_all(bool vote, threadgroup uint* votes, uint lane, uint simdgroup) {
  return int(group_count<N>(!vote, votes, lane, simdgroup) == 0);
}
)"},
      {"group_any", {"group_count"}, R"(
template <int N>
inline int group_any(bool vote, threadgroup uint* votes, uint lane, uint simdgroup) {
  return int(group_count<N>(vote, votes, lane, simdgroup) != 0);
}
)"},
      {"any_of", {}, R"(
template <typename Pointer>
inline bool any_of(Pointer p, int n) {
  bool found = false;
  for (int i = 0; i < n; ++i) found = found || bool(p[i]);
  return found;
}
)"},
      {"all_of", {}, R"(
template <typename Pointer>
inline bool all_of(Pointer p, int n) {
  bool found = true;
  for (int i = 0; i < n; ++i) found = found && bool(p[i]);
  return found;
}
)"},
      {"DP4A", {}, R"(
// The dot product of four 8-bit integers each, added to a sum.
template <typename A, typename B, typename C>
inline void DP4A(A a, B b, C c) {
  *c += int(a[0]) * int(b[0]) + int(a[1]) * int(b[1]) + int(a[2]) * int(b[2]) + int(a[3]) * int(b[3]);
}
)"},

      // ---- atomics that Metal lacks ----------------------------------------------------------------------------
      {"atomic_add_pair", {}, R"(
// Two 16-bit floats of one word, each rounded once.
inline void atomic_add_pair(@ half* p, float2 value) {
  @ atomic_uint* word = (@ atomic_uint*)p;
  uint old = atomic_load_explicit(word, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(word, &old, as_type<uint>(half2(float2(as_type<half2>(old)) + value)),
                                                memory_order_relaxed, memory_order_relaxed)) {
  }
}
inline void atomic_add_pair(@ bfloat* p, float2 value) {
  @ atomic_uint* word = (@ atomic_uint*)p;
  uint old = atomic_load_explicit(word, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(word, &old, as_type<uint>(bfloat2(float2(as_type<bfloat2>(old)) + value)),
                                                memory_order_relaxed, memory_order_relaxed)) {
  }
}
)"},
      {"atomic_update_half", {}, R"(
// One 16-bit float of its 32-bit word, which the other half of the word survives. Arrays start at a word.
template <typename Op, typename T>
inline T atomic_update_half(@ T* array, long i, T value) {
  @ atomic_uint* word = (@ atomic_uint*)(array + (i & ~1l));
  const uint shift = 16 * uint(i & 1);
  uint old = atomic_load_explicit(word, memory_order_relaxed), updated;
  T before;
  do {
    before = as_type<T>(ushort(old >> shift));
    updated = (old & (0xffff0000u >> shift)) | (uint(as_type<ushort>(Op()(before, value))) << shift);
  } while (!atomic_compare_exchange_weak_explicit(word, &old, updated, memory_order_relaxed, memory_order_relaxed));
  return before;
}
)"},
      {"atomic_add_float", {}, R"(
// Metal adds floats atomically in device memory only.
inline float atomic_add_float(device float* p, float value) {
  return atomic_fetch_add_explicit((device atomic_float*)p, value, memory_order_relaxed);
}
inline float atomic_add_float(threadgroup float* p, float value) {
  threadgroup atomic_uint* word = (threadgroup atomic_uint*)p;
  uint old = atomic_load_explicit(word, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(word, &old, as_type<uint>(as_type<float>(old) + value),
                                                memory_order_relaxed, memory_order_relaxed)) {
  }
  return as_type<float>(old);
}
)"},
      {"atomic_max_float", {}, R"(
inline float atomic_max_float(@ float* p, float value) {
  @ atomic_uint* word = (@ atomic_uint*)p;
  uint old = atomic_load_explicit(word, memory_order_relaxed);
  while (as_type<float>(old) < value &&
         !atomic_compare_exchange_weak_explicit(word, &old, as_type<uint>(value), memory_order_relaxed,
                                                memory_order_relaxed)) {
  }
  return as_type<float>(old);
}
)"},
      {"atomic_min_float", {}, R"(
inline float atomic_min_float(@ float* p, float value) {
  @ atomic_uint* word = (@ atomic_uint*)p;
  uint old = atomic_load_explicit(word, memory_order_relaxed);
  while (value < as_type<float>(old) &&
         !atomic_compare_exchange_weak_explicit(word, &old, as_type<uint>(value), memory_order_relaxed,
                                                memory_order_relaxed)) {
  }
  return as_type<float>(old);
}
)"},

      // ---- order of the threadgroups ---------------------------------------------------------------------------
      {"swizzle_row", {}, R"(
// Walk the grid in panels of PANEL rows, each panel column by column, every second panel backwards.
template <uint PANEL>
inline uint2 swizzle_row(uint3 block, uint3 grid) {
  const uint index = block.x + block.y * grid.x;
  const uint panel = index / (PANEL * grid.x);
  const uint offset = index % (PANEL * grid.x);
  const uint rows = min(PANEL, grid.y - panel * PANEL);
  const uint column = offset / rows;
  return uint2((panel & 1) != 0 ? grid.x - 1 - column : column, offset % rows + panel * PANEL);
}
)"},
      {"swizzle_column", {"swizzle_row"}, R"(
// The same in panels of PANEL columns.
template <uint PANEL>
inline uint2 swizzle_column(uint3 block, uint3 grid) {
  const uint index = block.x + block.y * grid.x;
  const uint panel = index / (PANEL * grid.y);
  const uint offset = index % (PANEL * grid.y);
  const uint columns = min(PANEL, grid.x - panel * PANEL);
  const uint row = offset / columns;
  return uint2(offset % columns + panel * PANEL, (panel & 1) != 0 ? grid.y - 1 - row : row);
}
)"},
  };
}

}  // namespace metal
}  // namespace tilelang_ext
