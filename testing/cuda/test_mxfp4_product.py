"""T.mxfp4_scaled_matmul on Hopper: which kernels call the function for all of K, what nvcc makes of it, values on a GPU."""

import re
import sys
from pathlib import Path

import pytest
import tilelang
import torch
from cuda.toolkit import compile_texts, needs_nvcc
from language.mxfp4_cases import activations, name_of, tiled, weights
from numeric import assert_close
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import reference

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from mxfp4_scaled_matmul import FEW, MANY, SOME, Tile, scaled_matmul


def text_of(kernel, arch: str = "sm_90a") -> str:
    target = Target({"kind": "cuda", "arch": arch})
    with target:
        text = tilelang.lower(kernel, target=target, enable_device_compile=False).kernel_source
    return text[text.index('extern "C"') :]


@pytest.mark.parametrize(
    ("tile", "dtype", "function"),
    [
        (MANY, "bfloat16", "mxfp4_wgmma<tl::DataType::kBFloat16, 256, 128, 256, "),
        (MANY, "float8_e4m3fn", "mxfp4_wgmma<tl::DataType::kFloat8_e4m3, 256, 128, 256, "),
        (Tile(128, 128, 128), "float8_e5m2", "mxfp4_wgmma<tl::DataType::kFloat8_e5m2, 128, 128, 128, "),
        (SOME, "bfloat16", "mxfp4_mma<16, 32, 512>"),
        (FEW, "bfloat16", "mxfp4_mma<8, 16, 256>"),
    ],
)
def test_all_of_k_is_one_call(tile, dtype, function):
    text = text_of(scaled_matmul(300, 512, 1024, tile, dtype))
    assert text.count(f"tilelang_ext::{function}") == 1


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        (scaled_matmul(300, 512, 1024, Tile(128, 128, 256)), "sm_80"),
        (scaled_matmul(300, 512, 288, Tile(128, 128, 256)), "sm_90a"),  # K is no multiple of 128
        (scaled_matmul(300, 512, 1024, Tile(128, 96, 256)), "sm_90a"),  # rows are not divided among the warpgroups
    ],
)
def test_other_kernels_decode_to_shared_memory(kernel, arch):
    assert "tilelang_ext::mxfp4" not in text_of(kernel, arch)


@needs_nvcc
def test_weights_go_to_the_matrix_unit_from_registers():
    target = Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        kernel = scaled_matmul(300, 512, 1024, MANY)
        text = tilelang.lower(kernel, target=target, enable_device_compile=False).kernel_source
    [compiled] = compile_texts({"scaled_matmul": text}, "sm_90a").values()
    assert compiled.spilled == 0
    assert compiled.count("HGMMA") == 8  # two steps of four
    assert compiled.count("HMMA") == 0


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("kind", "tile", "M", "N", "K"),
    [
        ("bfloat16", (256, 128, 256), 300, 200, 1152),
        ("bfloat16", (128, 256, 256), 40, 512, 128),
        ("bfloat16", (64, 64, 128), 130, 72, 384),
        ("bfloat16", (16, 32, 512), 13, 150, 4224),
        ("bfloat16", (8, 16, 256), 1, 150, 640),
        ("fp8 per row", (256, 128, 256), 300, 200, 1152),
        ("e5m2 per row", (128, 128, 256), 40, 150, 384),
    ],
)
def test_values_on_a_hopper_gpu(kind, tile, M, N, K):
    """Rows end inside a tile; outputs and what lies beside them are poisoned; scales over the whole range and over a part."""
    (A, SA, x), (W, SW) = activations(kind, M, K), weights(N, K)
    for scales in (
        SW,
        torch.randint(124, 134, SW.shape, dtype=torch.uint8),
        torch.randint(60, 190, SW.shape, dtype=torch.uint8),
    ):
        C = torch.full((M, N), torch.nan)
        arguments = [A, torch.zeros(1, 1, dtype=torch.uint8) if SA is None else SA, W, scales, C]
        on_device = [argument.cuda() for argument in arguments]
        kernel = tiled(A, SA, W, *tile)
        assert name_of(A) in str(kernel)
        tilelang.compile(kernel, target={"kind": "cuda", "arch": "sm_90a"})(*on_device)
        # The matrix unit keeps fewer bits of a sum of fp8 products.
        assert_close(
            on_device[-1], reference.mxfp4_matmul(x, W, scales), dtype="float32", max_error=2e-3 if SA is None else 3e-2
        )


def in_steps(decodes, block_K=64, M=300, N=512, K=1024, block_M=128, block_N=128, first=0, factor=1.0):
    """C = A W^T in a pipelined loop of tiles: T.mxfp4_dequant and T.gemm, or T.mxfp4_scaled_matmul."""

    @T.prim_func
    def in_steps(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        SW: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=256) as (bx, by):
            A_s = T.alloc_shared((block_M, block_K), "bfloat16")
            W_s = T.alloc_shared((block_N, block_K // 2), "uint8")
            W_d = T.alloc_shared((block_N, block_K), "bfloat16")
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.clear(C_f)
            for k in T.Pipelined(K // block_K, num_stages=3):
                T.copy(A[by * block_M, k * block_K], A_s)
                T.copy(W[bx * block_N, (k + first) * (block_K // 2)], W_s)
                groups = k * (block_K // 32)
                scales = SW[bx * block_N : (bx + 1) * block_N, groups : groups + block_K // 32]
                if decodes:
                    T.mxfp4_dequant(W_s, scales, W_d)
                    T.gemm(A_s, W_d, C_f, transpose_B=True)
                else:
                    T.mxfp4_scaled_matmul(A_s, None, W_s, scales, C_f)
                if factor != 1.0:
                    for i, j in T.Parallel(block_M, block_N):
                        C_f[i, j] *= factor
            T.copy(C_f, C[by * block_M, bx * block_N])

    return in_steps


@pytest.mark.parametrize("decodes", [True, False])
def test_a_loop_of_tiles_is_one_call(decodes):
    text = text_of(in_steps(decodes))
    [call] = re.findall(r"tilelang_ext::mxfp4_wgmma<tl::DataType::kBFloat16, 128, 128, 256, 8>\(.*\);", text)
    assert "for (int k" not in text
    # First elements of a block's rows, bytes from row to row, rows that are left, K.
    assert "(&(A[(((int)blockIdx.y) * 131072)]))" in call
    assert "(&(W[(((int)blockIdx.x) * 65536)]))" in call
    assert "(&(SW[(((int)blockIdx.x) * 4096)]))" in call
    assert call.endswith("2048, 512, 32, (300 - (((int)blockIdx.y) * 128)), (512 - (((int)blockIdx.x) * 128)), 1024);")
    assert re.search(r"\+v_?\w*\.x", text)  # C is added to


@pytest.mark.parametrize("change", [{"first": 1}, {"factor": 0.5}])
@pytest.mark.parametrize("decodes", [True, False])
def test_a_loop_that_does_something_else_stays(decodes, change):
    """Weights of the next step, whose last is past the end; a sum that is multiplied in each step."""
    assert "tilelang_ext::mxfp4" not in text_of(in_steps(decodes, **change))


@pytest.mark.cuda
@pytest.mark.parametrize("decodes", [True, False])
def test_values_of_a_loop_on_a_hopper_gpu(decodes):
    (A, _, x), (W, SW) = activations("bfloat16", 300, 1024), weights(512, 1024)
    C = torch.full((300, 512), torch.nan, device="cuda")
    kernel = tilelang.compile(in_steps(decodes), target={"kind": "cuda", "arch": "sm_90a"})
    kernel(A.cuda(), W.cuda(), SW.cuda(), C)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32", max_error=2e-3)
