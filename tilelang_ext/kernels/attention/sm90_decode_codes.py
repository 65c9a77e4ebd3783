"""Codes of 8 bits of a stage of `sm90_decode`, converted to what MMAs of 16 bits read."""

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.roles import WARPGROUP

_CONVERT = {"bfloat16": "tilelang_ext_e4m3x8_to_bf16", "float16": "tilelang_ext_e4m3x8_to_f16"}
CONVERT_SOURCE = r"""
__device__ __forceinline__ unsigned tilelang_ext_e4m3x2_to_bf16x2(unsigned short codes) {
  unsigned values;
  asm("{.reg .b32 both;\n"
      ".reg .b16 low, high;\n"
      ".reg .f32 x, y;\n"
      "cvt.rn.f16x2.e4m3x2 both, %1;\n"
      "mov.b32 {low, high}, both;\n"
      "cvt.f32.f16 x, low;\n"
      "cvt.f32.f16 y, high;\n"
      "cvt.rn.bf16x2.f32 %0, y, x;}" : "=r"(values) : "h"(codes));
  return values;
}
__device__ __forceinline__ unsigned tilelang_ext_e4m3x2_to_f16x2(unsigned short codes) {
  unsigned values;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(values) : "h"(codes));
  return values;
}
template <unsigned (*convert)(unsigned short)>
__device__ __forceinline__ void tilelang_ext_e4m3x8(const void* codes, void* values, bool keep) {
  for (int i = 0; i < 4; ++i)
    ((unsigned*)values)[i] = convert(keep ? ((const unsigned short*)codes)[i] : 0);
}
__device__ __forceinline__ void tilelang_ext_e4m3x8_to_bf16(const void* codes, void* values, bool keep) {
  tilelang_ext_e4m3x8<tilelang_ext_e4m3x2_to_bf16x2>(codes, values, keep);
}
__device__ __forceinline__ void tilelang_ext_e4m3x8_to_f16(const void* codes, void* values, bool keep) {
  tilelang_ext_e4m3x8<tilelang_ext_e4m3x2_to_f16x2>(codes, values, keep);
}
"""  # upstream's cast to bfloat16 takes one cvt.bf16.f16 for each value, of which an SM has 16 per clock


@T.macro
def convert(traits, codes_s, operand_s, consumer, stage, first, panels, rows):
    """Convert some panels of a stage, eight codes at a time, to the consumer's operand; those past `rows` become zeros.

    All codes of a thread are loaded before the first is stored: the compiler cannot tell that one does not overwrite the other.
    """
    turns = panels * traits.config.block_N * 8 // WARPGROUP
    codes = T.alloc_local((turns * 8,), traits.problem.cache_dtype)
    values = T.alloc_local((8,), traits.problem.dtype)
    for turn in T.unroll(turns):
        piece = turn * WARPGROUP + consumer.thread
        for e in T.vectorized(8):
            codes[turn * 8 + e] = codes_s[
                stage,
                first + piece // (8 * traits.config.block_N),
                piece // 8 % traits.config.block_N,
                piece % 8 * 8 + e,
            ]
    for turn in T.unroll(turns):
        piece = turn * WARPGROUP + consumer.thread
        row = piece // 8 % traits.config.block_N
        T.call_extern(
            "handle", _CONVERT[traits.problem.dtype], T.address_of(codes[turn * 8]), T.address_of(values[0]), row < rows
        )  # fmt: skip
        for e in T.vectorized(8):
            operand_s[consumer.number, piece // (8 * traits.config.block_N), row, piece % 8 * 8 + e] = values[e]
