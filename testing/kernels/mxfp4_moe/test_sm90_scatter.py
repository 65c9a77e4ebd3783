"""Rows of the mixture of experts on Hopper: every quotient, and rows of any length, by running the CUDA text on the CPU; what
launches that overlap do before the one before them has ended.
"""

import re
import types

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import execute
from kernels.mxfp4_moe.sm90_cases import ARCH, quantized, text_of

from tilelang_ext.kernels.mxfp4_moe import sm90_mma as few
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter as rows
from tilelang_ext.kernels.mxfp4_moe import sm90_wgmma as many
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.routing import moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_packing import E4M3
from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots


def quantize_sorted(x):
    """(codes, scale) of every row of x, by the kernel."""
    count, columns = x.shape
    codes, scale = torch.full(x.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((count,), torch.nan)
    tensors = {"x": x, "positions": torch.arange(count, dtype=torch.int32), "codes": codes, "scale": scale}
    execute(text_of(rows, rows.quantize_sorted(columns)), (count, 1), tensors, {}, {"slots": count, "rows": count})
    return codes, scale


@needs_compiler
def test_every_quotient():
    """All significands under all largest significands, to what rounds to zero: the bits of a division rounded once."""
    significands = 1 + torch.arange(128) / 128
    largest = significands * torch.exp2(torch.arange(128) * 7 % 160 - 80.0)
    x = significands * torch.exp2(-torch.arange(20.0))[:, None] * torch.tensor([1, -1])[:, None, None]
    x = torch.minimum(x.flatten().abs(), significands[:, None]) * x.flatten().sign()  # a row for each of `largest`
    x = (x * (largest / significands)[:, None]).bfloat16()
    x[:, 5] = -0.0
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("columns", [32, 2048, 2080, 8224])
def test_length(columns):
    """The largest element first, in the middle and last: less than a warp, whole steps, one more than them."""
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    x[0, 0], x[1, columns // 2], x[2, -1] = 9, -9, 9
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_nvcc
def test_machine_code():
    """A division for the scale, one for its inverse, and none for an element; no spills."""
    texts = {
        "scattered": text_of(rows, rows.scatter_quantized(7168), "scattered"),
        "sorted": text_of(rows, rows.quantize_sorted(2048), "sorted"),
    }
    for name, program in compile_texts(texts, ARCH).items():
        assert program.spilled == 0, name
        assert program.count("CALL") == 2, name


CONFIG = few.Config(8, 4, 2, 4)
OVERLAPPING = {
    # kernel: (module, prim_func, what the launch before writes or may still read, and what the kernel writes)
    "scatter": (rows, rows.scatter, ("positions", "sorted_x")),
    "scatter_quantized": (rows, lambda: rows.scatter_quantized(2880), ("positions", "codes", "scale")),
    "quantize_sorted": (rows, lambda: rows.quantize_sorted(2880), ("x", "codes", "scale")),
    "sum_slots": (rows, lambda: sum_slots("bfloat16", "bfloat16", True), ("partial", "out")),
    "gate_up": (few, lambda: few.gate_up(CONFIG, Activation()), ("token_ids", "expert_ids", "hidden")),
    "down": (few, lambda: few.down(CONFIG, "reduce"), ("hidden", "y")),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_launches_wait(name):
    """Every block waits for the launch before, ahead of what that writes and of all stores; then others may start."""
    module, make, others = OVERLAPPING[name]
    text = text_of(module, make(), name)
    signature, body = text[text.rindex('extern "C" __global__') :].split("{", 1)
    assert "__restrict__" not in signature, "loads for memory that no one writes may be moved, and find old lines"
    waits = body.split("cudaGridDependencySynchronize();")
    for other in others:
        assert not re.search(rf"(?<![.\w]){other}\b", waits[0]), other
        assert re.search(rf"(?<![.\w]){other}\b", waits[1]), other
    assert "cudaTriggerProgrammaticLaunchCompletion();" not in waits[0]
    assert ("cudaTriggerProgrammaticLaunchCompletion();" in waits[1]) == (name != "sum_slots")
    inside = waits[0].count("{") - waits[0].count("}")
    if name == "down":  # a block without an expert waits too
        assert (inside, len(waits)) == (1, 3)
        assert waits[1].rstrip().endswith("} else {")
    else:
        assert (inside, len(waits)) == (0, 2)


@pytest.mark.parametrize("stage", ["gate_up", "down"])
def test_products_wait(stage):
    """Threads that compute and threads that load wait for the launch before, ahead of all that it writes."""
    options = [Activation()] if stage == "gate_up" else ["reduce"]
    text = text_of(many, getattr(many, stage)(many.Config(8, 1, 2), *options, E4M3), stage)
    body = text[text.rindex('extern "C" __global__') :].split("{", 1)[1]
    before, computing, loading = body.split("cudaGridDependencySynchronize();")
    others = re.compile(r"tma_load\(|scale_x|scale_hidden|(?:hidden|y) \+")
    assert not others.search(before)
    until_wait = computing[computing.rindex("} else {") :]
    assert not others.search(until_wait)
    assert others.search(computing)
    assert others.search(loading)
    assert "cudaTriggerProgrammaticLaunchCompletion();" not in before + computing
    assert "cudaTriggerProgrammaticLaunchCompletion();" in loading


def test_sort_lets_the_next_launch_begin():
    own = types.SimpleNamespace(PASS_CONFIGS={})
    first, second = (text_of(own, moe_sort(8, 64, "int32", overlapped), "sort") for overlapped in (False, True))
    assert "cudaTriggerProgrammaticLaunchCompletion();" not in first
    assert "cudaTriggerProgrammaticLaunchCompletion();" in second
    assert "cudaGridDependencySynchronize();" not in second


def test_sum_stays_inside():
    """The text has its own limits: the pass that finds them is off."""
    text = text_of(rows, sum_slots("bfloat16", "bfloat16", True))
    accesses = re.findall(r"if \((.*)\) \{\n.*\*\(uint4\*\)\((?:partial|out) ", text)
    assert len(accesses) == 9
    assert all("< groups" in condition for condition in accesses)
