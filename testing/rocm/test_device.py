"""On an AMD GPU with a ROCm build of torch: tile programs, scaled_mm and mxfp4_moe against float64. Skipped without one."""

import pytest
import tilelang
import torch
from kernels.mxfp4_moe.operands import SWIGLU, arguments
from kernels.scaled_mm.operands import PAIRS, case
from language.mxfp4_cases import KINDS, activations, tiled, weights
from numeric import assert_close
from rocm.kernels import FP8, LAYOUTS, gemm, scaled_matmul
from rocm.operands import codes, quantized

from tilelang_ext import reference
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.scaled_mm.operator import scaled_mm

pytestmark = pytest.mark.hip

ERROR = 2e-3  # a matrix unit may sum with fewer bits than float32


@pytest.fixture
def device():
    if torch.version.hip is None or not torch.cuda.is_available():
        pytest.skip("needs an AMD GPU and a ROCm build of torch")
    return torch.device("cuda", torch.cuda.current_device())


def on(device, arguments):
    """Move the tensors among arguments, and those of tuples of weights."""
    return [
        type(a)(*on(device, a)) if isinstance(a, tuple) else a.to(device) if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


def run(kernel, *arguments, device):
    """Run a tile program, whose last argument is its result, and return that."""
    arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    given = on(device, arguments)
    tilelang.compile(kernel, target={"kind": "hip", "mcpu": arch})(*given)
    return given[-1].cpu()


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_products(dtype, device):
    (A, A_values), (B, B_values) = codes(64, 128, dtype, 0), codes(64, 128, dtype, 1)
    C = run(gemm(dtype, dtype), A, B, torch.full((64, 64), torch.nan), device=device)
    assert_close(C, A_values @ B_values.T, dtype="float32", max_error=ERROR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_scaled_matmul(layout, device):
    M, N, K = 40, 150, 288
    A, SA, B, SB = quantized(layout, M, N, K)
    C = run(scaled_matmul(layout, M=M, N=N, K=K), A, SA, B, SB, torch.full((M, N), torch.nan), device=device)
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, *LAYOUTS[layout]), dtype="float32", max_error=ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp4_scaled_matmul(kind, device):
    M, N, K = 40, 150, 288
    (A, SA, x), (W, SW) = activations(kind, M, K), weights(N, K)
    given = torch.zeros(1, 1, dtype=torch.uint8) if SA is None else SA
    C = run(tiled(A, SA, W, threads=128), A, given, W, SW, torch.full((M, N), torch.nan), device=device)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32", max_error=ERROR)


@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize("recipes", PAIRS, ids=lambda pair: "-".join(recipe.name for recipe in pair))
def test_scaled_mm(recipes, M, device):
    given, expected = case(M, 150, 512, recipes)
    out = torch.full((M, 150), torch.nan, device=device)
    scaled_mm(*on(device, given), out=out)
    assert_close(out.cpu(), expected, dtype="float32", max_error=ERROR)


@pytest.mark.parametrize("epilogue", ["reduce", "atomic"])
@pytest.mark.parametrize("a_format", ["bfloat16", "fp8", "mxfp8", "mxfp4"])
def test_mxfp4_moe(a_format, epilogue, device):
    given, expected = arguments(a_format=a_format)
    a_dtype = None if a_format == "bfloat16" else a_format
    result = mxfp4_moe(*on(device, given), activation=SWIGLU, a_dtype=a_dtype, epilogue=epilogue).cpu()
    assert torch.nn.functional.cosine_similarity(result.double(), expected, dim=1).mean() >= 0.9999
    assert_close(result, expected, dtype="bfloat16", max_error=0.03)
