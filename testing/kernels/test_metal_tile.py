"""Metal: the tiles that the model picks, and what kernels with them read, write and wait for, beside MLX's on the same shapes.

Counts are those of the simulator. They compare kernels of one kind, and are no speed.
"""

import pytest
import torch
from kernels.matmul.operands import ALL, FP16, NONE
from kernels.matmul.operands import problem as matmul_problem
from kernels.metal_counts import mxfp4_tile, per_mma, run_matmul, run_mxfp4
from kernels.mxfp4_moe import operands as moe
from kernels.scaled_mm import operands as scaled
from simulator.mlx_figures import QMM_T_256, STEEL_512
from tilelang.tileop.base import GemmWarpPolicy

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.kernels.matmul import tiled as matmul_tiled
from tilelang_ext.kernels.metal_tile import SHARE, Gemm, Tile, pick_tile
from tilelang_ext.kernels.mxfp4_moe import tiled as moe_tiled
from tilelang_ext.kernels.scaled_mm import tiled as scaled_tiled
from tilelang_ext.metal.partition import partition_tile


def test_matmul_beside_steel():
    """float16 512^3 with every part of the epilogue: fewer bytes and barriers than any tile of MLX's that has no epilogue."""
    device, read, written, barriers = per_mma(run_matmul(512, 512, 512, ALL))
    assert device <= 32
    assert read <= 48
    assert barriers <= 4
    for steel in STEEL_512.values():
        assert device < steel.device_read + steel.constant_read
        assert (read, written, barriers) < (steel.threadgroup_read, steel.threadgroup_written, steel.barriers)


@pytest.mark.parametrize(("M", "dequant"), [(128, False), (16, False), (128, True)])
def test_mxfp4_beside_fp_qmm_t(M, dequant):
    """Weights in MXFP4: fewer threadgroup bytes per MMA than MLX's, and each code and scale once per threadgroup."""
    report, least = run_mxfp4(M, 128, 256, mxfp4_tile(M, 128), dequant)
    assert least <= report.counts.device_bytes_read <= 1.02 * least
    _, read, written, _ = per_mma(report)
    assert read < QMM_T_256[4].threadgroup_read
    assert read + written < QMM_T_256[4].threadgroup_read + QMM_T_256[4].threadgroup_written


def test_codes_are_loaded_16_bytes_at_a_time():
    @T.prim_func
    def kernel(W: T.Tensor((64, 64), "uint8"), scale: T.Tensor((64, 4), "uint8"), out: T.Tensor((64, 128), "bfloat16")):
        with T.Kernel(1, threads=128) as _:
            out_s = T.alloc_shared((64, 128), "bfloat16")
            T.mxfp4_dequant(W, scale, out_s)
            T.copy(out_s, out)

    source = metal.lower(kernel).source
    assert "*(device uint4*)(W +" in source
    assert "uchar2(W[" not in source


def test_few_rows_read_each_weight_once():
    """One row of tiles: weights once, the few rows of A once per tile. `scaled_mm` has `vecmat`, tested beside it."""
    M, N, K = 4, 256, 128
    report = run_matmul(M, N, K, NONE)
    config = matmul_tiled.pick_config(matmul_problem(M, N, K, FP16, arch=""))
    assert report.counts.device_bytes_read == 2 * N * K + -(-N // config.block_N) * 2 * M * K
    M = 1
    report, least = run_mxfp4(M, N, K, Tile(16, 64, 64, 64))
    assert report.counts.device_bytes_read == least == N * K * 17 // 32 + N // 64 * 2 * M * K


# --- the model -------------------------------------------------------------------------------------------------------


def test_model_counts_as_the_simulator_does():
    tile, gemm = Tile(32, 64, 32, 64), Gemm(64, 128)
    M, N, K = 2 * tile.block_M, 2 * tile.block_N, 2 * tile.block_K

    @T.prim_func
    def kernel(A: T.Tensor((M, K), "float16"), B: T.Tensor((K, N), "float16"), C: T.Tensor((M, N), "float32")):
        with T.Kernel(2, 2, threads=64) as (bx, by):
            A_s = T.alloc_shared((32, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            C_f = T.alloc_fragment((32, 64), "float32")
            T.clear(C_f)
            for k in T.serial(2):
                T.copy(A[by * 32, k * 32], A_s)
                T.copy(B[k * 32, bx * 64], B_s)
                T.gemm(A_s, B_s, C_f)
            T.copy(C_f, C[by * 32, bx * 64])

    report = simulate(kernel, torch.randn(M, K).half(), torch.randn(K, N).half(), torch.empty(M, N))
    device, read, written, barriers = per_mma(report)
    assert (device, read, written) == (
        tile.device_bytes(gemm),
        tile.threadgroup_bytes_read(gemm),
        tile.threadgroup_bytes_written(gemm),
    )
    assert 1000 * tile.barriers(gemm) == barriers
    # B has rows of 64 here and the model's of 32: one more padding there, and the end of the last row is not padded.
    assert tile.memory(gemm) * 0.9 <= report.threadgroup_memory <= tile.memory(gemm)


def test_a_simdgroup_has_the_share_that_gemm_gives_it():
    for block_M in (8, 16, 32, 64, 128):
        for block_N in (32, 64, 128):
            for threads in (64, 128, 256):
                share = Tile(block_M, block_N, 32, threads).simdgroup
                try:
                    grid = partition_tile(block_M, block_N, threads, GemmWarpPolicy.Square, 8, 8)
                except ValueError:
                    assert share == (0, 0)
                else:
                    assert share == (block_M // grid.rows, block_N // grid.cols)


def test_what_the_model_prefers():
    """Large tiles for large matrices, and no more rows than there are; registers and memory bound them."""
    large = pick_tile((Gemm(4096, 4096),), (32, 64))
    assert large.block_M * large.block_N == 128 * 64
    assert large.simdgroup in ((64, 32), (32, 64))
    assert pick_tile((Gemm(4, 4096),), (32, 64)).block_M == 8
    small = pick_tile((Gemm(128, 128),), (32, 64))  # which large tiles would leave to 8 simdgroups
    assert small.simdgroup[0] * small.simdgroup[1] == SHARE
    # Two accumulators, as gate and up have, and a third of them for scales: halves of the registers each.
    twice = Gemm(4096, 4096, sums=2)
    assert not large.fits(twice)
    assert pick_tile((twice,), (32, 64)).simdgroup == (32, 32)
    assert not Tile(128, 128, 64, 256).fits(Gemm(4096, 4096))  # 36 KB
    assert not Tile(64, 32, 32, 128).fits(Gemm(64, 64, b_group=32))  # 32 groups for 128 threads


def test_every_problem_has_a_tile():
    for M in (1, 7, 33, 64, 500, 5000):
        for N in (1, 40, 300, 9000):
            matmul_tiled.pick_config(matmul_problem(M, N, 64, FP16, arch=""))
            for recipe in (scaled.ROW, scaled.MX):
                scaled_tiled.pick_config(scaled.problem(M, N, 128, (recipe, recipe)))
    for tokens in (1, 100, 5000):
        for a_format in ("bfloat16", "fp8", "mxfp8", "mxfp4"):
            config = moe_tiled.pick_config(moe.problem(tokens, 4, 32, target_kind="metal", a_format=a_format))
            assert config.block_N * config.block_K // 32 >= config.threads
