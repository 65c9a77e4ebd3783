"""The kernels of the mixture of experts as CUDA text, with no GPU: machine code without spills, values by running the text."""

import functools

import pytest
import tilelang
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.mxfp4_moe.operands import MX, SWIGLU, TOP_K, TOPK_IDS, E, H, I, arguments, case, problem
from numeric import assert_close

from tilelang_ext import formats, quantization, reference
from tilelang_ext.kernels.mxfp4_moe.formats import quantize_rows
from tilelang_ext.kernels.mxfp4_moe.routing import count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots
from tilelang_ext.kernels.mxfp4_moe.tiled import down, gate_up, pick_config

pytestmark = pytest.mark.skipif(tilelang.__version__.startswith("0.1.14"), reason="upstream's CUDA does not compile")
LARGE = pick_config(problem(4096, 4, 32))  # 256 threads, and the most registers
KERNELS = {
    "gate_up": lambda: gate_up(LARGE, SWIGLU, "mxfp8"),
    "down": lambda: down(LARGE, "mxfp8", "reduce"),
    "wide": lambda: gate_up(LARGE, SWIGLU, "bfloat16"),
    "count": lambda: count_slots(128, "int64"),
    "sort": lambda: moe_sort(LARGE.block_M, 128, "int64"),
    "rows": lambda: quantize_rows("bfloat16"),
    "sum": lambda: sum_slots("bfloat16"),
}


@functools.cache
def text(name, arch):
    return lower(KERNELS[name]().with_attr("global_symbol", name), arch)


@needs_nvcc
@pytest.mark.parametrize(
    ("arch", "names", "unit"),
    [("sm_80", ("gate_up", "down", "count", "sort", "rows", "sum"), "HMMA"), ("sm_90a", ("wide",), "HGMMA")],
)
def test_machine_code(arch, names, unit):
    compiled = compile_texts({name: text(name, arch) for name in names}, arch)
    assert not any(kernel.spilled for kernel in compiled.values()), compiled
    for name in {"gate_up", "down", "wide"} & compiled.keys():
        assert compiled[name].count(unit), name


@needs_compiler
def test_values():
    """Both GEMMs, one block of threads after the other; padding is poison."""
    x, topk_weights, w13, w2, *_ = case()
    rows = reference.moe_sort(TOPK_IDS, topk_weights, E, LARGE.block_M)
    blocks, tokens = len(rows.expert_ids), len(x)
    codes, scale = quantization.quantize(x, formats.E4M3, MX)
    hidden = torch.full((blocks * LARGE.block_M, I), 0x7F, dtype=torch.uint8)  # NaN
    scale_hidden = torch.full((blocks * LARGE.block_M, I // 32), 255, dtype=torch.uint8)
    tensors = rows._asdict() | {"x": codes.view(torch.uint8), "scale_x": scale, "hidden": hidden, "scale_hidden": scale_hidden}
    tensors |= dict(zip(("w13", "scale13", "bias13", "w2", "scale2", "bias2"), (*w13, *w2), strict=True))
    sizes = {"blocks": blocks, "experts": E, "tokens": tokens, "groups_H": H // 32, "groups_I": I // 32, "H": H, "top_k": TOP_K}

    def run(name, weights):
        _, stored_rows, groups = weights[1].shape
        stored = {"rows": stored_rows, "stored_H": stored_rows, "groups": groups}
        execute(text(name, "sm_80"), (-(-max(H, I) // LARGE.block_N), blocks), tensors, sizes | stored)

    run("gate_up", w13)
    tensors["y"] = torch.full((tokens, TOP_K, H), torch.nan)
    run("down", w2)
    assert tensors["y"][4, 1].isnan().all(), "no expert 9 wrote"
    tensors["y"][4, 1] = 0
    assert_close(tensors["y"].sum(1), arguments(a_format="mxfp8")[1], dtype="float32")
