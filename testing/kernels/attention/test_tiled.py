"""The kernel for every target, in the simulator: values against float64, no finding."""

import functools

import numpy as np
import pytest
import torch
from kernels.attention.operands import BF16, E4M3, FP16, check, expected, operands, problem, random_scales
from rocm.gates import LDS_BYTES
from rocm.kernels import lower

from tilelang_ext import simulate
from tilelang_ext.kernels.attention import tiled
from tilelang_ext.rocm import compile_hip

HIP = "hip"
CASES = [
    # Every head size and every target once; pairwise with the type, the mask, sinks, groups of heads and lengths
    (problem(64, FP16, arch="", causal=True, has_sinks=True), "metal", (1, 40, 50, 2, 1), ()),
    (problem(128, BF16, arch="", window=20), "metal4", (2, 35, 36, 1, 1), ()),
    (problem(256, BF16, arch="", causal=True, has_lengths=True), "metal", (1, 50, 60, 1, 1), ((0, 33, 40), (0, 20, 55))),
    (problem(512, FP16, arch=""), "metal4", (1, 9, 40, 1, 1), ()),
    (problem(64, E4M3, arch="", causal=True), "metal", (1, 20, 40, 2, 1), ()),
    (problem(64, BF16, arch="gfx942", causal=True, has_lengths=True), HIP, (1, 80, 90, 2, 1), ((0, 66, 70), (0, 70, 85))),
    (problem(72, FP16, arch="gfx950", has_sinks=True), HIP, (1, 10, 70, 2, 2), ()),
    (problem(256, FP16, arch="gfx1100", window=30, has_sinks=True), HIP, (1, 70, 20, 1, 1), ()),
    (problem(512, BF16, arch="gfx1201", causal=True), HIP, (1, 20, 70, 8, 1), ()),
]
BY_NAME = [f"{target}{of.arch}-{of.head_dim}-{of.dtype}" for of, target, *_ in CASES]


@functools.cache
def kernel_of(of):
    return tiled.attention(of, tiled.pick_config(of))


@functools.cache
def run(number):
    """The operands of a case, and the result of the simulator, whose outputs start as NaN."""
    of, target, sizes, lengths = CASES[number]
    dtype = getattr(torch, of.dtype)
    q, k, v, sinks = operands(*sizes, of.head_dim, dtype)
    scales = random_scales(of, *sizes[3:5])
    wanted = expected(of, q, k, v, sinks, *lengths, scales=scales)
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in lengths or ([0], [0]))
    if lengths:
        for tensor, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
            tensor[:, cu[-1] :] = torch.nan
    out = torch.full(q.shape, torch.nan, dtype=getattr(torch, of.result))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    kernel = lower(kernel_of(of), of.arch) if target == HIP else kernel_of(of)
    report = simulate(
        kernel,
        q,
        k,
        v,
        sinks,
        cu_q,
        cu_k,
        *scales,
        out,
        lse,
        target={"kind": HIP, "mcpu": of.arch} if target == HIP else target,
    )
    return (q, k, v, sinks), (out, lse), wanted, report


@pytest.mark.parametrize("number", range(len(CASES)), ids=BY_NAME)
def test_values(number):
    """Tails of every extent; rows that see no key."""
    _, result, wanted, report = run(number)
    assert not report.findings, str(report)
    check(*result, *wanted)


@pytest.mark.parametrize("number", [0, 1, 3], ids=lambda number: BY_NAME[number])
def test_mlx(number):
    """MLX's own function, on the CPU, agrees on the same operands."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    of, *_ = CASES[number]
    (q, k, v, sinks), (out, _), *_ = run(number)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    sees = (distance >= 0) | (not of.is_causal)
    sees &= (distance < of.window) | (of.window == 0)
    heads_first = (mx.array(x.float().transpose(1, 2).contiguous().numpy()) for x in (q, k, v))
    options = {"sinks": mx.array(sinks.numpy())} if of.has_sinks else {}
    o = mx.fast.scaled_dot_product_attention(*heads_first, scale=of.scale, mask=mx.array(sees.numpy()), **options)
    torch.testing.assert_close(out.float(), torch.from_numpy(np.array(o)).transpose(1, 2), atol=1e-2, rtol=1e-2)


@pytest.mark.hip
@pytest.mark.parametrize("number", [5, 6, 7, 8], ids=lambda number: BY_NAME[number])
def test_compiles_on_amd(number):
    """Nothing spills, and LDS is within the chip's limit."""
    of, *_ = CASES[number]
    lowered = lower(kernel_of(of), of.arch)
    [resources] = compile_hip(lowered.source, of.arch).kernels
    assert (resources.vgpr_spills, resources.sgpr_spills, resources.scratch_bytes) == (0, 0, 0), resources
    assert resources.lds_bytes + lowered.dynamic_lds <= LDS_BYTES[of.arch]
