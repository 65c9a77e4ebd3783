"""The MXFP4 intrinsics on AMD: executed from their text and compiled, for each architecture; each kernel is lowered once."""

# Without `from __future__ import annotations`: this file holds kernels.

import pytest
import torch
from language.mxfp4_cases import activations, tiled, values, weights
from numeric import assert_close
from rocm.gates import MOE, Gated, gate
from rocm.kernels import ARCHS

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T
from tilelang_ext.rocm import program

pytestmark = pytest.mark.hip

MX = T.BlockScaledLayout.e8m0_k32()


def run_and_compile(kernel, *arguments, arch, instruction=None, tiles=1):
    target = {"kind": "hip", "mcpu": arch}
    made = program.lower(kernel, target)
    report = simulate(made, *arguments, target=target)
    assert not report.findings, str(report)
    gate({made.name: Gated(made.source, made.dynamic_lds, instruction, tiles)}, arch)


# gfx950's products of codes are in test_block_scaled.py.
KINDS = {
    "gfx90a": "bfloat16",
    "gfx942": "fp8 per 32",
    "gfx950": "bfloat16",
    "gfx1100": "fp4 per 32",
    "gfx1201": "fp8 per row",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_scaled_matmul(arch):
    M, N, K = 40, 100, 96
    (A, SA, x), (W, SW), C = activations(KINDS[arch], M, K), weights(N, K), torch.full((M, N), torch.nan)
    given = torch.zeros(1, 1, dtype=torch.uint8) if SA is None else SA
    threads = 64
    tiles = 2 * 4 // (threads // (64 if arch.startswith("gfx9") else 32))
    run_and_compile(tiled(A, SA, W, threads=threads), A, given, W, SW, C, arch=arch, instruction=MOE[arch], tiles=tiles)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32")


def between_the_products(tokens, top_k, format, block_M=16, K=128):
    """Gather rows, quantise them, read the codes, apply the activation, scatter by slot: every intrinsic but the product."""
    codes = K // 2 if format == "mxfp4" else K

    @T.prim_func
    def kernel(
        x: T.Tensor((tokens, K), "bfloat16"),
        ids: T.Tensor((block_M,), "int32"),
        row_weights: T.Tensor((block_M,), "float32"),
        codes_out: T.Tensor((block_M, codes), "uint8"),
        scale_out: T.Tensor((block_M, K // 32), "uint8"),
        y: T.Tensor((tokens, top_k, K // 2), "float32"),
        total: T.Tensor((tokens, K // 2), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            x_s = T.alloc_shared((block_M, K), "bfloat16")
            codes_s = T.alloc_shared((block_M, codes), "uint8")
            scale_s = T.alloc_shared((block_M, K // 32), "uint8")
            read_s = T.alloc_shared((block_M, K), "bfloat16")
            out_f = T.alloc_fragment((block_M, K // 2), "float32")
            T.moe_gather(x, ids, x_s)
            T.mx_quantize(x_s, codes_s, scale_s, format=format)
            T.copy(codes_s, codes_out)
            T.copy(scale_s, scale_out)
            if format == "mxfp4":
                T.mxfp4_dequant(codes_s, scale_s, read_s)
                T.swiglu(read_s, out_f, gate="separated")
            else:
                T.swiglu(x_s, out_f, gate="interleaved")
            T.moe_scatter(out_f, ids, row_weights, y, mode="reduce")
            T.moe_scatter(out_f, ids, row_weights, total, mode="atomic")

    return kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_between_the_products(arch):
    """Codes and scales bit for bit; a row of padding, a token twice, and slots that no row has."""
    tokens, top_k, block_M, K = 7, 2, 16, 128
    format = "mxfp8" if arch in ("gfx942", "gfx1201") else "mxfp4"
    x = values(tokens, K, seed=0).bfloat16()
    token = torch.tensor([3, 0, 6, 3, 1, 5, *[tokens] * 10])
    slot = torch.tensor([0, 1, 0, 1, 1, 0, *[top_k] * 10])
    row_weights = torch.rand(block_M, generator=torch.Generator().manual_seed(1))
    gathered = torch.cat([x, torch.zeros(1, K, dtype=x.dtype)])[token]
    element = {"mxfp8": formats.E4M3, "mxfp4": formats.E2M1}[format]
    codes, scale = quantization.quantize(gathered, element, MX)
    read = gathered.double() if format == "mxfp8" else reference.dequantize(codes, scale, element, MX)
    act = reference.swiglu(read, gate="interleaved" if format == "mxfp8" else "separated") * row_weights[:, None].double()

    got_codes, got_scale = (torch.full_like(t.view(torch.uint8), 0x5A) for t in (codes, scale))
    y, total = torch.full((tokens, top_k, K // 2), torch.nan), torch.zeros(tokens, K // 2)
    ids = (slot << 24 | token).int()
    run_and_compile(between_the_products(tokens, top_k, format), x, ids, row_weights, got_codes, got_scale, y, total, arch=arch)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got_codes, codes.view(torch.uint8))
    assert_close(y[token[:6], slot[:6]], act[:6], dtype="float32", max_error=1e-4)
    assert y.isnan().sum() == (tokens * top_k - 6) * K // 2
    expected = torch.zeros(tokens, K // 2, dtype=torch.float64).index_add_(0, token[:6], act[:6])
    assert_close(total, expected, dtype="float32", max_error=1e-4)
