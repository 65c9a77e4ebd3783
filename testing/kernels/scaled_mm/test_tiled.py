"""The tiled kernel: values in the simulator, what it becomes on NVIDIA GPUs, which kernel and tile a problem gets."""

import pytest
import torch
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.scaled_mm.operands import E4M3, E5M2, MX, PAIRS, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, operands, problem
from numeric import assert_close
from simulator.mlx_figures import QMM_T_256

from tilelang_ext import simulate
from tilelang_ext.kernels.scaled_mm import operator, tiled, vecmat
from tilelang_ext.kernels.scaled_mm.problem import bucket_of
from tilelang_ext.kernels.scaled_mm.tiled import Config, pick_config


def run(M, N, K, recipes, *, format_a=E4M3, format_b=E4M3, bias=None, out="float32", fast_accum=False):
    """Check one launch in the simulator against float64."""
    arguments, expected = operands(M, N, K, recipes, format_a, format_b)
    kernel_problem = problem(M, N, K, recipes, a=format_a, b=format_b, bias=bias, out=out, fast_accum=fast_accum)
    extra = []
    if bias is not None:
        extra = [torch.randn(N, generator=torch.Generator().manual_seed(3)).to(getattr(torch, bias))]
        expected = expected + extra[0].double()
    result = torch.full((M, N), torch.nan, dtype=getattr(torch, out))
    kernel = tiled.scaled_matmul(kernel_problem, pick_config(kernel_problem))
    report = simulate(kernel, *arguments, *extra, result, timeout=300)
    assert not report.findings, str(report)
    assert_close(result, expected, dtype=out)
    return report.counts, [*arguments, *extra]


@pytest.mark.parametrize(
    "recipes",
    [pair for pair in PAIRS if pair not in ((ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK))],  # in the tests below
    ids=lambda pair: "-".join(recipe.name for recipe in pair),
)
def test_recipes(recipes):
    """Two tiles of rows and two of columns, none of them full; the last step of K is not full either."""
    run(70, 150, 288, recipes, bias="bfloat16")


@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK), (MX, MX)], ids=str)
def test_device_bytes(recipes):
    """Each tile reads its rows of A, its rows of B, and their scales and its part of the bias once.

    Per MMA that is fewer threadgroup bytes than MLX's `fp_qmm_t` reads and writes.
    """
    config = pick_config(problem(64, 128, 512, recipes))
    rows, columns = 64 // config.block_M, 128 // config.block_N
    counts, (a, scale_a, b, scale_b, bias) = run(64, 128, 512, recipes, bias="float32")
    scales_b = rows * (columns if scale_b.shape[0] == 1 else 1)  # a block of scales that all tiles of columns need
    least = columns * (a.nbytes + scale_a.nbytes) + rows * (b.nbytes + bias.nbytes) + scales_b * scale_b.nbytes
    assert least <= counts.device_bytes_read <= 1.02 * least
    assert counts.threadgroup_bytes_read < QMM_T_256[8].threadgroup_read * counts.mma
    assert counts.threadgroup_bytes_written < QMM_T_256[8].threadgroup_written * counts.mma


@pytest.mark.parametrize(("out", "bias"), [("float16", "float32"), ("bfloat16", None)])
def test_outputs_and_mixed_operands(out, bias):
    run(9, 66, 256, (ROW, ROW), format_b=E5M2, out=out, bias=bias)


def test_fast_accumulation():
    run(9, 33, 384, (TENSOR, TENSOR), fast_accum=True)


def test_short_k():
    run(5, 33, 24, (ROW, ROW))


# --- CUDA ------------------------------------------------------------------------------------------------------------

RECIPES = {"row": (ROW, ROW), "block": (ROW_BLOCK, SQUARE_BLOCK), "mx": (MX, MX)}


def texts(M, N, K, arch, names=tuple(RECIPES), **options):
    """The CUDA texts of the kernels that RECIPES get for this size, under their names."""
    sources = {}
    for name in names:
        recipes = RECIPES[name]
        kernel_problem = problem(M, N, K, recipes, kind="cuda", arch=arch, out="bfloat16", bias="bfloat16", **options)
        if vecmat.takes(kernel_problem):
            config = vecmat.pick_config(kernel_problem)
            kernel = vecmat.vecmat(kernel_problem, config)
        else:
            kernel = tiled.scaled_matmul(kernel_problem, pick_config(kernel_problem))
        sources[name] = lower(kernel.with_attr("global_symbol", name), arch)
    return sources


@needs_nvcc
def test_hopper_instructions():
    """WGMMA fed by TMA. The loops of float32 scales are those that target cuda rebuilds, with accumulators that live across
    steps: no step has a fragment of its own for them. MX scales are applied step by step.
    """
    sources = texts(4096, 4096, 7168, "sm_90a")
    assert all(source.count("tl::tma_load(") >= 2 for source in sources.values())
    for name, kernel in compile_texts(sources, "sm_90a").items():
        assert kernel.count("QGMMA"), name
        assert not kernel.count("QMMA"), name
        assert kernel.spilled <= (8 if name == "mx" else 0), name
    assert {name: source.count("float total[") for name, source in sources.items()} == {"row": 0, "block": 0, "mx": 1}
    fast = texts(4096, 4096, 7168, "sm_90a", ["row"], fast_accum=True)["row"]
    assert "float total[" not in fast
    assert len(fast) < len(sources["row"]), "accumulators stay in the matrix unit only when asked for"


@needs_nvcc
@pytest.mark.parametrize("M", [1, 4])
def test_vecmat_instructions(M):
    """Each thread loads two rounds of 16 bytes of 4 rows of b and of a, before it decodes anything."""
    for name, kernel in compile_texts(texts(M, 4096, 7168, "sm_90a"), "sm_90a").items():
        wide = sum(n for op, n in kernel.instructions.items() if op.startswith("LDG"))
        assert wide >= 2 * (4 + M), name
        assert not any(kernel.count(op) for op in ("QGMMA", "HMMA", "QMMA")), name
        assert kernel.spilled == 0, name


@pytest.mark.parametrize(("arch", "M"), [("sm_80", 4096), ("sm_89", 1), ("sm_120a", 4096)])
def test_lowers_elsewhere(arch, M):
    """Lowering takes seconds there, more with guards of partial tiles: hence one recipe and whole tiles."""
    assert "__global__" in texts(M, 2048, 1536, arch, ["row"])["row"]


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "bucket"), [(1, 1), (4, 4), (5, 16), (16, 16), (17, 32), (128, 128), (129, 256), (4096, 4096)])
def test_buckets(M, bucket):
    assert bucket_of(M) == bucket


def test_pick_config():
    hopper, ada = {"kind": "cuda", "arch": "sm_90a"}, {"kind": "cuda", "arch": "sm_89"}
    assert pick_config(problem(64, 64, 64, (ROW, ROW), **hopper)) == Config(64, 128, 4, 128)
    assert pick_config(problem(65, 64, 64, (ROW, ROW), **hopper)) == Config(128, 128, 4, 256)
    assert pick_config(problem(65, 64, 64, (ROW, ROW), **ada)) == Config(128, 128, 3, 256)


def test_batch_sizes_that_share_a_tile_share_a_kernel():
    """They are compiled with equal arguments."""

    def compile(make, *arguments):
        return arguments

    made = [problem(M, 64, 128, (ROW, ROW), kind="cuda", arch="sm_90a") for M in (5, 33, 128, 513, 4096)]
    assert len({tiled.compile_kernel(each, compile) for each in made}) == 2


def test_first_kernel_that_takes_a_problem():
    def kernel_of(M):
        return next(file for file in operator.KERNELS if file.takes(problem(M, 64, 64, (ROW, ROW))))

    assert kernel_of(4) is vecmat
    assert kernel_of(5) is tiled
