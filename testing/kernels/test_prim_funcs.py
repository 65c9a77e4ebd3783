"""Every kernel as a prim_func: what one version of tilelang takes of Python within a kernel, another may not."""

import itertools

import pytest
from kernels.operands import MX, ROW, ROW_BLOCK, SQUARE_BLOCK
from kernels.test_scaled_matmul_sm90 import hopper_problem

from tilelang_ext.kernels import mxfp4_moe_activations as activations
from tilelang_ext.kernels import mxfp4_moe_sm90_launch as hopper
from tilelang_ext.kernels import mxfp4_moe_sm90_rows as rows
from tilelang_ext.kernels import mxfp4_moe_stages as stages
from tilelang_ext.kernels import scaled_matmul_vecmat
from tilelang_ext.kernels.mxfp4_moe_sm90_tiles import OPERANDS
from tilelang_ext.kernels.mxfp4_moe_sort import count_slots, moe_sort
from tilelang_ext.kernels.scaled_matmul import KERNELS

ACTIVATION, EPILOGUES = stages.Activation(), ("reduce", "atomic")


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "mxfp8", "mxfp4"])
def test_moe(kind):
    config, between = stages.pick_config(64, 4, 32, "cuda"), activations.between(kind)
    stages.gate_up(config, ACTIVATION, kind)
    for epilogue in EPILOGUES:
        stages.down(config, between, epilogue)
    if kind == "fp8":
        activations.quantize_rows("bfloat16")
    elif kind != "bfloat16":
        activations.quantize_groups(kind, "bfloat16")


def test_around_moe():
    moe_sort(16, 64)
    moe_sort(16, 1024, "int64", overlapped=True)
    count_slots(64)
    stages.sum_slots("bfloat16")
    rows.sum_slots()
    rows.scatter()
    rows.scatter_quantized(7168)
    rows.quantize_sorted(2048)


@pytest.mark.parametrize("kind", OPERANDS)
def test_moe_on_hopper(kind):
    for _, _, module, config in hopper._TABLES[kind][::3]:  # a kernel of few tokens, and of two and four bands
        operand = [OPERANDS[kind]] if module is hopper.many else []
        module.gate_up(config, ACTIVATION, *operand)
        for epilogue in EPILOGUES:
            module.down(config, epilogue, *operand)


@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK), (MX, MX)])
def test_scaled_matmul(recipes):
    for (M, N, K), fast_accum in itertools.product([(2, 4096, 512), (128, 4096, 7168), (4096, 2112, 512)], (False, True)):
        problem = hopper_problem(M, N, K, recipes, fast_accum=fast_accum)
        module = next(module for module in KERNELS if module.takes(problem))
        make = module.vecmat if module is scaled_matmul_vecmat else module.scaled_matmul
        make(problem, module.pick_config(problem))
