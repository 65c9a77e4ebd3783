"""Every kernel of the package as a prim_func, for tests and for `hash_prim_funcs.py`."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kernels.scaled_mm.operands import MX, ROW, ROW_BLOCK, SQUARE_BLOCK, problem

from tilelang_ext.kernels.mxfp4_moe import formats as activations
from tilelang_ext.kernels.mxfp4_moe import sm90_launch as hopper
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter as rows
from tilelang_ext.kernels.mxfp4_moe import tiled as stages
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.routing import count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_packing import OPERANDS
from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots
from tilelang_ext.kernels.scaled_mm import sm90_persistent, sm90_split_k, vecmat
from tilelang_ext.kernels.scaled_mm.operator import KERNELS

ACTIVATION, EPILOGUES = Activation(), ("reduce", "atomic")
ARCH = "sm_90a"


class Case(NamedTuple):
    """One prim_func: the function that makes it with its arguments, and the pass configurations it is compiled with."""

    name: str
    make: Callable
    arguments: tuple
    pass_configs: dict
    portable: bool  # whether Metal takes it too


def tiled_moe() -> Iterator[Case]:
    """The products of `mxfp4_moe` that every target has, and what quantises for them."""
    for kind in ("bfloat16", "fp8", "mxfp8", "mxfp4"):
        config, between = stages.pick_config(64, 4, 32, "cuda"), activations.between(kind)
        yield Case(f"moe gate_up {kind}", stages.gate_up, (config, ACTIVATION, kind), {}, True)
        for epilogue in EPILOGUES:
            yield Case(f"moe down {kind} {epilogue}", stages.down, (config, between, epilogue), {}, True)
        if kind == "fp8":
            yield Case("moe quantize_rows", activations.quantize_rows, ("bfloat16",), {}, True)
        elif kind != "bfloat16":
            yield Case(f"moe quantize_groups {kind}", activations.quantize_groups, (kind, "bfloat16"), {}, True)


def around_moe() -> Iterator[Case]:
    """What runs before, between and after the products of `mxfp4_moe`."""
    yield Case("moe sort", moe_sort, (16, 64), {}, True)
    yield Case("moe sort int64", moe_sort, (16, 1024, "int64", True), {}, False)
    yield Case("moe count", count_slots, (64,), {}, True)
    yield Case("moe sum_slots", sum_slots, ("bfloat16",), {}, True)
    yield Case("moe sm90 sum_slots", sum_slots, ("bfloat16", "bfloat16", True), rows.PASS_CONFIGS, False)
    yield Case("moe sm90 scatter", rows.scatter, (), rows.PASS_CONFIGS, False)
    yield Case("moe sm90 scatter_quantized", rows.scatter_quantized, (7168,), rows.PASS_CONFIGS, False)
    yield Case("moe sm90 quantize_sorted", rows.quantize_sorted, (2048,), rows.PASS_CONFIGS, False)


def moe_on_hopper() -> Iterator[Case]:
    """The products of `mxfp4_moe` on Hopper: a kernel of few tokens, and of two and four bands of rows."""
    for kind in OPERANDS:
        for _, _, module, config in hopper._TABLES[kind][::3]:
            operand = (OPERANDS[kind],) if module is hopper.many else ()
            name = f"moe sm90 {kind} {config.block_M}"
            yield Case(f"{name} gate_up", module.gate_up, (config, ACTIVATION, *operand), module.PASS_CONFIGS, False)
            for epilogue in EPILOGUES:
                yield Case(f"{name} down {epilogue}", module.down, (config, epilogue, *operand), module.PASS_CONFIGS, False)


def scaled_matmuls() -> Iterator[Case]:
    """The kernels of `scaled_mm` for few, for up to 128, and for many rows of a."""
    for recipes in ((ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK), (MX, MX)):
        for (M, N, K), fast_accum in itertools.product([(2, 4096, 512), (128, 4096, 7168), (4096, 2112, 512)], (False, True)):
            of_shape = problem(M, N, K, recipes, kind="cuda", arch=ARCH, fast_accum=fast_accum)
            module = next(module for module in KERNELS if module.takes(of_shape))
            make = module.vecmat if module is vecmat else module.scaled_matmul
            is_hopper = module in (sm90_persistent, sm90_split_k)
            name = f"scaled_mm {recipes[0].name} {M}x{N}x{K}{' fast' if fast_accum else ''}"
            configs = sm90_persistent.PASS_CONFIGS if is_hopper else {}
            yield Case(name, make, (of_shape, module.pick_config(of_shape)), configs, False)


FAMILIES = (tiled_moe, around_moe, moe_on_hopper, scaled_matmuls)
