"""Products in the simulator with the tiles that the model for Metal picks: their reports, checked, and the least bytes."""

import torch
from kernels.matmul.operands import FP16
from kernels.matmul.operands import operands as matmul_operands
from kernels.matmul.operands import problem as matmul_problem
from kernels.scaled_mm import operands as scaled
from numeric import assert_close

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T
from tilelang_ext.kernels.matmul import tiled as matmul_tiled
from tilelang_ext.kernels.metal_tile import MXFP4_OPERATIONS, Gemm, Tile, pick_tile
from tilelang_ext.kernels.scaled_mm import tiled as scaled_tiled

MX = T.BlockScaledLayout.e8m0_k32()


def per_mma(report):
    """Device bytes read, threadgroup bytes read and written, barriers per 1,000; all by MMAs."""
    assert not report.findings, str(report)
    c = report.counts
    values = c.device_bytes_read, c.threadgroup_bytes_read, c.threadgroup_bytes_written, 1000 * c.threadgroup_barriers
    return tuple(value / c.mma for value in values)


def run_matmul(M, N, K, epilogue):
    """Return the report of the kernel that `matmul` gets, checked against float64."""
    of = matmul_problem(M, N, K, FP16, epilogue=epilogue, b_is_k_major=False, arch="")
    a, b, *others = matmul_operands(of)
    out = torch.full((M, N), torch.nan, dtype=FP16)
    kernel = matmul_tiled.matmul(of.without_sizes("M"), matmul_tiled.pick_config(of))
    report = simulate(kernel, a, b, *(a if other is None else other for other in others), out, timeout=300)
    assert_close(out, reference.matmul(a, b, *others[:3], epilogue.activation, others[3]), dtype="float16")
    return report


def run_scaled(M, N, K, recipe):
    """Return the report of the kernel that `scaled_mm` gets for E4M3, and the least device bytes."""
    arguments, expected = scaled.operands(M, N, K, (recipe, recipe))
    made = scaled.problem(M, N, K, (recipe, recipe))
    config = scaled_tiled.pick_config(made)
    out = torch.full((M, N), torch.nan)
    report = simulate(scaled_tiled.scaled_matmul(made, config), *arguments, out, timeout=300)
    assert_close(out, expected, dtype="float32")
    a, scale_a, b, scale_b = (tensor.nbytes for tensor in arguments)
    return report, -(-N // config.block_N) * (a + scale_a) + -(-M // config.block_M) * (b + scale_b)


def mxfp4_tile(M, N):
    """Return the tile of a product with weights in MXFP4."""
    gemm = Gemm(M, N, b_device_bytes=17 / 32, b_decoding=MXFP4_OPERATIONS, b_group=32)
    return pick_tile((gemm,), (64,), (16, 32, 64))


def run_mxfp4(M, N, K, tile: Tile, dequant=False):
    """Return the report of `T.mxfp4_scaled_matmul`, or of a loop of `T.mxfp4_dequant` and `T.gemm`, and the least bytes."""
    block_M, block_N, block_K, threads = tile.block_M, tile.block_N, tile.block_K, tile.threads

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float16"),
        W: T.Tensor((N, K // 2), "uint8"),
        scale: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            i, j = by * block_M, bx * block_N
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            if dequant:
                A_s = T.alloc_shared((block_M, block_K), "float16")
                W_s = T.alloc_shared((block_N, block_K), "float16")
                T.clear(C_f)
                for k in T.serial(K // block_K):
                    T.copy(A[i, k * block_K], A_s)
                    codes = W[j : j + block_N, k * (block_K // 2) : (k + 1) * (block_K // 2)]
                    T.mxfp4_dequant(codes, scale[j : j + block_N, k * (block_K // 32) : (k + 1) * (block_K // 32)], W_s)
                    T.gemm(A_s, W_s, C_f, transpose_B=True)
            else:
                T.mxfp4_scaled_matmul(
                    A[i : i + block_M, 0:K],
                    None,
                    W[j : j + block_N, 0 : K // 2],
                    scale[j : j + block_N, 0 : K // 32],
                    C_f,
                    clear_accum=True,
                )
            T.copy(C_f, C[i, j])

    A = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).half()
    W, scale = quantization.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1)), formats.E2M1, MX)
    C = torch.full((M, N), torch.nan)
    report = simulate(kernel, A, W, scale, C, timeout=300)
    assert_close(C, reference.mxfp4_matmul(A, W, scale), dtype="float32")
    return report, -(-N // block_N) * A.nbytes + -(-M // block_M) * (W.nbytes + scale.nbytes)
