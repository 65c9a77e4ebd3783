"""Both ways of the probabilities in a prim_func of a user's: values on several targets, the instructions of Hopper, layouts."""

# Without `from __future__ import annotations`: this file holds kernels.

import functools
import runpy
from pathlib import Path

import pytest
import torch
from cuda.kernels import lower as lower_cuda
from rocm.kernels import lower as lower_hip

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.kernels.attention.probabilities import key_of, round_to_fragment, round_to_shared

M, N, K, D = 64, 64, 32, 64
WAYS = {"fragment": (round_to_fragment, T.alloc_fragment), "shared": (round_to_shared, T.alloc_shared)}


@functools.cache
def products(way, dtype="float16"):
    """O = round(A B^T) V, of one tile."""
    convert, alloc = WAYS[way]

    @T.prim_func
    def products(
        A: T.Tensor((M, K), dtype), B: T.Tensor((N, K), dtype), V: T.Tensor((N, D), dtype), O: T.Tensor((M, D), "float32")
    ):
        with T.Kernel(1, threads=128):
            A_s = T.alloc_shared((M, K), dtype)
            B_s = T.alloc_shared((N, K), dtype)
            V_s = T.alloc_shared((N, D), dtype)
            S = T.alloc_fragment((M, N), "float32")
            P = alloc((M, N), dtype)
            O_f = T.alloc_fragment((M, D), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.copy(V, V_s)
            T.gemm(A_s, B_s, S, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
            convert(S, P)
            T.gemm(P, V_s, O_f, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
            T.copy(O_f, O)

    return products


@pytest.mark.parametrize(
    ("target", "ways"),
    [("metal", ("fragment", "shared")), ("gfx942", ("fragment", "shared")), ("gfx1201", ("shared",))],
)
def test_values(target, ways):
    """Rows of every magnitude; both ways give the same bits."""
    generator = torch.Generator().manual_seed(0)
    A, B, V = (torch.randn(shape, generator=generator).half() for shape in ((M, K), (N, K), (N, D)))
    A *= torch.exp2(torch.randint(-3, 4, (M, 1), generator=generator).half())
    P = (A.float() @ B.float().T).half()
    results = []
    for way in ways:
        out = torch.full((M, D), torch.nan)
        kernel = products(way)
        if target == "metal":
            report = simulate(kernel, A, B, V, out, target=target)
        else:
            report = simulate(lower_hip(kernel, target), A, B, V, out, target={"kind": "hip", "mcpu": target})
        assert not report.findings, str(report)
        error = (out.double() - P.double() @ V.double()).abs().amax(1)
        # A sum in another order may round an element of P to its neighbour.
        assert (error <= 2e-3 * P.double().abs().amax(1) * V.double().abs().max()).all()
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


def test_instructions_of_hopper():
    """From registers, or from shared memory behind a fence for the tensor cores' proxy."""
    texts = {way: lower_cuda(products(way), "sm_90a") for way in WAYS}
    assert "wgmma_rs" in texts["fragment"]
    assert "wgmma_rs" not in texts["shared"]
    assert "wgmma_ss" in texts["shared"]
    last_store, second_mma = (texts["shared"].rfind(name) for name in ("stmatrix", "wgmma_ss"))
    assert last_store < texts["shared"].rfind("fence_proxy_async") < second_mma


@pytest.mark.parametrize(
    ("way", "S", "P", "error", "message"),
    [
        ("fragment", ("float16", "local.fragment"), ("float16", "local.fragment"), TypeError, "S must be float32 and P one of"),
        ("shared", ("float32", "local.fragment"), ("float32", "shared.dyn"), TypeError, "got float32 and float32; cast S"),
        ("fragment", ("float32", "local.fragment"), ("float16", "shared.dyn"), ValueError, "P made by T.alloc_fragment; got"),
        ("shared", ("float32", "local.fragment"), ("float16", "local.fragment"), ValueError, "use the other function"),
    ],
)
def test_errors(way, S, P, error, message):
    from tvm import tirx

    S, P = (tirx.decl_buffer((M, N), dtype, scope=scope) for dtype, scope in (S, P))
    with pytest.raises(error, match=message):
        WAYS[way][0](S, P)


def test_shapes():
    from tvm import tirx

    S, P = (
        tirx.decl_buffer(shape, dtype, scope="local.fragment") for shape, dtype in (((M, N), "float32"), ((M, K), "float16"))
    )
    with pytest.raises(ValueError, match=r"round_to_fragment: P must have the shape of S; got \[64, 32\] and \[64, 64\]"):
        round_to_fragment(S, P)


def test_picture():
    """An operand of 16 bits has an accumulator's elements in order, one of 8 bits in `key_of`'s; the picture is up to date."""
    drawn = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "draw_attention_layouts.py"))
    for row in range(16):
        for k in range(32):
            lane, byte = drawn["operand_8"](row, k)
            assert drawn["accumulator"](row, key_of(k)) == (
                lane,
                byte // 8 * 8 + byte % 4 // 2 * 4 + byte % 8 // 4 * 2 + byte % 2,
            )
            assert drawn["operand_16"](row, k) == drawn["accumulator"](row, k)
    assert sorted(map(key_of, range(32))) == list(range(32))
    assert drawn["DOCUMENT"].read_text() == drawn["draw"](), "run docs/draw_attention_layouts.py"
