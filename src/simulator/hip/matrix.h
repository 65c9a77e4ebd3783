// Matrix products: the one place that knows which lane holds which element.
//
// Sources: AMD's "CDNA 2", "CDNA 3", "CDNA 4", "RDNA 3" and "RDNA 4 Instruction Set Architecture" reference guides;
// AMD's matrix instruction calculator (github.com/ROCm/amd_matrix_instruction_calculator), whose layouts of the
// instructions before CDNA 4 a test holds this table to; for f8f6f4, the register mappings that AMD's Composable Kernel
// tests on the hardware (test/mx_mfma_op/mx_mfma_op.hpp).
#pragma once
#include "architecture.h"
#include "fp8.h"
#include "types.h"
#include "wave.h"

namespace sim {

enum class Unit { kMfma, kMfma64, kWmma3, kWmma4 };

// D += A B with A rows x K, B K x rows. Of its row of A (column of B), which is l % rows, lane l holds the elements
//   k(l, e) = e / run * (groups * run) + l / rows % groups * run + e % run, with run = run_bytes / bytes per element.
struct Shape {
  Unit unit;
  int rows, K;
  int run_bytes;  // neighbours along K in a lane

  constexpr int wave() const { return unit == Unit::kWmma3 || unit == Unit::kWmma4 ? 32 : 64; }
  constexpr int groups() const { return unit == Unit::kWmma3 ? 1 : wave() / rows; }  // RDNA 3: the upper half repeats
  constexpr int operands() const { return K / groups(); }                            // per lane
  constexpr int results() const { return rows * rows / wave(); }
  constexpr int k(int lane, int e, int bits) const {
    const int run = run_bytes * 8 / bits < operands() ? run_bytes * 8 / bits : operands();
    return e / run * (groups() * run) + lane / rows % groups() * run + e % run;
  }
  // Where element e of a lane's D stands; its column is lane % rows.
  constexpr int row(int lane, int e) const {
    const int group = lane / rows;
    switch (unit) {
      case Unit::kMfma:
        return e / 4 * (4 * wave() / rows) + group * 4 + e % 4;
      case Unit::kMfma64:
        return e * 4 + group;
      case Unit::kWmma3:
        return e * 2 + group;
      case Unit::kWmma4:
        return group * 8 + e;
    }
  }
};

// ---- operand formats: element e of a lane's registers, and what it is multiplied in

struct Float32 {
  using Sum = float;
  static constexpr int bits = 32;
  static float value(const void* p, int e) { return static_cast<const float*>(p)[e]; }
};
struct Float64 {
  using Sum = double;
  static constexpr int bits = 64;
  static double value(const void* p, int e) { return static_cast<const double*>(p)[e]; }
};
inline float flush_subnormal(float v, float smallest) {
  return architecture.flushes_subnormal_operands() && __builtin_fabsf(v) < smallest ? __builtin_copysignf(0.0f, v) : v;
}
struct Float16 {
  using Sum = float;
  static constexpr int bits = 16;
  static float value(const void* p, int e) { return flush_subnormal(static_cast<const _Float16*>(p)[e], 0x1p-14f); }
};
struct Bfloat16 {
  using Sum = float;
  static constexpr int bits = 16;
  static float value(const void* p, int e) {
    return flush_subnormal(static_cast<const hip_bfloat16*>(p)[e], 0x1p-126f);
  }
};
struct Int8 {
  using Sum = int;
  static constexpr int bits = 8;
  static int value(const void* p, int e) { return static_cast<const signed char*>(p)[e]; }
};
template <__hip_fp8_interpretation_t kind>
struct Float8 {
  using Sum = float;
  static constexpr int bits = 8;
  static float value(const void* p, int e) { return fp8_values<kind>.of[static_cast<const unsigned char*>(p)[e]]; }
};
using Fp8 = Float8<architecture.fnuz() ? __HIP_E4M3_FNUZ : __HIP_E4M3>;
using Bf8 = Float8<architecture.fnuz() ? __HIP_E5M2_FNUZ : __HIP_E5M2>;

// An f8f6f4 operand, whose format is an argument: 0 E4M3, 1 E5M2, 4 E2M1 (2 and 3, of six bits, are not simulated).
struct Coded {
  int format;
  int bits() const { return format == 4 ? 4 : 8; }
  template <Shape shape>
  bool fits(unsigned bytes) const {
    return (format == 0 || format == 1 || format == 4) && int(bytes) * 8 >= shape.operands() * bits();
  }
  float value(const void* p, int e) const {
    const unsigned char* codes = static_cast<const unsigned char*>(p);
    if (format == 4) return kFp4Values[codes[e / 2] >> e % 2 * 4 & 15];
    return format ? Bf8::value(p, e) : Fp8::value(p, e);
  }
};

// ---- products

struct ProductFrame {
  const void *a, *b, *c;
  void* d;
  const Site* site;
};
struct ScaledFrame : ProductFrame {
  Coded format_a, format_b;
  unsigned char scale_a, scale_b;
};

template <class T, int count>
using Vector = T __attribute__((vector_size(count * sizeof(T))));

template <class Sum, int rows, int K>
struct Tiles {
  using Row = Vector<Sum, rows>;
  Sum a[rows][K];
  alignas(Row) Sum b[K][rows];
  alignas(Row) Sum d[rows][rows];
};

template <Shape shape, class Out, class Sum>
inline void load_sum(Tiles<Sum, shape.rows, shape.K>& t, const ProductFrame& f, int lane) {
  for (int e = 0; e < shape.results(); ++e)
    t.d[shape.row(lane, e)][lane % shape.rows] = static_cast<const Out*>(f.c)[e];
}
template <Shape shape, class Out, class Sum>
inline void store_sum(const Tiles<Sum, shape.rows, shape.K>& t, const ProductFrame& f, int lane) {
  for (int e = 0; e < shape.results(); ++e) static_cast<Out*>(f.d)[e] = Out(t.d[shape.row(lane, e)][lane % shape.rows]);
}

// RDNA 3 reads operands from lanes 0 to 15 and from 16 to 31: both halves must hold them.
template <Shape shape, class A, class B>
inline void check_repeated(const Meeting& m) {
  for (int lane = shape.rows; lane < shape.wave(); ++lane) {
    if (!(m.mask >> lane & 1) || !(m.mask >> lane % shape.rows & 1)) continue;
    const ProductFrame& f = *static_cast<ProductFrame*>(m.frames[lane]);
    const ProductFrame& lower = *static_cast<ProductFrame*>(m.frames[lane % shape.rows]);
    if (__builtin_memcmp(f.a, lower.a, shape.K * A::bits / 8) || __builtin_memcmp(f.b, lower.b, shape.K * B::bits / 8))
      return report_operand(f.site, lane, "lanes 16 to 31 must repeat the operands of lanes 0 to 15");
  }
}

// Sums over k in order, in the type of the sum; lanes that are absent count as zeros.
template <Shape shape, class A, class B, class Out>
__attribute__((noinline)) void multiply_lanes(const Meeting& m) {
  using Sum = typename A::Sum;
  Tiles<Sum, shape.rows, shape.K> t = {};
  using Row = typename decltype(t)::Row;
  if constexpr (shape.unit == Unit::kWmma3) check_repeated<shape, A, B>(m);
  each_lane<ProductFrame>(m, [&](ProductFrame& f, int lane) {
    for (int e = 0; e < shape.operands(); ++e) {
      t.a[lane % shape.rows][shape.k(lane, e, A::bits)] = A::value(f.a, e);
      t.b[shape.k(lane, e, B::bits)][lane % shape.rows] = B::value(f.b, e);
    }
    load_sum<shape, Out>(t, f, lane);
  });
  for (int i = 0; i < shape.rows; ++i) {
    Row sum = *(const Row*)t.d[i];
    for (int k = 0; k < shape.K; ++k) sum += t.a[i][k] * *(const Row*)t.b[k];
    *(Row*)t.d[i] = sum;
  }
  each_lane<ProductFrame>(m, [&](ProductFrame& f, int lane) { store_sum<shape, Out>(t, f, lane); });
}

// The same with E8M0 scales of 32 elements along K: lane l has those of its row or column, and of k / 32 = l / rows.
// They apply to the sum over the 32.
template <Shape shape>
__attribute__((noinline)) void multiply_scaled_lanes(const Meeting& m) {
  constexpr int rows = shape.rows, blocks = shape.K / 32;
  Tiles<float, rows, shape.K> t = {};
  using Row = typename decltype(t)::Row;
  float scale_a[rows][blocks] = {};
  alignas(Row) float scale_b[blocks][rows] = {};
  each_lane<ScaledFrame>(m, [&](ScaledFrame& f, int lane) {
    for (int e = 0; e < shape.operands(); ++e) {
      t.a[lane % rows][shape.k(lane, e, f.format_a.bits())] = f.format_a.value(f.a, e);
      t.b[shape.k(lane, e, f.format_b.bits())][lane % rows] = f.format_b.value(f.b, e);
    }
    load_sum<shape, float>(t, f, lane);
    scale_a[lane % rows][lane / rows] = e8m0_value(f.scale_a);
    scale_b[lane / rows][lane % rows] = e8m0_value(f.scale_b);
  });
  for (int i = 0; i < rows; ++i) {
    Row sum = *(const Row*)t.d[i];
    for (int block = 0; block < blocks; ++block) {
      Row part{};
      for (int k = block * 32; k < block * 32 + 32; ++k) part += t.a[i][k] * *(const Row*)t.b[k];
      sum += part * (scale_a[i][block] * *(const Row*)scale_b[block]);
    }
    *(Row*)t.d[i] = sum;
  }
  each_lane<ScaledFrame>(m, [&](ScaledFrame& f, int lane) { store_sum<shape, float>(t, f, lane); });
}

template <Shape shape>
inline void count_product(int& slot, const char* name) {
  if (lane()) return;
  count_instruction(slot, name);
  counts.mma += shape.rows * shape.rows * shape.K / 512;
}

template <Shape shape, class A, class B, class Out, class VA, class VB, class VC>
inline VC multiply(int& slot, const char* name, const VA& a, const VB& b, const VC& c, const Site* site) {
  static_assert(sizeof(VA) * 8 == shape.operands() * A::bits, "A: a lane's registers do not fit this instruction");
  static_assert(sizeof(VB) * 8 == shape.operands() * B::bits, "B: a lane's registers do not fit this instruction");
  static_assert(sizeof(VC) == shape.results() * sizeof(Out), "C: a lane's registers do not fit this instruction");
  VC d;
  ProductFrame frame{&a, &b, &c, &d, site};
  count_product<shape>(slot, name);
  meet(multiply_lanes<shape, A, B, Out>, &frame, site, kAllLanes);
  return d;
}

template <Shape shape, class VA, class VB, class VC>
inline VC multiply_scaled(int& slot, const char* name, const VA& a, const VB& b, const VC& c, Coded format_a,
                          Coded format_b, unsigned char scale_a, unsigned char scale_b, const Site* site) {
  static_assert(sizeof(VA) <= 32 && sizeof(VB) <= 32, "A and B: a lane has 32 bytes of each at most");
  static_assert(sizeof(VC) == shape.results() * sizeof(float), "C: a lane's registers do not fit this instruction");
  if (!format_a.fits<shape>(sizeof(VA)) || !format_b.fits<shape>(sizeof(VB))) {
    report_operand(site, lane(),
                   "an operand must be of format 0 (E4M3), 1 (E5M2) or 4 (E2M1), in registers of its size");
    return c;
  }
  VC d;
  ScaledFrame frame{{&a, &b, &c, &d, site}, format_a, format_b, scale_a, scale_b};
  count_product<shape>(slot, name);
  meet(multiply_scaled_lanes<shape>, &frame, site, kAllLanes);
  return d;
}

}  // namespace sim

// ---- instructions

#define SIM_MISSING(name, has) \
  static_assert(sim::architecture.has() && sizeof(VA), "this architecture lacks " #name ", which is for " #has)

#define SIM_MFMA(name, has, unit, rows, K, run_bytes, A, B, Out)                                                       \
  template <class VA, class VB, class VC>                                                                              \
  inline VC __builtin_amdgcn_mfma_##name(VA a, VB b, VC c, int cbsz, int abid, int blgp, SIM_SITE) {                   \
    SIM_MISSING(mfma_##name, has);                                                                                     \
    static int slot = -1;                                                                                              \
    if (cbsz || abid || blgp) sim::report_operand(site, sim::lane(), "cbsz, abid and blgp must be 0: no broadcast");   \
    return sim::multiply<sim::Shape{sim::Unit::unit, rows, K, run_bytes}, sim::A, sim::B, Out>(slot, "mfma_" #name, a, \
                                                                                               b, c, site);            \
  }
SIM_MFMA(f32_16x16x4f32, cdna, kMfma, 16, 4, 4, Float32, Float32, float)
SIM_MFMA(f32_32x32x2f32, cdna, kMfma, 32, 2, 4, Float32, Float32, float)
SIM_MFMA(f32_16x16x16f16, cdna, kMfma, 16, 16, 8, Float16, Float16, float)
SIM_MFMA(f32_32x32x8f16, cdna, kMfma, 32, 8, 8, Float16, Float16, float)
SIM_MFMA(f32_16x16x16bf16_1k, cdna2_or_later, kMfma, 16, 16, 8, Bfloat16, Bfloat16, float)
SIM_MFMA(f32_32x32x8bf16_1k, cdna2_or_later, kMfma, 32, 8, 8, Bfloat16, Bfloat16, float)
SIM_MFMA(f64_16x16x4f64, cdna2_or_later, kMfma64, 16, 4, 8, Float64, Float64, double)
SIM_MFMA(i32_16x16x16i8, cdna1_or_2, kMfma, 16, 16, 4, Int8, Int8, int)
SIM_MFMA(i32_32x32x8i8, cdna1_or_2, kMfma, 32, 8, 4, Int8, Int8, int)
SIM_MFMA(i32_16x16x32_i8, cdna3_or_later, kMfma, 16, 32, 8, Int8, Int8, int)
SIM_MFMA(i32_32x32x16_i8, cdna3_or_later, kMfma, 32, 16, 8, Int8, Int8, int)
SIM_MFMA(f32_16x16x32_fp8_fp8, cdna3_or_later, kMfma, 16, 32, 8, Fp8, Fp8, float)
SIM_MFMA(f32_16x16x32_fp8_bf8, cdna3_or_later, kMfma, 16, 32, 8, Fp8, Bf8, float)
SIM_MFMA(f32_16x16x32_bf8_fp8, cdna3_or_later, kMfma, 16, 32, 8, Bf8, Fp8, float)
SIM_MFMA(f32_16x16x32_bf8_bf8, cdna3_or_later, kMfma, 16, 32, 8, Bf8, Bf8, float)
SIM_MFMA(f32_32x32x16_fp8_fp8, cdna3_or_later, kMfma, 32, 16, 8, Fp8, Fp8, float)
SIM_MFMA(f32_32x32x16_fp8_bf8, cdna3_or_later, kMfma, 32, 16, 8, Fp8, Bf8, float)
SIM_MFMA(f32_32x32x16_bf8_fp8, cdna3_or_later, kMfma, 32, 16, 8, Bf8, Fp8, float)
SIM_MFMA(f32_32x32x16_bf8_bf8, cdna3_or_later, kMfma, 32, 16, 8, Bf8, Bf8, float)
SIM_MFMA(f32_16x16x32_f16, cdna4, kMfma, 16, 32, 16, Float16, Float16, float)
SIM_MFMA(f32_32x32x16_f16, cdna4, kMfma, 32, 16, 16, Float16, Float16, float)
SIM_MFMA(f32_16x16x32_bf16, cdna4, kMfma, 16, 32, 16, Bfloat16, Bfloat16, float)
SIM_MFMA(f32_32x32x16_bf16, cdna4, kMfma, 32, 16, 16, Bfloat16, Bfloat16, float)
SIM_MFMA(i32_16x16x64_i8, cdna4, kMfma, 16, 64, 16, Int8, Int8, int)
SIM_MFMA(i32_32x32x32_i8, cdna4, kMfma, 32, 32, 16, Int8, Int8, int)
#undef SIM_MFMA

// op_sel picks the byte of each scale register.
#define SIM_SCALED(name, rows, K)                                                                               \
  template <class VA, class VB, class VC>                                                                       \
  inline VC __builtin_amdgcn_mfma_scale_##name(VA a, VB b, VC c, int cbsz, int blgp, int op_sel_a, int scale_a, \
                                               int op_sel_b, int scale_b, SIM_SITE) {                           \
    SIM_MISSING(mfma_scale_##name, cdna4);                                                                      \
    static int slot = -1;                                                                                       \
    return sim::multiply_scaled<sim::Shape{sim::Unit::kMfma, rows, K, 16}>(                                     \
        slot, "mfma_scale_" #name, a, b, c, sim::Coded{cbsz}, sim::Coded{blgp}, scale_a >> op_sel_a * 8,        \
        scale_b >> op_sel_b * 8, site);                                                                         \
  }
SIM_SCALED(f32_16x16x128_f8f6f4, 16, 128)
SIM_SCALED(f32_32x32x64_f8f6f4, 32, 64)
#undef SIM_SCALED

#define SIM_WMMA(name, has, unit, run_bytes, A, B, Out)                                                               \
  template <class VA, class VB, class VC>                                                                             \
  inline VC __builtin_amdgcn_wmma_##name(VA a, VB b, VC c, SIM_SITE) {                                                \
    SIM_MISSING(wmma_##name, has);                                                                                    \
    static int slot = -1;                                                                                             \
    return sim::multiply<sim::Shape{sim::Unit::unit, 16, 16, run_bytes}, sim::A, sim::B, Out>(slot, "wmma_" #name, a, \
                                                                                              b, c, site);            \
  }
SIM_WMMA(f32_16x16x16_f16_w32, rdna3, kWmma3, 32, Float16, Float16, float)
SIM_WMMA(f32_16x16x16_bf16_w32, rdna3, kWmma3, 32, Bfloat16, Bfloat16, float)
SIM_WMMA(f32_16x16x16_f16_w32_gfx12, rdna4, kWmma4, 8, Float16, Float16, float)
SIM_WMMA(f32_16x16x16_bf16_w32_gfx12, rdna4, kWmma4, 8, Bfloat16, Bfloat16, float)
SIM_WMMA(f32_16x16x16_fp8_fp8_w32_gfx12, rdna4, kWmma4, 8, Fp8, Fp8, float)
SIM_WMMA(f32_16x16x16_fp8_bf8_w32_gfx12, rdna4, kWmma4, 8, Fp8, Bf8, float)
SIM_WMMA(f32_16x16x16_bf8_fp8_w32_gfx12, rdna4, kWmma4, 8, Bf8, Fp8, float)
SIM_WMMA(f32_16x16x16_bf8_bf8_w32_gfx12, rdna4, kWmma4, 8, Bf8, Bf8, float)
#undef SIM_WMMA
#undef SIM_MISSING
