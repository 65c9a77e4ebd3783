"""The kernels of the mixture of experts as CUDA text, with no GPU: machine code without spills, on the matrix unit."""

import pytest
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc

from tilelang_ext.kernels.mxfp4_moe_sort import moe_sort
from tilelang_ext.kernels.mxfp4_moe_stages import Activation, down, gate_up, pick_config, sum_slots

SMALL, LARGE = pick_config(1, 4, 32, "cuda"), pick_config(4096, 4, 32, "cuda")
PRODUCTS = {
    "gate_up": lambda: gate_up(LARGE, Activation(), "bfloat16"),
    "down": lambda: down(SMALL, "float16", "reduce"),
    "atomic": lambda: down(LARGE, "bfloat16", "atomic"),
}
OTHERS = {"sort": lambda: moe_sort(LARGE.block_M, 128, "int64"), "sum": lambda: sum_slots("bfloat16", "int64")}


@needs_nvcc
@pytest.mark.parametrize(("arch", "unit"), [("sm_80", "HMMA"), ("sm_90a", "HGMMA")])
def test_machine_code(arch, unit):
    kernels = PRODUCTS | OTHERS if arch == "sm_80" else PRODUCTS
    texts = {name: lower(make().with_attr("global_symbol", name), arch) for name, make in kernels.items()}
    compiled = compile_texts(texts, arch)
    assert not any(kernel.spilled for kernel in compiled.values()), compiled
    for name in PRODUCTS:
        assert compiled[name].count("HMMA" if name == "down" else unit), name  # 16 rows are too few for a warpgroup
