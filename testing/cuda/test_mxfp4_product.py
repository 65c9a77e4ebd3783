"""T.mxfp4_scaled_matmul on Hopper: which kernels call the function for all of K, what nvcc makes of it, values on a GPU."""

import sys
from pathlib import Path

import pytest
import tilelang
import torch
from cuda.toolkit import compile_texts, needs_nvcc
from language.mxfp4_cases import activations, name_of, tiled, weights
from numeric import assert_close
from tvm.target import Target

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
