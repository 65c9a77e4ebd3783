"""Products of codes with E8M0 scales: given to gfx950's matrix unit with their scales, and left as they are elsewhere."""

# Without `from __future__ import annotations`: this file holds kernels.

import pytest
import torch
from language.mxfp4_cases import KINDS, activations, tiled, values, weights
from numeric import assert_close
from rocm.gates import gate, gated
from rocm.kernels import FP8, lower, scaled_matmul

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T
from tilelang_ext.rocm import pipeline
from tilelang_ext.rocm.instructions import UNITS, takes_scales

INSTRUCTION = "mfma_scale_f32_16x16x128_f8f6f4"
E4M3, E5M2, E4M3_FNUZ, _ = FP8
MX = T.BlockScaledLayout.e8m0_k32()
CODES = [kind for kind in KINDS if "float" not in kind]


def run(kernel, *arguments, products):
    """Run on gfx950; `products` is how many times a wave multiplies 16x16x128, and it multiplies nothing else."""
    report = simulate(kernel, *arguments, target={"kind": "hip", "mcpu": "gfx950"})
    assert not report.findings, str(report)
    assert report.instructions == {INSTRUCTION: products}


def nans(M, N):
    return torch.full((M, N), torch.nan)


# Whole steps of 128; a last one of 32.
@pytest.mark.parametrize(("kind", "K"), [*((kind, 288) for kind in CODES), ("fp4 per 32", 256)])
def test_mxfp4_scaled_matmul(kind, K):
    """Scales that differ in every row and group; rows and columns that end inside a tile."""
    M, N = 40, 100
    (A, SA, x), (W, SW), C = activations(kind, M, K), weights(N, K), nans(M, N)
    run(tiled(A, SA, W), A, SA, W, SW, C, products=2 * 2 * (2 * 4) * -(-K // 128))
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32")


@pytest.mark.parametrize(("a", "b", "K"), [(E4M3, E4M3, 288), (E5M2, E4M3, 96), (E4M3, E5M2, 288)])
def test_fp8_scaled_matmul(a, b, K):
    M, N = 40, 100
    (A, SA), (B, SB), C = quantized(M, K, a, 0), quantized(N, K, b, 1), nans(M, N)
    run(scaled_matmul("e8m0", a=a, b=b, M=M, N=N, K=K), A, SA, B, SB, C, products=2 * 2 * (2 * 4) * -(-K // 128))
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, MX, MX), dtype="float32")


def quantized(rows, K, dtype, seed):
    return quantization.quantize(values(rows, K, seed), formats.format_of(dtype), MX)


def test_a_region_ends_where_it_says():
    """Poison behind K in the same buffers: codes of NaN, scales of NaN."""
    M, N, K, stored = 32, 64, 96, 256
    (A, SA, x), (W, SW) = activations("fp8 per 32", M, K), weights(N, K)
    A_all, SA_all = torch.full((M, stored), 0x7F, dtype=torch.uint8), torch.full((M, stored // 32), 255, dtype=torch.uint8)
    W_all, SW_all = torch.full((N, stored // 2), 0x77, dtype=torch.uint8), torch.full((N, stored // 32), 255, dtype=torch.uint8)
    for whole, part in ((A_all, A.view(torch.uint8)), (SA_all, SA), (W_all, W), (SW_all, SW)):
        whole[:, : part.shape[1]] = part

    @T.prim_func
    def kernel(
        A: T.Tensor((M, stored), E4M3),
        SA: T.Tensor((M, stored // 32), "uint8"),
        W: T.Tensor((N, stored // 2), "uint8"),
        SW: T.Tensor((N, stored // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            T.mxfp4_scaled_matmul(
                A[0:M, 0:K], SA[0:M, 0 : K // 32], W[0:N, 0 : K // 2], SW[0:N, 0 : K // 32], C, clear_accum=True
            )

    C = nans(M, N)
    run(kernel, A_all.view(torch.float8_e4m3fn), SA_all, W_all, SW_all, C, products=2 * 4)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32")


def test_scales_end_where_their_region_says():
    """The last step of 128 has 32 of K; the bytes behind those of its scales are NaN."""
    M, N, K, block_N = 32, 64, 160, 64
    (A, SA), (B, SB), C = quantized(M, K, E4M3, 0), quantized(N, K, E4M3, 1), nans(M, N)
    SA_all, SB_all = (torch.cat([s, torch.full((len(s), 3), 255, dtype=torch.uint8)], 1) for s in (SA, SB))

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), E4M3),
        SA: T.Tensor((M, K // 32 + 3), "uint8"),
        B: T.Tensor((N, K), E4M3),
        SB: T.Tensor((N, K // 32 + 3), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            T.fp8_scaled_matmul(
                A, SA[0:M, 0 : K // 32], B, SB[0:N, 0 : K // 32], C, transpose_B=True, scale_layout=MX, clear_accum=True
            )

    run(kernel, A, SA_all, B, SB_all, C, products=2 * (block_N // 16) * 2)
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, MX, MX), dtype="float32")


@pytest.mark.parametrize("scope", ["shared", "fragment"])
def test_tiles_in_a_pipeline(scope):
    """Codes and scales are copied two steps ahead; tiles of whole steps are multiplied where they lie."""
    M, N, K, step = 32, 64, 1024, 256
    (A, SA, x), (W, SW), C = activations("fp4 per 32", M, K), weights(N, K), nans(M, N)
    alloc = T.alloc_shared if scope == "shared" else T.alloc_fragment

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K // 2), "uint8"),
        SA: T.Tensor((M, K // 32), "uint8"),
        W: T.Tensor((N, K // 2), "uint8"),
        SW: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s = alloc((M, step // 2), "uint8")
            SA_s = alloc((M, step // 32), "uint8")
            W_s = T.alloc_shared((N, step // 2), "uint8")
            SW_s = T.alloc_shared((N, step // 32), "uint8")
            C_f = T.alloc_fragment((M, N), "float32")
            T.clear(C_f)
            for k in T.Pipelined(K // step, num_stages=2):
                T.copy(A[0, k * step // 2], A_s)
                T.copy(SA[0, k * step // 32], SA_s)
                T.copy(W[0, k * step // 2], W_s)
                T.copy(SW[0, k * step // 32], SW_s)
                T.mxfp4_scaled_matmul(A_s, SA_s, W_s, SW_s, C_f)
            T.copy(C_f, C)

    run(kernel, A, SA, W, SW, C, products=2 * 4 * K // 128)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32")
    if scope == "shared":
        assert lower(kernel, "gfx950").dynamic_lds == 2 * (M + N) * (step // 2 + step // 32), (
            "two stages, and no copy of a tile"
        )


def test_symbolic_k():
    """The last step of 128 has 32 of K, which the kernel learns when it is launched."""
    M, N = 32, 64
    groups = T.dynamic("groups")

    @T.prim_func
    def kernel(
        A: T.Tensor((M, groups * 32), E4M3),
        SA: T.Tensor((M, groups), "uint8"),
        W: T.Tensor((N, groups * 16), "uint8"),
        SW: T.Tensor((N, groups), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            T.mxfp4_scaled_matmul(A, SA, W, SW, C, clear_accum=True)

    (A, SA, x), (W, SW), C = activations("fp8 per 32", M, 160), weights(N, 160), nans(M, N)
    run(kernel, A, SA, W, SW, C, products=2 * 4 * 2)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32")


def test_decoded_tiles_are_gone():
    """LDS holds one step of codes, and nothing of 16 bits."""
    (A, SA, _), (W, _) = activations("fp8 per 32", 32, 256), weights(64, 256)
    assert lower(tiled(A, SA, W), "gfx950").dynamic_lds == 32 * 128 + 64 * 128 // 2
    assert lower(tiled(A, SA, W), "gfx942").dynamic_lds == (32 + 64) * 64 * 2


@pytest.mark.parametrize(("kind", "arch"), [("fp8 per 32", "gfx942"), ("fp4 per 32", "gfx1201"), ("bfloat16", "gfx950")])
def test_what_takes_no_scales_stays(kind, arch, monkeypatch):
    (A, SA, _), (W, _) = activations(kind, 32, 64), weights(64, 64)
    text = lower(tiled(A, SA, W), arch).source
    assert "_scaled" not in text
    monkeypatch.setattr(pipeline, "lower_block_scaled", lambda mod, target: mod)
    assert lower.__wrapped__(tiled(A, SA, W), arch).source == text


def test_fp8_of_another_flavour_stays():
    assert INSTRUCTION not in lower(scaled_matmul("e8m0", a=E4M3_FNUZ, K=128), "gfx950").source


def test_types_with_scales():
    codes = (E4M3, E5M2, "uint8")
    assert all(takes_scales("gfx950", a, b) for a in codes for b in codes)
    assert not any(takes_scales(arch, a, b) for arch in UNITS if arch != "gfx950" for a in codes for b in codes)
    assert not takes_scales("gfx950", E4M3_FNUZ, E4M3)
    assert not takes_scales("gfx950", "uint8", "bfloat16")
    assert not takes_scales("", E4M3, E4M3)


@pytest.mark.hip
def test_compiles():
    kernels = {}
    for kind in CODES:
        (A, SA, _), (W, _) = activations(kind, 40, 288), weights(100, 288)
        kernels[kind.replace(" ", "_")] = gated(tiled(A, SA, W), "gfx950", f"v_{INSTRUCTION}", tiles=2 * 4)
    gate(kernels, "gfx950")
