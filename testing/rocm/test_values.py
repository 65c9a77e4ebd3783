"""What the emitted HIP text computes, executed for every architecture on the CPU: fp8 products against float64.

Cases are pairwise: each value of a parameter meets a unit that reads the codes and one that they are decoded for, waves of 64
and of 32. What an architecture's text consists of (decoders, lane maps, instructions) is tested for all of them in
test_formats.py, test_gemm.py and testing/simulator/test_hip_matrix.py.
"""

import pytest
import torch
from numeric import assert_close
from rocm.kernels import (
    FP8,
    LAYOUTS,
    SCALED_LAYOUTS,
    SCALED_SIZE,
    attention_products,
    gemm,
    lower,
    scaled_matmul,
    shared_accumulator,
)
from rocm.operands import codes, quantized

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T

E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ = FP8
MIXED = [  # types of A and B, which differ; test_tiles has E4M3 and E5M2 on the units that read both
    ("gfx90a", E5M2, E4M3_FNUZ),
    ("gfx942", E4M3, E5M2),
    ("gfx942", E5M2_FNUZ, E4M3_FNUZ),
    ("gfx950", E4M3, E5M2),
    ("gfx950", E5M2, E4M3_FNUZ),
    ("gfx1100", E5M2_FNUZ, E4M3_FNUZ),
    ("gfx1201", E5M2, E4M3_FNUZ),
]


def run(kernel, *arguments, arch):
    report = simulate(lower(kernel, arch), *arguments, target={"kind": "hip", "mcpu": arch})
    assert not report.findings, str(report)
    return report


def nans(M, N):
    return torch.full((M, N), torch.nan)


def check_gemm(arch, a="float8_e4m3fn", b="float8_e4m3fn", M=64, N=64, K=128, trans_A=False, trans_B=True, **options):
    (A, A_values), (B, B_values), C = codes(M, K, a, 0), codes(N, K, b, 1), nans(M, N)
    A, B = (A.t().contiguous() if trans_A else A), (B if trans_B else B.t().contiguous())
    run(gemm(a, b, M=M, N=N, K=K, trans_A=trans_A, trans_B=trans_B, **options), A, B, C, arch=arch)
    assert_close(C, A_values @ B_values.T, dtype="float32")


@pytest.mark.parametrize(("arch", "a", "b"), MIXED)
def test_pairs_of_types(arch, a, b):
    check_gemm(arch, a, b)


@pytest.mark.parametrize(
    ("arch", "trans_A", "trans_B"),
    [
        ("gfx942", True, True),
        ("gfx950", False, False),
        ("gfx950", True, True),
        ("gfx1100", False, False),
        ("gfx1201", True, True),
    ],
)
def test_transposes(arch, trans_A, trans_B):
    check_gemm(arch, trans_A=trans_A, trans_B=trans_B, M=32, N=96, K=32, threads=64)


@pytest.mark.parametrize(
    ("arch", "A_scope", "B_scope", "transposed"),
    [
        ("gfx942", "fragment", "shared", False),
        ("gfx950", "shared", "fragment", True),
        ("gfx950", "fragment", "fragment", True),
        ("gfx1100", "shared", "fragment", True),
        ("gfx1201", "fragment", "shared", False),
        ("gfx1201", "fragment", "fragment", True),
    ],
)
def test_operands_in_registers(arch, A_scope, B_scope, transposed):
    check_gemm(arch, A_scope=A_scope, B_scope=B_scope, trans_A=transposed, trans_B=not transposed)


@pytest.mark.parametrize(
    ("arch", "M", "N", "K", "threads"),
    [
        ("gfx950", 16, 16, 16, 64),
        ("gfx950", 16, 128, 48, 128),
        ("gfx950", 48, 16, 96, 64),
        ("gfx950", 64, 64, 384, 128),
        ("gfx1201", 16, 128, 48, 64),
        ("gfx1201", 128, 32, 64, 128),
    ],
)
def test_tiles(arch, M, N, K, threads):
    check_gemm(arch, E4M3, E5M2, M=M, N=N, K=K, threads=threads)


@pytest.mark.parametrize(("dtype", "A_scope"), [("float16", "shared"), ("bfloat16", "fragment")])
def test_wide_products_of_16_bits(dtype, A_scope):
    A, B = (torch.randn(64, 128, generator=torch.Generator().manual_seed(i)).to(getattr(torch, dtype)) for i in (0, 1))
    C = nans(64, 64)
    report = run(gemm(dtype, dtype, A_scope=A_scope), A, B, C, arch="gfx950")
    assert_close(C, A.double() @ B.double().T, dtype="float32")
    assert sum(report.instructions.values()) == 4 * 4 * 128 // 32


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("gfx90a", E4M3),
        ("gfx90a", E5M2_FNUZ),
        ("gfx942", E4M3_FNUZ),
        ("gfx942", E5M2),
        ("gfx950", E4M3),
        ("gfx950", E5M2_FNUZ),
        ("gfx1100", E4M3_FNUZ),
        ("gfx1201", E5M2),
    ],
)
def test_every_code(arch, dtype):
    """One row per code, times one: each result is the code's value to the last bit, infinities and NaN included.

    Each type is read by the unit that takes it and decoded for another; test_formats.py has all decoders.
    """
    format = formats.format_of(dtype)
    A = torch.zeros(256, 32, dtype=torch.uint8)
    B = torch.zeros(32, 32, dtype=torch.uint8)
    one = format.values.index(1.0)
    for code in range(256):
        A[code, code % 32] = code
    B.fill_diagonal_(one)
    C = nans(256, 32)
    views = (t.view(getattr(torch, format.torch_dtype)) for t in (A, B))
    run(gemm(dtype, dtype, M=256, N=32, K=32, threads=256 if arch.startswith("gfx9") else 128), *views, C, arch=arch)
    found = C[torch.arange(256), torch.arange(256) % 32].double()
    expected = torch.tensor(format.values, dtype=torch.float64)
    assert torch.equal(found.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize(("arch", "layout"), SCALED_LAYOUTS)
def test_fp8_scaled_matmul(arch, layout):
    M, N, K = SCALED_SIZE.values()
    (A, SA, B, SB), C = quantized(layout, M, N, K), nans(M, N)
    run(scaled_matmul(layout, **SCALED_SIZE), A, SA, B, SB, C, arch=arch)
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, *LAYOUTS[layout]), dtype="float32")


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1201"])
def test_masked_tiles_of_e5m2(arch):
    """Rows, columns and K end inside a tile, which is filled with zeros of the type."""
    M, N, K = 40, 150, 288
    layout = T.BlockScaledLayout.per_row()
    values = (torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)) for rows in (M, N))
    (A, SA), (B, SB) = (quantization.quantize(x, formats.E5M2, layout) for x in values)
    C = nans(M, N)
    run(scaled_matmul("row", a=E5M2, b=E5M2, M=M, N=N, K=K), A, SA, B, SB, C, arch=arch)
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, layout, layout), dtype="float32")


@pytest.mark.parametrize("arch", ["gfx950", "gfx1100"])
def test_products_of_both_kinds_into_one_accumulator(arch):
    generator = torch.Generator().manual_seed(2)
    A, B = (torch.randn(64, 64, generator=generator).half() for _ in range(2))
    (A8, A8_values), (B8, B8_values), C = codes(64, 64, E4M3, 3), codes(64, 64, E4M3, 4), nans(64, 64)
    run(shared_accumulator(), A, B, A8, B8, C, arch=arch)
    assert_close(C, A.double() @ B.double().T + A8_values @ B8_values.T, dtype="float32")


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", E4M3_FNUZ), ("gfx950", E4M3), ("gfx950", "float16")])
def test_result_of_a_product_is_operand_of_the_next(arch, dtype):
    """Small whole numbers, which the cast between the products leaves as they are."""
    generator = torch.Generator().manual_seed(5)
    torch_dtype = getattr(torch, dtype)
    Q, V = (torch.randint(-1, 2, (64, 64), generator=generator).float() for _ in range(2))
    K = torch.zeros(64, 64)
    K[torch.arange(64), torch.randperm(64, generator=generator)] = 2.0
    O = nans(64, 64)
    run(attention_products(dtype), *(t.to(torch_dtype) for t in (Q, K, V)), O, arch=arch)
    assert_close(O, (Q @ K.T).double() @ V.double().T, dtype="float32")
