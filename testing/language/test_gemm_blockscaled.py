"""T.gemm_blockscaled where upstream has no instruction for it: values on every target, what is left alone, what is refused."""

# Without `from __future__ import annotations`: this file holds kernels.

import re
import sys
from pathlib import Path

import pytest
import tilelang
import tilelang.language as upstream
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower, run_on_gpu
from language.blockscaled_cases import DTYPES, NAMES, Pair, operand, problem, program, scales
from numeric import assert_close
from tvm import IRModule, tirx
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.cuda.block_scaled import has_instruction
from tilelang_ext.formats import E2M1
from tilelang_ext.marks import GEMM_BLOCKSCALED
from tilelang_ext.passes.expand_block_scaled import expand_block_scaled_gemms

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import gemm_blockscaled as example

E4M3, E5M2, FP4, PACKED = "float8_e4m3fn", "float8_e5m2", E2M1.dtype, "uint8"
WITHOUT_TMA = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}
# A user of tilelang.language gets upstream's function, which tilelang 0.1.14 lacks.
UPSTREAMS = getattr(upstream, "gemm_blockscaled", T.gemm_blockscaled)


def check(C, expected):
    for got, want, dtype in zip(C, expected, DTYPES, strict=True):
        assert_close(got, want, dtype=dtype)


def run_in_simulator(pair, target, **options):
    tensors, expected = problem(pair)
    report = simulate(program(pair, **options), *tensors, target=target)
    assert not report.findings, str(report)
    check(tensors[-1], expected)
    return report


@pytest.mark.parametrize(
    ("target", "pair"),
    [
        ("metal", Pair(E4M3, E5M2, trans_A=True)),
        ("metal4", Pair(FP4, FP4)),
        ("hip -mcpu=gfx942", Pair("float8_e5m2fnuz", E4M3, trans_A=True, trans_B=False, e8m0="uint8")),
        ("hip -mcpu=gfx1201", Pair(PACKED, PACKED, e8m0="uint8")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.a}-{value.b}",
)
def test_values_through_upstreams_function(target, pair):
    run_in_simulator(pair, target, gemm_blockscaled=UPSTREAMS)


def test_values_where_the_matrix_unit_takes_scales():
    """E8M0 scales go to the matrix unit, for each of two steps of 64; float and E4M3 scales do not."""
    report = run_in_simulator(Pair(PACKED, E5M2, A_scope="fragment", e8m0="uint8"), "hip -mcpu=gfx950")
    assert report.instructions["mfma_scale_f32_16x16x128_f8f6f4"] == 2 * (4 * 2) * 1


@pytest.mark.parametrize("pair", [Pair(PACKED, E4M3, trans_B=False), Pair(E4M3, PACKED, trans_A=True)])
def test_values_on_the_cpu(pair):
    tensors, expected = problem(pair)
    tilelang.compile(program(pair), target="c")(*tensors)
    check(tensors[-1], expected)


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "pair", "instruction"),
    [
        ("sm_80", Pair(PACKED, E4M3), "kBFloat16, tl::DataType::kBFloat16"),
        ("sm_90a", Pair(E4M3, E5M2), "tl::wgmma_ss<tl::DataType::kFloat8_e4m3"),
    ],
)
def test_values_of_cuda_text(arch, pair, instruction):
    tensors, expected = problem(pair)
    text = lower(program(pair), arch, **WITHOUT_TMA)
    assert instruction in text
    execute(text, (1, 1), dict(zip(NAMES, tensors, strict=True)))
    check(tensors[-1], expected)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "pair",
    [
        Pair(E4M3, E5M2),
        Pair(E5M2, E4M3, trans_A=True, trans_B=False),
        Pair(PACKED, PACKED),
        Pair(PACKED, E4M3, trans_B=False),
        Pair(E5M2, PACKED, A_scope="fragment", e8m0="uint8"),
    ],
    ids=lambda pair: f"{pair.a}-{pair.b}",
)
def test_values_on_a_gpu(pair):
    tensors, expected = problem(pair)
    given = dict(zip(NAMES, tensors, strict=True))
    run_on_gpu(program(pair), given)
    # The matrix unit of Hopper keeps fewer bits of a sum of fp8 products than float32 has.
    bounds = {} if PACKED in (pair.a, pair.b) else {"max_error": 2e-3, "rms_error": 2e-4}
    for got, want, dtype in zip(given["C"], expected, DTYPES, strict=True):
        assert_close(got, want, dtype=dtype, **(bounds if dtype == "float32" else {}))


def test_k_ends_inside_a_tile():
    """NaN beside the scales of a region: neither is it read, nor would it meet codes of zero."""
    M, N, K, BLOCK_K = 32, 32, 96, 64
    (A, a), (B, b) = operand(M, E4M3, False, 1), operand(N, E5M2, False, 2)
    (SA, sa), (SB, sb) = scales(M, "float32", 32, E4M3, 3), scales(N, "uint8", 32, E5M2, 4)
    A, B, C = A[:, :K].contiguous(), B[:, :K].contiguous(), torch.full((M, N), torch.nan)
    expected = (a * sa)[:, :K] @ (b * sb)[:, :K].T
    SA[:, K // 32 :], SB[:, K // 32 :] = torch.nan, 255

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), E4M3),
        SA: T.Tensor((M, K // 32 + 1), "float32"),
        B: T.Tensor((N, K), E5M2),
        SB: T.Tensor((N, K // 32 + 1), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s, B_s = T.alloc_shared((M, BLOCK_K), E4M3), T.alloc_shared((N, BLOCK_K), E5M2)
            C_f = T.alloc_fragment((M, N), "float32")
            T.clear(C_f)
            for k in T.serial(2):
                T.copy(A[0, k * BLOCK_K], A_s)
                T.copy(B[0, k * BLOCK_K], B_s)
                T.gemm_blockscaled(
                    A_s, B_s, C_f, SA[:, 0 : K // 32], SB[:, 0 : K // 32], transpose_B=True,
                    k_start=k * BLOCK_K, sf_a_granularity_k=32, sf_b_granularity_k=32,
                )  # fmt: skip
            T.copy(C_f, C)

    tilelang.compile(kernel, target="c")(A, SA, B, SB, C)
    assert_close(C, expected, dtype="float32")


def test_the_example():
    """Rows and columns of the result end inside a tile, and nothing outside of the scales is read."""
    report, error = example.run(40, 40, 128, "metal")
    assert not report.findings
    assert not report.notes
    assert error < 1e-6


def one(
    A=((64, 64), E4M3), B=((64, 64), E4M3), C=((64, 64), "float32"), SFA=((64, 2), "uint8"), SFB=((64, 2), "uint8"), k_start=0,
    granularity=(32, 32), scopes=("shared", "fragment"), **options
):  # fmt: skip
    """A kernel of one call on buffers that nobody fills."""
    alloc = {"shared": T.alloc_shared, "fragment": T.alloc_fragment, "local": T.alloc_local}
    of_AB, of_C = scopes

    @T.prim_func
    def kernel():
        with T.Kernel(1, threads=128) as bx:
            A_s, B_s, C_f = alloc[of_AB](*A), alloc[of_AB](*B), alloc[of_C](*C)
            SFA_s, SFB_s = T.alloc_shared(*SFA), T.alloc_shared(*SFB)
            T.gemm_blockscaled(
                A_s,
                B_s,
                C_f,
                SFA_s,
                SFB_s,
                transpose_B=True,
                k_start=bx if k_start is None else k_start,
                sf_a_granularity_k=granularity[0],
                sf_b_granularity_k=granularity[1],
                **options,
            )

    return kernel


def calls_left(kernel, **options) -> int:
    found = []
    mod = expand_block_scaled_gemms(IRModule({"main": kernel}), **options)

    def visit(node):
        if isinstance(node, tirx.Call) and getattr(node.op, "name", "") == GEMM_BLOCKSCALED:
            found.append(node)

    tirx.stmt_functor.post_order_visit(mod["main"].body, visit)
    return len(found)


NVFP4 = {"A": ((64, 64), FP4), "B": ((64, 64), FP4), "SFA": ((64, 1), "uint32"), "SFB": ((64, 1), "uint32")}


@pytest.mark.parametrize(
    ("arch", "options", "left"),
    [
        ("sm_120a", {**NVFP4, "granularity": (16, 16)}, 1),
        ("sm_120a", {**NVFP4, "granularity": (16, 16), "annotations": {"sf_layout": "blockscaled_chunk_kmajor"}}, 1),
        ("sm_120a", {**NVFP4, "granularity": (32, 32)}, 0),
        ("sm_120a", {}, 0),
        ("sm_90a", {**NVFP4, "granularity": (16, 16)}, 0),
    ],
)
def test_what_upstream_has_is_upstreams(arch, options, left):
    target = Target({"kind": "cuda", "arch": arch})
    assert calls_left(one(**options), is_upstreams=lambda call: has_instruction(call, target)) == left


REFUSED = [
    ({"annotations": {"sf_layout": "blockscaled_chunk_kmajor"}}, NotImplementedError,
     "sf_layout must be 'rowmajor' .*; got 'blockscaled_chunk_kmajor'; store the scales as"),
    ({"annotations": {"use_2cta": 1}}, NotImplementedError, "use_2cta needs C in the tensor memory of sm_100; got True"),
    ({"A": ((64, 64), "float16")}, TypeError, r"A must be float8_e4m3fn, .*, uint8; got float16 \(\w+\); convert it"),
    ({"C": ((64, 64), "int32")}, TypeError, "C must be float32, float16, bfloat16; got int32"),
    ({"SFA": ((64, 2), "int8")}, TypeError, "SFA must be uint32, uint8, .*; got int8"),
    ({"SFB": ((64, 2), FP4)}, TypeError, "SFB must be .*; got float4_e2m1fn .*; pass the codes as uint8"),
    ({"scopes": ("local", "fragment")}, TypeError, r"A must be shared or fragment but on sm_100; got \w+ in scope local; copy"),
    ({"SFA": ((32, 2), "uint8")}, ValueError, r"SFA must have one row per row of its operand, 64; got .*; slice the scales"),
    ({"SFB": ((64,), "uint32")}, ValueError, r"SFB must have rows and columns; got .*; one word per row is"),
    ({"granularity": (32, 0)}, ValueError, "the granularity of SFB must be at least 1; got 0"),
    ({"SFA": ((64, 2), "float32"), "k_start": 8}, ValueError,
     "with float scales a multiple of 16 of K must share its scales, from k_start on; got 8 of a tile of 64 from 8 on, with"),
    ({"SFA": ((64, 2), "float32"), "k_start": None}, ValueError, "with float scales .*; got 1 of a tile of 64 from bx"),
    ({"A": ((64, 12), PACKED), "B": ((64, 24), E4M3)}, ValueError, "K of tiles that are decoded must be .* 16; got 24; round"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused_when_it_is_lowered(options, error, message):
    with pytest.raises(error, match=r"T\.gemm_blockscaled: " + message):
        calls_left(one(**options))


@pytest.mark.parametrize(
    ("target", "dtype", "hint"),
    [
        ({"kind": "cuda", "arch": "sm_90a"}, "float8_e4m3fnuz", "convert codes and scales with .*fnuz_to_ocp"),
        ({"kind": "hip", "mcpu": "gfx942"}, FP4, "pass the codes as uint8"),
        ({"kind": "c"}, FP4, "pass the codes as uint8"),
    ],
)
def test_a_type_that_the_target_lacks_is_refused(target, dtype, hint):
    with pytest.raises(TypeError, match=rf"T\.gemm_blockscaled: A must be .*; got {dtype} \(A_s\); {hint}"):
        tilelang.lower(one(A=((64, 64), dtype)), target=Target(target), enable_device_compile=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"A": ((32, 64), E4M3)}, "M of A and C must agree; got 32 and 64"),
        ({"B": ((32, 64), E4M3)}, "N of B and C must agree; got 32 and 64"),
        ({"A": ((64, 64), PACKED)}, "K of A and B must agree; got 128 and 64; check the shapes"),
    ],
)
def test_shapes(options, message):
    with pytest.raises(ValueError, match=re.escape(f"T.gemm_blockscaled: {message}")):
        one(**options)


def test_scratch_is_shared_by_calls_of_one_sequence():
    """Gate and up of an expert, say: the decoded tiles of one call are over when the next begins."""
    shared = [
        buffer
        for buffer in buffers_of(program(Pair(PACKED, PACKED)))
        if buffer.scope() == "shared.dyn" and str(buffer.dtype) == "bfloat16"
    ]
    assert len(shared) == 2


def buffers_of(kernel):
    found = []
    body = expand_block_scaled_gemms(IRModule({"main": kernel}))["main"].body
    tirx.stmt_functor.post_order_visit(
        body, lambda node: found.extend(node.alloc_buffers) if isinstance(node, tirx.SBlock) else None
    )
    return found
