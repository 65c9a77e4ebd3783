"""Operands of attention for tests: every row has its own magnitude, and lengths end inside tiles."""

import torch
from cuda.kernels import lower

from tilelang_ext import reference
from tilelang_ext.kernels.attention.problem import Problem
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
FUNCTIONS = """
#define CUDART_INF_F __builtin_inff()
using std::max;
using std::min;
inline float __shfl_xor_sync(uint32_t, float value, int mask, int) {
  int bits;
  std::memcpy(&bits, &value, 4);
  bits = __shfl_sync(0, bits, lane() ^ mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __shfl_sync(uint32_t, float value, int source, int) {
  int bits;
  std::memcpy(&bits, &value, 4);
  bits = __shfl_sync(0, bits, source);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __any_sync(uint32_t, int value) {
  for (int mask = 16; mask > 0; mask /= 2) value |= __shfl_sync(0, value, lane() ^ mask);
  return value;
}
inline __nv_bfloat162 __tl_cvt_e4m3x2_to_bfloat162(__nv_fp8x2_storage_t codes) {
  return {bfloat16_t(decode(codes & 0xff, 4, 3, true)), bfloat16_t(decode(codes >> 8, 4, 3, true))};
}
namespace tl {
struct MaxOp {
  static float of(float x, float y) { return max(x, y); }
};
struct SumOp {
  static float of(float x, float y) { return x + y; }
};
template <int>
struct NamedBarrier {};
template <typename Op, int lanes, int scale, int, typename>
struct AllReduce {  // of neighbouring lanes
  static float run(float x) {
    for (int mask = lanes / 2; mask >= scale; mask /= 2) x = Op::of(x, __shfl_xor_sync(0, x, mask, 32));
    return x;
  }
};
}  // namespace tl
inline uint32_t tilelang_ext_e4m3x4(float x, float y, float z, float w) {
  return e4m3_code(x) | e4m3_code(y) << 8 | e4m3_code(z) << 16 | e4m3_code(w) << 24;
}
inline void tilelang_ext_e4m3x8_to_bf16(const void* codes, void* values, bool keep) {
  for (int i = 0; i < 8; ++i)
    ((bfloat16_t*)values)[i] = bfloat16_t(keep ? decode(((const uint8_t*)codes)[i], 4, 3, true) : 0.0f);
}
inline half_t rounded_to_half(float x) {
  if (x == 0 || !std::isfinite(x)) return half_t(x);
  const int exponent = max(std::ilogb(x), -14) - 10;  // of the mantissa's last bit
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return half_t(std::fabs(rounded) < 65520 ? rounded : std::copysign(CUDART_INF_F, x));
}
inline uint32_t tilelang_ext_pack_f16(float x, float y) { return __pack_half2(rounded_to_half(x), rounded_to_half(y)); }
inline uint32_t tilelang_ext_low_codes(uint32_t word) {
  return tilelang_ext_pack_f16(decode(word & 0xff, 4, 3, true), decode(word >> 8 & 0xff, 4, 3, true));
}
inline uint32_t tilelang_ext_high_codes(uint32_t word) { return tilelang_ext_low_codes(word >> 16); }
inline uint32_t tilelang_ext_transpose(uint32_t pair) {  // of 8 rows, four lanes each
  const int row = lane() / 4, first = lane() % 4 * 8 + row / 2, shift = row % 2 * 16;
  const uint32_t x = __shfl_sync(0, pair, first), y = __shfl_sync(0, pair, first + 4);
  return (x >> shift & 0xffff) | (y >> shift) << 16;
}
inline float tilelang_ext_exp2(float x) { return std::exp2(x); }
inline float tilelang_ext_log2(float x) { return std::log2(x); }
"""  # of the kernels for Hopper, where they run on the CPU


def text_of(make, *arguments, name="attention", pass_configs=PASS_CONFIGS):
    """The CUDA text of a kernel for Hopper."""
    return lower(make(*arguments).with_attr("global_symbol", name), ARCH, **pass_configs)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def problem(D, dtype=BF16, arch="sm_90a", num_sms=132, **options):
    """What a kernel is compiled for: on an H200, on a chip of AMD, or on Metal where arch is empty."""
    kind = {"sm": "cuda", "gf": "hip", "": "metal"}[arch[:2]]
    out = {"out_dtype": "bfloat16"} if dtype == E4M3 else {}
    return Problem(kind, arch, num_sms, D, name(dtype), D**-0.5, **out, **options)


def operands(batch, S_q, S_k, heads, kv_heads, D, dtype=BF16, seed=0):
    """Return q, k, v and sinks."""
    generator = torch.Generator().manual_seed(seed)

    def random(S, heads):
        spread = torch.exp2(torch.randint(-1, 2, (batch, S, heads, 1), generator=generator).float())
        return (torch.randn(batch, S, heads, D, generator=generator) * spread).to(dtype)

    sinks = torch.randn(heads, generator=generator) * 2
    return random(S_q, heads), random(S_k, kv_heads), random(S_k, kv_heads), sinks


def random_scales(of: Problem, heads, kv_heads, seed=0):
    """Return q_scale, one per head, k_scale, one for all, and v_scale, one per head; ones for 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    counts = heads, 1, kv_heads
    return [torch.exp2(torch.randn(n, generator=generator) / 2) if of.is_fp8 else torch.ones(1) for n in counts]


def expected(of: Problem, q, k, v, sinks, cu_q=None, cu_k=None, scales=None):
    """The reference's result for the tensors of a kernel; sequences one by one where there are lengths."""
    if scales is not None:
        q, k, v = (x.double() * scale.double()[:, None] for x, scale in zip((q, k, v), scales, strict=True))
    options = {"causal": of.causal, "window": of.window or None, "sinks": sinks if of.has_sinks else None}
    if not of.has_lengths:
        return reference.attention(q, k, v, of.scale, **options)
    o, lse = torch.full(q.shape, torch.nan).double(), torch.full((1, q.shape[2], q.shape[1]), torch.nan).double()
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        o[:, rows], lse[:, :, rows] = reference.attention(q[:, rows], k[:, keys], v[:, keys], of.scale, **options)
    return o, lse


def check(out, lse, expected_out, expected_lse, rounds_to_fp8=False):
    """Every row points as the reference's does (cosine at least 0.9999), and is within 1e-2; lse within 1e-3.

    Where P is rounded to e4m3, the cosine is at least 0.998, and rows are within 5% of their largest element.
    """
    out, lse = out.double().cpu(), lse.double().cpu()
    if rounds_to_fp8:
        assert ((out - expected_out).abs() <= 0.05 * expected_out.abs().amax(-1, keepdim=True) + 1e-2).all()
    else:
        torch.testing.assert_close(out, expected_out, atol=1e-2, rtol=1e-2, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-5, equal_nan=True)
    norms = out.norm(dim=-1) * expected_out.norm(dim=-1)
    cosine = torch.where(norms > 1e-6, (out * expected_out).sum(-1) / norms.clamp(min=1e-6), 1.0)
    assert cosine.min() >= (0.998 if rounds_to_fp8 else 0.9999), cosine.min()
