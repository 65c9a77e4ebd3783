"""The kernels of scaled_mm on AMD: compiled for every architecture, executed from their text, and the door of ROCm's torch."""

import functools

import pytest
import torch
from kernels.scaled_mm.operands import E4M3, E5M2, MX, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, operands, problem
from kernels.scaled_mm.recording import key, record_kernels
from numeric import assert_close
from rocm.gates import SCALED, gate, gated
from rocm.kernels import ARCHS, lower

from tilelang_ext import formats, simulate
from tilelang_ext.kernels.scaled_mm import operator, tiled, vecmat

RECIPES = {"tensor": (TENSOR, TENSOR), "row": (ROW, ROW), "block": (ROW_BLOCK, SQUARE_BLOCK), "e8m0": (MX, MX)}


def kernel_of(made):
    """The prim_func that a problem gets on AMD."""
    if vecmat.takes(made):
        return vecmat.vecmat(made, vecmat.pick_config(made))
    return tiled.scaled_matmul(made, tiled.pick_config(made))


def hip(M, N, K, recipes, arch, **options):
    return problem(M, N, K, recipes, kind="hip", arch=arch, **options)


# Two of the four on each chip, and each on waves of 64 and of 32; the other two are in test_values.py and test_compile.py, of
# the intrinsic that multiplies here.
TILED = {
    "gfx90a": ["tensor", "block"],
    "gfx942": ["row", "e8m0"],
    "gfx950": ["block", "e8m0"],
    "gfx1100": ["row", "block"],
    "gfx1201": ["tensor", "e8m0"],
}


@functools.cache
def tiled_kernel(name, arch):
    """A problem that ends inside tiles and K blocks, the tiles for many rows, and the kernel, which is run and compiled."""
    options = {"recipes": RECIPES[name], "arch": arch, "out": "bfloat16", "bias": "bfloat16"}
    config, made = tiled.pick_config(hip(4096, 150, 288, **options)), hip(70, 150, 288, **options)
    return made, config, tiled.scaled_matmul(made, config)


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.hip
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile(arch):
    """No spills; the matrix instruction of the operands, on every 16x16 tile of a wave the same number of times."""
    wave = 64 if arch.startswith("gfx9") else 32
    gates = {}
    for name in TILED[arch]:
        _, config, kernel = tiled_kernel(name, arch)
        tiles = config.block_M // 16 * config.block_N // 16 // (config.threads // wave)
        gates[f"tiled_{name}"] = gated(kernel, arch, SCALED[name][arch], tiles)
    # Few rows are read by tilelang's casts, which know FNUZ alone on gfx942.
    flavours = {"a": formats.E5M2_FNUZ, "b": formats.E4M3_FNUZ} if arch == "gfx942" else {}
    for name in ("e8m0",) if arch in ("gfx950", "gfx1100") else ("row",):
        made = hip(4, 4096, 7168, RECIPES[name], arch, out="bfloat16", bias="bfloat16", **flavours)
        gates[f"vecmat_{name}"] = gated(kernel_of(made), arch, None, tiles=1)
    gate(gates, arch)


# --- executed --------------------------------------------------------------------------------------------------------


def check(M, made, kernel, recipes, format_a=E4M3, format_b=E4M3):
    """Check one launch in the simulator against float64; rows, columns and K past the last whole tile, result poisoned."""
    arguments, expected = operands(M, made.N, made.K, recipes, format_a, format_b)
    extra = []
    if made.bias_dtype is not None:
        generator = torch.Generator().manual_seed(3)
        extra = [torch.randn(made.N, generator=generator).to(getattr(torch, made.bias_dtype))]
        expected = expected + extra[0].double()
    result = torch.full((M, made.N), torch.nan, dtype=getattr(torch, made.out_dtype))
    report = simulate(lower(kernel, made.arch), *arguments, *extra, result, target={"kind": "hip", "mcpu": made.arch})
    assert not report.findings, str(report)
    assert_close(result, expected, dtype=made.out_dtype)


def run(arch, M, N, K, recipes, *, format_a=E4M3, format_b=E4M3, bias=None, out="float32"):
    made = hip(M, N, K, recipes, arch, a=format_a, b=format_b, bias=bias, out=out)
    check(M, made, kernel_of(made), recipes, format_a, format_b)


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for arch, names in TILED.items() for name in names])
def test_tiled_kernel(name, arch):
    made, _, kernel = tiled_kernel(name, arch)
    check(70, made, kernel, RECIPES[name])


@pytest.mark.parametrize(("arch", "name"), [("gfx90a", "block"), ("gfx950", "e8m0"), ("gfx1100", "e8m0"), ("gfx1201", "block")])
def test_vecmat_kernel(arch, name):
    run(arch, 3, 33, 4096 + 32, RECIPES[name], bias="float16", out="bfloat16")


FNUZ = {"format_a": formats.E5M2_FNUZ, "format_b": formats.E4M3_FNUZ}


def test_vecmat_kernel_on_mi300():
    run("gfx942", 3, 33, 4096 + 32, (ROW, ROW), **FNUZ)


@pytest.mark.parametrize(("arch", "format_b"), [("gfx942", E4M3), ("gfx950", E5M2)])
def test_mixed_flavours(arch, format_b):
    run(arch, 2, 66, 256, (ROW, ROW), format_a=formats.E4M3_FNUZ, format_b=format_b)


# --- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rocm(monkeypatch):
    """A ROCm build of torch on a machine with an MI300."""

    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"
        multi_processor_count = 304

    kernels = record_kernels(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2fnuz])
def test_problem_of_a_launch(rocm, dtype):
    """The architecture without its modes; every flavour."""
    operator._compile(key(a=dtype), False)
    (made,) = rocm.problems
    assert (made.target_kind, made.arch, made.a_dtype) == ("hip", "gfx942", str(dtype).removeprefix("torch."))


def test_launch_makes_scales_contiguous(rocm):
    """Kernels of AMD take no strides of scales."""
    (a, scale, b, _), _ = operands(5, 5, 256, (ROW_BLOCK, ROW_BLOCK))
    transposed = scale.t().contiguous().t()
    run = operator._compile(key(recipes=(ROW_BLOCK, ROW_BLOCK), bias=None), False)
    operator._launch(run, a, transposed, b, transposed, None, torch.empty(5, 5))
    (given,) = rocm.launches
    assert given[1].is_contiguous()
    assert given[3].is_contiguous()
    assert torch.equal(given[1], scale)


def test_first_kernel_that_takes_a_problem():
    def taken(M):
        return next(file for file in operator.KERNELS if file.takes(hip(M, 64, 64, (ROW, ROW), "gfx950")))

    assert taken(4) is vecmat
    assert taken(5) is tiled


@pytest.mark.parametrize(
    ("arch", "options", "taken"),
    [("gfx942", {}, False), ("gfx942", {"a": formats.E5M2_FNUZ, "b": formats.E4M3_FNUZ}, True), ("gfx1201", {}, True),
     ("gfx950", {"b": formats.E4M3_FNUZ}, False)],
)  # fmt: skip
def test_a_flavour_that_casts_read_wrongly_goes_to_the_matrix_unit(arch, options, taken):
    assert vecmat.takes(hip(1, 64, 64, (ROW, ROW), arch, **options)) is taken
