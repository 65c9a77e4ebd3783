"""Operands of attention for tests: every row has its own magnitude, and lengths end inside tiles."""

import torch
from cuda.kernels import lower

from tilelang_ext import reference
from tilelang_ext.kernels.attention.problem import Problem
from tilelang_ext.kernels.attention.sm90_forward import ARCH, PASS_CONFIGS

BF16, FP16 = torch.bfloat16, torch.float16
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
    return Problem(kind, arch, num_sms, D, name(dtype), D**-0.5, **options)


def operands(batch, S_q, S_k, heads, kv_heads, D, dtype=BF16, seed=0):
    """Return q, k, v and sinks."""
    generator = torch.Generator().manual_seed(seed)

    def random(S, heads):
        spread = torch.exp2(torch.randint(-1, 2, (batch, S, heads, 1), generator=generator).float())
        return (torch.randn(batch, S, heads, D, generator=generator) * spread).to(dtype)

    sinks = torch.randn(heads, generator=generator) * 2
    return random(S_q, heads), random(S_k, kv_heads), random(S_k, kv_heads), sinks


def expected(of: Problem, q, k, v, sinks, cu_q=None, cu_k=None):
    """The reference's result for the tensors of a kernel; sequences one by one where there are lengths."""
    options = {"causal": of.causal, "window": of.window or None, "sinks": sinks if of.has_sinks else None}
    if not of.has_lengths:
        return reference.attention(q, k, v, of.scale, **options)
    o, lse = torch.full(q.shape, torch.nan).double(), torch.full((1, q.shape[2], q.shape[1]), torch.nan).double()
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        o[:, rows], lse[:, :, rows] = reference.attention(q[:, rows], k[:, keys], v[:, keys], of.scale, **options)
    return o, lse


def check(out, lse, expected_out, expected_lse):
    """Every row points as the reference's does (cosine at least 0.9999), and is within 1e-2; lse within 1e-3."""
    out, lse = out.double().cpu(), lse.double().cpu()
    torch.testing.assert_close(out, expected_out, atol=1e-2, rtol=1e-2, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-5, equal_nan=True)
    norms = out.norm(dim=-1) * expected_out.norm(dim=-1)
    cosine = torch.where(norms > 1e-6, (out * expected_out).sum(-1) / norms.clamp(min=1e-6), 1.0)
    assert cosine.min() >= 0.9999, cosine.min()
