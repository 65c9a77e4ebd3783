"""`mxfp4_moe` on AMD: what it launches is executed from its text and compiled, each kernel lowered once; and what the operator
does on a ROCm build of torch.
"""

import functools
from dataclasses import replace

import pytest
import torch
from kernels.mxfp4_moe.operands import SWIGLU, arguments, problem
from numeric import assert_close
from rocm.gates import MOE, Gated, gate

from tilelang_ext import simulate
from tilelang_ext.kernels.mxfp4_moe import formats, tiled
from tilelang_ext.kernels.mxfp4_moe import launch as moe_launch
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.routing import count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots
from tilelang_ext.rocm import program

GEMMS = (tiled.gate_up, tiled.down)
COSINE = 0.9999  # of the mean row, as other targets' tests have it


@functools.cache
def lowered(make, options, arch):
    """The program of a kernel; what is no GEMM has the text of MI300 on each chip (test_text_around_the_gemms)."""
    if make not in GEMMS and arch != "gfx942":
        return replace(lowered(make, options, "gfx942"), arch=arch)
    return program.lower(make(*options), f"hip -mcpu={arch}")


@pytest.fixture
def launched(request, monkeypatch):
    """Tensors on the CPU get the launches of a GPU, on memory full of NaN; returns (function that made it, program) of each."""
    arch, programs = request.param, []

    def compiled(make, options, device, pass_configs):
        made = lowered(make, options, arch)
        programs.append((make, made))

        def run(*tensors):
            report = simulate(made, *tensors, target={"kind": "hip", "mcpu": arch}, timeout=300)
            assert not report.findings, str(report)

        return run

    monkeypatch.setattr(moe_operator, "_by_reference", functools.partial(moe_launch.launch, compiled=compiled))
    torch.use_deterministic_algorithms(True)
    yield programs
    torch.use_deterministic_algorithms(False)


# Pairwise: each chip, each format, and each epilogue on waves of 64 and of 32. The formats decode to the same instruction.
CASES = [
    ("gfx942", "mxfp4", "atomic"),
    ("gfx950", "fp8", "reduce"),
    ("gfx1100", "bfloat16", "atomic"),
    ("gfx1201", "mxfp4", "reduce"),
]


def gated(make, made):
    return Gated(made.source, made.dynamic_lds, MOE[made.arch] if make in GEMMS else None)


@pytest.mark.hip
@pytest.mark.parametrize(("launched", "a_format", "epilogue"), CASES, indirect=["launched"])
def test_values_and_machine_code(launched, a_format, epilogue):
    operands, expected = arguments(a_format=a_format)
    a_dtype = None if a_format == "bfloat16" else a_format
    out = torch.full_like(operands[0], torch.nan)
    mxfp4_moe(*operands, activation=SWIGLU, a_dtype=a_dtype, epilogue=epilogue, out=out)
    assert torch.nn.functional.cosine_similarity(out.double(), expected, dim=1).mean() >= COSINE
    assert_close(out, expected, dtype="bfloat16", max_error=None if a_dtype is None else 0.03)
    arch = launched[0][1].arch
    assert [made.arch for _, made in launched] == [arch] * len(launched)
    assert {make for make, _ in launched} >= set(GEMMS)
    gate({f"{made.name}_{i}": gated(make, made) for i, (make, made) in enumerate(launched)}, arch)


# What a layer launches, as `launched` lowers it.
AROUND = {
    sum_slots: ("bfloat16", "float32", False),
    moe_sort: (16, 64, "int64", False),
    count_slots: (64, "int64"),
    formats.quantize_rows: ("bfloat16",),
    formats.quantize_groups: ("mxfp4", "bfloat16"),
}
MI200 = {tiled.down: (tiled.Config(16), "bfloat16", "reduce")}  # gate_up: test_machine_code_of_larger_tiles


@pytest.mark.hip
def test_machine_code_of_mi200():
    """Its instruction for bfloat16 is not that of MI300, so the GEMMs have texts of their own; the others are the same."""
    programs = {make: lowered(make, options, "gfx90a") for make, options in AROUND.items()}
    programs |= {make: lowered(make, options, "gfx90a") for make, options in MI200.items()}
    gates = {
        make.__name__: Gated(made.source, made.dynamic_lds, MOE["gfx90a"] if make in GEMMS else None)
        for make, made in programs.items()
    }
    gate(gates, "gfx90a")


@pytest.mark.parametrize("make", AROUND, ids=lambda make: make.__name__)
def test_text_around_the_gemms(make):
    """The same on a chip with waves of 32, without matrix units for fp8, as on MI300."""
    options = AROUND[make]
    assert program.lower(make(*options), "hip -mcpu=gfx1100").source == lowered(make, options, "gfx942").source


@pytest.mark.hip
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_machine_code_of_larger_tiles(arch):
    """The largest tile that `pick_config` returns, for 128 tokens, since it spills first; gate_up holds twice the accumulators
    of down.
    """
    config = tiled.pick_config(problem(128, 1, 1, target_kind="hip"))
    assert config.block_M == 128
    made = lowered(tiled.gate_up, (config, SWIGLU, "bfloat16"), arch)
    gate({made.name: gated(tiled.gate_up, made)}, arch)
