/*!
 * \file prelude.cc
 * \brief The table of Metal helpers.
 *
 * In a text, `$` stands for the lane count as Metal spells it ("", "2", "3", "4"): one text defines the overloads of
 * every width that is used. `@` makes two overloads, one for `device` and one for `threadgroup` pointers.
 * Number formats: see docs and tilelang_ext/formats.py; every table below is tested for all codes.
 */
#include "prelude.h"

#include <tvm/ffi/error.h>

#include <vector>

namespace tilelang_ext {
namespace metal {
namespace {

struct Helper {
  const char* name;
  std::vector<const char*> needs;
  const char* text;
};

const char* const kPrints = R"(
#ifndef TL_PRINTS
#error "T.print: a kernel on a Mac cannot print; run it with tilelang_ext.simulate, or take T.print out"
#endif
)";

// Order matters: a row may need earlier rows only.
const std::vector<Helper>& Table() {
  static const std::vector<Helper> table = {
      {"wide", {}, R"(
// A vector of more than four lanes: N chunks.
template <typename T, int N>
struct wide {
  T v[N];
};
)"},

      // ---- words that the simulator defines --------------------------------------------------------------------
      {"TL_OUTSIDE", {}, R"(
#ifndef TL_OUTSIDE  // the simulator counts; anywhere else it is the value alone
#define TL_OUTSIDE(tensor, accesses, shape, lanes, ...) (__VA_ARGS__)
#endif
)"},
      {"TL_ASSERT", {}, R"(
#ifndef TL_ASSERT
#error "T.device_assert: a kernel on a Mac cannot report; run it with tilelang_ext.simulate, or take the assertion out"
#endif
)"},
      {"debug_print_var", {}, kPrints},
      {"debug_print_buffer_value", {}, kPrints},
      {"debug_print_msg", {}, kPrints},

      // ---- tests and math that Metal lacks, or that fast math breaks -------------------------------------------
      {"is_nan", {}, R"(
inline bool$ is_nan(float$ x) { return (as_type<uint$>(x) & uint$(0x7fffffff)) > uint$(0x7f800000); }
)"},
      {"max_nan", {"is_nan"}, R"(
inline float$ max_nan(float$ a, float$ b) { return select(select(max(a, b), b, is_nan(b)), a, is_nan(a)); }
)"},
      {"min_nan", {"is_nan"}, R"(
inline float$ min_nan(float$ a, float$ b) { return select(select(min(a, b), b, is_nan(b)), a, is_nan(a)); }
)"},
      {"erf", {}, R"(
// x P(x^2) up to 1, 1 - exp(Q(x)) above.
inline float$ erf(float$ x) {
  float$ t = min(fabs(x), float$(4.0f));
  float$ s = t * t;
  float$ p = float$(1.059528005e-06f);
  p = fma(p, s, float$(-1.391170223e-05f));
  p = fma(p, s, float$(1.195694689e-04f));
  p = fma(p, s, float$(-8.542670562e-04f));
  p = fma(p, s, float$(5.223785006e-03f));
  p = fma(p, s, float$(-2.686613363e-02f));
  p = fma(p, s, float$(1.128379131e-01f));
  p = fma(p, s, float$(-3.761263889e-01f));
  p = fma(p, s, float$(1.128379167e+00f));
  float$ q = float$(-1.330939040e-05f);
  q = fma(q, t, float$(3.175720348e-04f));
  q = fma(q, t, float$(-3.436867600e-03f));
  q = fma(q, t, float$(2.262198593e-02f));
  q = fma(q, t, float$(-1.033189801e-01f));
  q = fma(q, t, float$(-6.390933195e-01f));
  q = fma(q, t, float$(-1.125925949e+00f));
  q = fma(q, t, float$(-7.569686190e-04f));
  return copysign(select(t * p, float$(1.0f) - exp(q), t > float$(1.0f)), x);
}
)"},
      {"log1p", {}, R"(
// log(1 + x), corrected for the rounding of 1 + x.
inline float$ log1p(float$ x) {
  float$ u = float$(1.0f) + x;
  return select(log(u) * (x / (u - float$(1.0f))), x, u == float$(1.0f));
}
)"},
      {"expm1", {}, R"(
// exp(x) - 1: a polynomial near zero, where the difference would cancel.
inline float$ expm1(float$ x) {
  float$ p = x * (float$(1.0f) + x * (float$(0.5f) + x * (float$(1.66666667e-1f) +
             x * (float$(4.16666667e-2f) + x * (float$(8.33333333e-3f) + x * float$(1.38888889e-3f))))));
  return select(exp(x) - float$(1.0f), p, fabs(x) < float$(0.35f));
}
)"},
      {"hypot", {}, R"(
inline float$ hypot(float$ x, float$ y) {
  float$ a = max(fabs(x), fabs(y));
  float$ b = min(fabs(x), fabs(y)) / max(a, float$(1.17549435e-38f));
  return a * sqrt(fma(b, b, float$(1.0f)));
}
)"},

      {"next_after", {}, R"(
// The float beside x in the direction of y: the next or the last code, whose order is that of magnitudes.
inline float$ next_after(float$ x, float$ y) {
  int$ code = as_type<int$>(x);
  int$ beside = select(code - int$(1), code + int$(1), (x < y) == (x > float$(0.0f)));
  beside = select(beside, (as_type<int$>(y) & int$(0x80000000)) | int$(1), x == float$(0.0f));
  beside = select(beside, as_type<int$>(y), x == y);
  return select(as_type<float$>(beside), x + y, !(x <= y) && !(x >= y));
}
)"},

      // ---- narrow floats to half or float: exact, by bits ------------------------------------------------------
      {"e4m3fn_to_half", {}, R"(
// E4M3 (bias 7): its bits, read as a half (bias 15), are 2^-8 of the value, subnormals included. 0x7f is NaN.
inline half$ e4m3fn_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(7))) * half$(256)));
  bits = select(bits, ushort$(0x7e00), magnitude == ushort$(0x7f));
  return as_type<half$>(ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8))));
}
)"},
      {"e5m2_to_half", {}, R"(
// E5M2 is the upper byte of a half.
inline half$ e5m2_to_half(uchar$ code) { return as_type<half$>(ushort$(ushort$(code) << ushort$(8))); }
)"},
      {"e4m3fnuz_to_half", {}, R"(
// E4M3 FNUZ (bias 8): as E4M3 with 2^-7. 0x80 is NaN; no -0.
inline half$ e4m3fnuz_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(7))) * half$(128)));
  bits = ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8)));
  return as_type<half$>(select(bits, ushort$(0x7e00), code == uchar$(0x80)));
}
)"},
      {"e5m2fnuz_to_half", {}, R"(
// E5M2 FNUZ (bias 16): the exponent of a half is one less; the two lowest exponents are half's subnormals. 0x80 is NaN.
inline half$ e5m2fnuz_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ subnormal = ushort$(magnitude << ushort$(7));
  ushort$ normal = ushort$((magnitude << ushort$(8)) - ushort$(0x400));
  ushort$ bits = select(subnormal, normal, magnitude >= ushort$(8));
  bits = ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8)));
  return as_type<half$>(select(bits, ushort$(0x7e00), code == uchar$(0x80)));
}
)"},
      {"e8m0_to_float", {}, R"(
// E8M0: the exponent field of a float; 0 is the subnormal 2^-127, 255 is NaN.
inline float$ e8m0_to_float(uchar$ code) {
  uint$ bits = select(uint$(code) << uint$(23), uint$(0x00400000), code == uchar$(0));
  return as_type<float$>(select(bits, uint$(0x7fc00000), code == uchar$(255)));
}
)"},
      {"e2m1_to_half", {}, R"(
// E2M1 (bias 1), one code a lane: its bits, read as a half, are 2^-14 of the value.
inline half$ e2m1_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(7));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(9))) * half$(16384)));
  return as_type<half$>(ushort$(bits | (ushort$(code & uchar$(8)) << ushort$(12))));
}
)"},
      {"unpack_e2m1x2", {}, R"(
// Two E2M1 codes a byte, the earlier one in the low nibble.
inline uchar2 unpack_e2m1x2(uchar packed) { return uchar2(packed & 15, packed >> 4); }
)"},
      {"unpack_e2m1x4", {}, R"(
inline uchar4 unpack_e2m1x4(ushort packed) {
  return uchar4((ushort4(packed) >> ushort4(0, 4, 8, 12)) & ushort4(15));
}
)"},

      // ---- float to narrow floats: round to nearest even, saturate ---------------------------------------------
      {"round_to_minifloat", {}, R"(
// |x| rounded to nearest even at MANTISSA bits with exponent bias BIAS, not clamped. Below the smallest normal number
// the code counts multiples of the smallest subnormal.
template <int MANTISSA, int BIAS>
inline uint$ round_to_minifloat(float$ x) {
  uint$ a = as_type<uint$>(x) & uint$(0x7fffffff);
  uint$ odd = (a >> uint$(23 - MANTISSA)) & uint$(1);
  uint$ normal = (a + uint$((1 << (22 - MANTISSA)) - 1) + odd) >> uint$(23 - MANTISSA);
  float$ scaled = min(as_type<float$>(a), float$(1.0f)) * float$(1 << (BIAS - 1 + MANTISSA));
  return select(normal - uint$((127 - BIAS) << MANTISSA), uint$(rint(scaled)), a < uint$((128 - BIAS) << 23));
}
)"},
      {"float_to_e4m3fn", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e4m3fn(float$ x) {
  uint$ code = select(min(round_to_minifloat<3, 7>(x), uint$(0x7e)), uint$(0x7f), is_nan(x));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)));
}
)"},
      {"float_to_e5m2", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e5m2(float$ x) {
  uint$ code = select(min(round_to_minifloat<2, 15>(x), uint$(0x7b)), uint$(0x7f), is_nan(x));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)));
}
)"},
      {"float_to_e4m3fnuz", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e4m3fnuz(float$ x) {
  uint$ code = min(round_to_minifloat<3, 8>(x), uint$(0x7f));
  code = select(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)), uint$(0), code == uint$(0));
  return uchar$(select(code, uint$(0x80), is_nan(x)));
}
)"},
      {"float_to_e5m2fnuz", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e5m2fnuz(float$ x) {
  uint$ code = min(round_to_minifloat<2, 16>(x), uint$(0x7f));
  code = select(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)), uint$(0), code == uint$(0));
  return uchar$(select(code, uint$(0x80), is_nan(x)));
}
)"},
      {"float_to_e8m0", {"is_nan"}, R"(
// The nearest power of two of |x|; a tie goes up.
inline uchar$ float_to_e8m0(float$ x) {
  uint$ a = as_type<uint$>(x) & uint$(0x7fffffff);
  uint$ code = min((a + uint$(0x00400000)) >> uint$(23), uint$(254));
  code = select(code, uint$(0), a < uint$(0x00600000));  // 2^-127 is a subnormal float
  return uchar$(select(code, uint$(255), a >= uint$(0x7f800000)));
}
)"},
      {"float_to_e2m1", {"round_to_minifloat"}, R"(
inline uchar$ float_to_e2m1(float$ x) {
  uint$ code = min(round_to_minifloat<1, 1>(x), uint$(7));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(28)) & uint$(8)));
}
)"},
      {"pack_e2m1x2", {}, R"(
inline uchar pack_e2m1x2(uchar2 code) { return uchar(code.x | (code.y << 4)); }
)"},
      {"pack_e2m1x4", {}, R"(
inline ushort pack_e2m1x4(uchar4 code) {
  return ushort(code.x | (code.y << 4) | (code.z << 8) | (code.w << 12));
}
)"},

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

      // ---- matrices --------------------------------------------------------------------------------------------
      {"simdgroup_mma", {}, R"(
// c += a * b on 8x8 tiles. A lane holds two neighbours of a row: q = lane / 4, row (q & 4) | (lane / 2 & 3),
// column (q & 2) * 2 + (lane & 1) * 2. T is the common element type of the operands.
template <typename T, typename A, typename B>
inline void simdgroup_mma(thread float* c, const thread A* a, const thread B* b) {
  simdgroup_matrix<T, 8, 8> ma, mb;
  simdgroup_matrix<float, 8, 8> mc;
  reinterpret_cast<thread vec<T, 2>&>(ma.thread_elements()) = vec<T, 2>(T(a[0]), T(a[1]));
  reinterpret_cast<thread vec<T, 2>&>(mb.thread_elements()) = vec<T, 2>(T(b[0]), T(b[1]));
  reinterpret_cast<thread float2&>(mc.thread_elements()) = float2(c[0], c[1]);
  simdgroup_multiply_accumulate(mc, ma, mb, mc);
  const float2 sum = reinterpret_cast<thread float2&>(mc.thread_elements());
  c[0] = sum.x;
  c[1] = sum.y;
}
)"},
      {"matmul2d", {}, R"(
// c += a * b by one simdgroup; each operand is the lane's share in the cooperative layout of 16x16 fragments.
template <int M, int N, int K, bool TRANSPOSE_A, bool TRANSPOSE_B, typename A, typename B>
inline void matmul2d(thread float* c, const thread A* a, const thread B* b) {
  constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
      M, N, K, TRANSPOSE_A, TRANSPOSE_B, true, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<descriptor, metal::execution_simdgroup> op;
  auto ta = op.template get_left_input_cooperative_tensor<A, B, float>();
  auto tb = op.template get_right_input_cooperative_tensor<A, B, float>();
  auto tc = op.template get_destination_cooperative_tensor<decltype(ta), decltype(tb), float>();
  for (ushort i = 0; i < M * K / 32; ++i) {
    ta[i] = a[i];
  }
  for (ushort i = 0; i < K * N / 32; ++i) {
    tb[i] = b[i];
  }
  for (ushort i = 0; i < M * N / 32; ++i) {
    tc[i] = c[i];
  }
  op.run(ta, tb, tc);
  for (ushort i = 0; i < M * N / 32; ++i) {
    c[i] = tc[i];
  }
}
)"},

      // ---- atomics that Metal lacks ----------------------------------------------------------------------------
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
  return table;
}

int Find(const std::string& name) {
  const auto& table = Table();
  for (size_t i = 0; i < table.size(); ++i) {
    if (name == table[i].name) return static_cast<int>(i);
  }
  return -1;
}

std::string Replaced(std::string text, char mark, const std::string& by) {
  std::string out;
  for (char c : text) {
    if (c == mark) {
      out += by;
    } else {
      out += c;
    }
  }
  return out;
}

bool PerLane(const Helper& helper) { return std::string(helper.text).find('$') != std::string::npos; }

}  // namespace

bool Prelude::Has(const std::string& name) { return Find(name) >= 0; }

void Prelude::Use(const std::string& name, int lanes) {
  int row = Find(name);
  TVM_FFI_ICHECK_GE(row, 0) << "no Metal helper " << name;
  const Helper& helper = Table()[row];
  if (!PerLane(helper)) {
    for (const char* needed : helper.needs) Use(needed, 1);
    used_.insert({row, 1});
    return;
  }
  TVM_FFI_ICHECK(lanes >= 1 && lanes <= 4) << "Metal helper " << name << " for " << lanes << " lanes";
  for (const char* needed : helper.needs) Use(needed, lanes);
  used_.insert({row, lanes});
}

std::string Prelude::Text() const {
  std::string out = "#include <metal_stdlib>\n";
  if (used_.count({Find("simdgroup_mma"), 1})) out += "#include <metal_simdgroup_matrix>\n";
  if (used_.count({Find("matmul2d"), 1})) {
    out += "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n";
  }
  out += "using namespace metal;\n";
  for (const auto& [row, lanes] : used_) {
    std::string text = Replaced(Table()[row].text, '$', lanes == 1 ? "" : std::to_string(lanes));
    if (text.find('@') != std::string::npos) {
      text = Replaced(text, '@', "device") + Replaced(text, '@', "threadgroup");
    }
    out += text;
  }
  return out;
}

}  // namespace metal
}  // namespace tilelang_ext
