"""The kernels between the GEMMs of a mixture of experts on Hopper: every quotient and rows of any length, by running the CUDA
text on the CPU; and what kernels that use PDL do before the kernel before them has ended.
"""

import re

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import execute
from kernels.mxfp4_moe.sm90_cases import ARCH, quantized, text_of

from tilelang_ext.kernels.mxfp4_moe import sm90_mma, sm90_scatter, sm90_wgmma
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.routing import moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_scatter import PASS_CONFIGS
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import E4M3
from tilelang_ext.kernels.mxfp4_moe.sum_slots import PDL_PASS_CONFIGS, sum_slots


def quantize_sorted(x):
    """Every row of x as (codes, scale), by the kernel."""
    count, columns = x.shape
    codes, scale = torch.full(x.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((count,), torch.nan)
    tensors = {"x": x, "positions": torch.arange(count, dtype=torch.int32), "codes": codes, "scale": scale}
    text = text_of(sm90_scatter.quantize_sorted(columns), PASS_CONFIGS)
    execute(text, (count, 1), tensors, {}, {"slots": count, "rows": count})
    return codes, scale


@needs_compiler
def test_every_quotient():
    """All significands with all largest significands, down to what rounds to zero: the bits of a division rounded once."""
    significands = 1 + torch.arange(128) / 128
    largest = significands * torch.exp2(torch.arange(128) * 7 % 160 - 80.0)
    x = significands * torch.exp2(-torch.arange(20.0))[:, None] * torch.tensor([1, -1])[:, None, None]
    x = torch.minimum(x.flatten().abs(), significands[:, None]) * x.flatten().sign()  # one row per largest element
    x = (x * (largest / significands)[:, None]).bfloat16()
    x[:, 5] = -0.0
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("columns", [32, 2048, 2080, 8224])
def test_length(columns):
    """The largest element is first, in the middle, or last; rows are shorter than a warp's loads, whole loads, or longer."""
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    x[0, 0], x[1, columns // 2], x[2, -1] = 9, -9, 9
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_nvcc
def test_machine_code():
    """One division for the scale, one for its inverse, and none per element; no spills."""
    texts = {
        "scattered": text_of(sm90_scatter.scatter_quantized(7168), PASS_CONFIGS, "scattered"),
        "sorted": text_of(sm90_scatter.quantize_sorted(2048), PASS_CONFIGS, "sorted"),
    }
    for name, program in compile_texts(texts, ARCH).items():
        assert program.spilled == 0, name
        assert program.count("CALL") == 2, name


CONFIG, MMA_PASS_CONFIGS = sm90_mma.Config(8, 4, 2, 4), sm90_mma.PASS_CONFIGS
WITH_PDL = {
    # kernel: (prim_func, pass configurations, what the kernel before it writes or may still read, and what it writes itself)
    "scatter": (sm90_scatter.scatter, PASS_CONFIGS, ("positions", "sorted_x")),
    "scatter_quantized": (lambda: sm90_scatter.scatter_quantized(2880), PASS_CONFIGS, ("positions", "codes", "scale")),
    "quantize_sorted": (lambda: sm90_scatter.quantize_sorted(2880), PASS_CONFIGS, ("x", "codes", "scale")),
    "sum_slots": (lambda: sum_slots("bfloat16", "bfloat16", True), PDL_PASS_CONFIGS, ("partial", "out")),
    "gate_up": (lambda: sm90_mma.gate_up(CONFIG, Activation()), MMA_PASS_CONFIGS, ("token_ids", "expert_ids", "hidden")),
    "down": (lambda: sm90_mma.down(CONFIG, "reduce"), MMA_PASS_CONFIGS, ("hidden", "y")),
}


@pytest.mark.parametrize("name", WITH_PDL)
def test_kernels_with_pdl_wait(name):
    """Every block waits for the kernel before it, ahead of what that writes and of all stores; then the next may start."""
    make, pass_configs, others = WITH_PDL[name]
    text = text_of(make(), pass_configs, name)
    signature, body = text[text.rindex('extern "C" __global__') :].split("{", 1)
    assert "__restrict__" not in signature, "loads from memory that nothing seems to write may be moved ahead of the wait"
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
def test_persistent_gemms_wait(stage):
    """Producer and consumers each wait for the kernel before, ahead of all that it writes."""
    options = [Activation()] if stage == "gate_up" else ["reduce"]
    prim_func = getattr(sm90_wgmma, stage)(sm90_wgmma.Config(8, 2, 11), 132, *options, E4M3)
    text = text_of(prim_func, sm90_wgmma.PASS_CONFIGS, stage)
    body = text[text.rindex('extern "C" __global__') :].split("{", 1)[1]
    before, consumers, producer = body.split("cudaGridDependencySynchronize();")
    others = re.compile(r"tma_load\(|scale_x|scale_hidden|(?:hidden|y) \+")
    assert not others.search(before)
    until_wait = consumers[consumers.rindex("} else {") :]
    assert not others.search(until_wait)
    assert others.search(consumers)
    assert others.search(producer)
    assert "cudaTriggerProgrammaticLaunchCompletion();" not in before + consumers
    assert "cudaTriggerProgrammaticLaunchCompletion();" in producer


def test_sort_lets_the_next_kernel_start():
    first, second = (text_of(moe_sort(8, 64, "int32", triggers_next), {}, "sort") for triggers_next in (False, True))
    assert "cudaTriggerProgrammaticLaunchCompletion();" not in first
    assert "cudaTriggerProgrammaticLaunchCompletion();" in second
    assert "cudaGridDependencySynchronize();" not in second


def test_sum_stays_inside():
    """The kernel's own bounds checks are in the text, since the pass that adds them is off."""
    text = text_of(sum_slots("bfloat16", "bfloat16", True), PDL_PASS_CONFIGS)
    accesses = re.findall(r"if \((.*)\) \{\n.*\*\(uint4\*\)\((?:partial|out) ", text)
    assert len(accesses) == 9
    assert all("< groups" in condition for condition in accesses)
