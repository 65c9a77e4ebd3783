"""Every kernel of the package as a prim_func, for tests and for `hash_prim_funcs.py`."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kernels.attention import operands as attention_operands
from kernels.matmul import operands as matmul_operands
from kernels.scaled_mm.operands import MX, ROW, ROW_BLOCK, SQUARE_BLOCK, problem

from tilelang_ext.kernels.attention import decode_launch
from tilelang_ext.kernels.attention.launch import KERNELS as ATTENTION_KERNELS
from tilelang_ext.kernels.attention.problem import DecodeProblem
from tilelang_ext.kernels.gated_delta import decode, prefill_launch, replay, solve_chunks
from tilelang_ext.kernels.gated_delta.config import pick_config
from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem
from tilelang_ext.kernels.gated_delta.problem import Problem as GatedDelta
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS
from tilelang_ext.kernels.matmul.operator import KERNELS as MATMUL_KERNELS
from tilelang_ext.kernels.mxfp4_moe import formats, sm90_mma, sm90_scatter, sm90_wgmma, tiled
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.routing import count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE_FORMATS
from tilelang_ext.kernels.mxfp4_moe.sum_slots import PDL_PASS_CONFIGS, sum_slots
from tilelang_ext.kernels.scaled_mm.operator import KERNELS

ACTIVATION, EPILOGUES = Activation(), ("reduce", "atomic")
ARCH, NUM_SMS = "sm_90a", 132  # of an H200
CUDA, METAL, BOTH = ("cuda",), ("metal",), ("cuda", "metal")


class Case(NamedTuple):
    """One prim_func: the function that makes it with its arguments, and the pass configurations it is compiled with."""

    name: str
    make: Callable
    arguments: tuple
    pass_configs: dict
    targets: tuple[str, ...]  # that take it


def tiled_moe() -> Iterator[Case]:
    """The GEMMs of `mxfp4_moe` that every target has, and the quantisation for them."""
    config = tiled.Config(16)
    for a_format in ("bfloat16", "fp8", "mxfp8", "mxfp4"):
        hidden_format = formats.hidden_format(a_format)
        yield Case(f"moe gate_up {a_format}", tiled.gate_up, (config, ACTIVATION, a_format), {}, BOTH)
        for epilogue in EPILOGUES:
            yield Case(f"moe down {a_format} {epilogue}", tiled.down, (config, hidden_format, epilogue), {}, BOTH)
        if a_format == "fp8":
            yield Case("moe quantize_rows", formats.quantize_rows, ("bfloat16",), {}, BOTH)
        elif a_format != "bfloat16":
            yield Case(f"moe quantize_groups {a_format}", formats.quantize_groups, (a_format, "bfloat16"), {}, BOTH)


def around_moe() -> Iterator[Case]:
    """What runs before, between and after the GEMMs of `mxfp4_moe`."""
    pass_configs = sm90_scatter.PASS_CONFIGS
    yield Case("moe sort", moe_sort, (16, 64), {}, BOTH)
    yield Case("moe sort int64", moe_sort, (16, 1024, "int64", True), {}, CUDA)
    yield Case("moe count", count_slots, (64,), {}, BOTH)
    yield Case("moe sum_slots", sum_slots, ("bfloat16",), {}, BOTH)
    yield Case("moe sm90 sum_slots", sum_slots, ("bfloat16", "bfloat16", True), PDL_PASS_CONFIGS, CUDA)
    yield Case("moe sm90 scatter", sm90_scatter.scatter, (), pass_configs, CUDA)
    yield Case("moe sm90 scatter_quantized", sm90_scatter.scatter_quantized, (7168,), pass_configs, CUDA)
    yield Case("moe sm90 quantize_sorted", sm90_scatter.quantize_sorted, (2048,), pass_configs, CUDA)


def moe_on_hopper() -> Iterator[Case]:
    """The GEMMs of `mxfp4_moe` on Hopper: for few tokens, and with one, two and four tiles of rows per warpgroup."""
    kernels = [("bfloat16", sm90_mma, sm90_mma.Config(8, 4, 2, 4), ())]
    for a_format, configs in {
        "bfloat16": [(24, 4, 9), (128, 2, 7)],
        "fp8": [(8, 2, 11), (32, 4, 5), (256, 1, 4, (192,))],
    }.items():
        tile_format = (TILE_FORMATS[a_format],)
        kernels += [(a_format, sm90_wgmma, sm90_wgmma.Config(*sizes), tile_format) for sizes in configs]
    for a_format, module, config, tile_format in kernels:
        name, blocks = f"moe sm90 {a_format} {config.block_M}", (NUM_SMS,) if tile_format else ()
        first = config, *blocks, ACTIVATION, *tile_format
        yield Case(f"{name} gate_up", module.gate_up, first, module.PASS_CONFIGS, CUDA)
        for epilogue in EPILOGUES:
            second = config, *blocks, epilogue, *tile_format
            yield Case(f"{name} down {epilogue}", module.down, second, module.PASS_CONFIGS, CUDA)


def scaled_matmuls() -> Iterator[Case]:
    """The kernels of `scaled_mm` for few, for up to 128, and for many rows of a."""
    sizes = [(2, 4096, 512), (16, 27648, 5120), (128, 4096, 7168), (4096, 2112, 512)]
    for recipes in ((ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK), (MX, MX)):
        for (M, N, K), fast_accum in itertools.product(sizes, (False, True)):
            of_shape = problem(M, N, K, recipes, kind="cuda", arch=ARCH, fast_accum=fast_accum)
            listed = Listed()
            next(module for module in KERNELS if module.takes(of_shape)).compile_kernel(of_shape, listed.compile)
            [(make, arguments, configs)] = listed.kernels
            name = f"scaled_mm {recipes[0].name} {M}x{N}x{K}{' fast' if fast_accum else ''}"
            yield Case(name, make, arguments, configs, CUDA)


class Listed:
    """Stands in for what compiles kernels: keeps what it is asked for."""

    def __init__(self):
        self.kernels = []

    def compile(self, make, *arguments, pass_configs=None):
        self.kernels.append((make, arguments, pass_configs or {}))


def matmuls() -> Iterator[Case]:
    """The kernels of `matmul`: tiled, persistent, swapped, in splits, after copies; with every part of the epilogue."""
    ALL, BF16 = matmul_operands.ALL, matmul_operands.BF16
    for name, of in {
        "tiled": matmul_operands.problem(200, 136, 100, epilogue=ALL, arch="sm_80"),
        "padded": matmul_operands.problem(200, 133, 99, epilogue=ALL),
        "padded splits": matmul_operands.problem(16, 1027, 8193, b_is_k_major=False, epilogue=ALL),
        "large": matmul_operands.problem(4096, 4096, 4096, b_is_k_major=False, epilogue=ALL),
        "cluster": matmul_operands.problem(4096, 4096, 4104),
        "swapped": matmul_operands.problem(300, 7168, 2048, epilogue=ALL),
        "split": matmul_operands.problem(16, 1024, 8192, epilogue=ALL),
        "added": matmul_operands.problem(128, 4096, 7168, epilogue=ALL),
        "turned": matmul_operands.problem(8, 16384, 16384, BF16, a_is_k_major=False),
    }.items():
        listed = Listed()
        next(file for file in MATMUL_KERNELS if file.takes(of)).compile_kernel(of, listed)
        for make, arguments, pass_configs in listed.kernels:
            yield Case(f"matmul {name} {make.__name__}", make, arguments, pass_configs, CUDA)


def gated_delta() -> Iterator[Case]:
    """The kernels of the gated delta rule, with a gate per head and per channel, on Hopper and elsewhere."""
    sizes = {"tokens": 1, "qk_heads": 4, "heads": 8, "K": 128, "V": 128, "dtype": "bfloat16", "state_dtype": "float32"}
    for kind, num_sms in (("cuda", NUM_SMS), ("metal", 0)):
        for name, make, options in (
            ("decode", decode.decode, {}),
            ("verify", decode.decode, {"tokens": 4, "each_token": True, "per_channel": True}),
            ("replay", replay.replay, {"limit": 8}),
        ):
            problem = GatedDelta(kind, num_sms, **{**sizes, **options})
            configs = PASS_CONFIGS if kind == "cuda" else {}
            yield Case(f"gated_delta {name} for {kind}", make, (problem, pick_config(problem, 8)), configs, (kind,))
    for name, kind, arch in (("hopper", "cuda", ARCH), ("metal", "metal", "")):
        of = PrefillProblem(kind, arch, NUM_SMS, 4, 8, 128, 128, "bfloat16", "float32", has_initial=True, has_lengths=True)
        listed = Listed()
        solve_chunks.compile_kernel(of, listed)
        prefill_launch.implementation_of(of).compile_kernel(of, 1, listed)
        for make, arguments, pass_configs in listed.kernels:
            yield Case(f"gated_delta_prefill {name} {make.__name__}", make, arguments, pass_configs, CUDA if arch else METAL)


def attentions() -> Iterator[Case]:
    """The kernels of `attention`: each head size and mask, on Hopper and elsewhere."""
    for name, of in {
        "causal": attention_operands.problem(64, causal=True, has_sinks=True),
        "window": attention_operands.problem(128, window=128, has_lengths=True),
        "full": attention_operands.problem(256),
        "wide": attention_operands.problem(512, causal=True, has_lengths=True),
        "tiled": attention_operands.problem(512, arch="", has_lengths=True, has_sinks=True),
    }.items():
        listed = Listed()
        next(file for file in ATTENTION_KERNELS if file.takes(of)).compile_kernel(of, listed)
        for make, arguments, pass_configs in listed.kernels:
            yield Case(f"attention {name} {make.__name__}", make, arguments, pass_configs, CUDA if of.arch else METAL)
    for name, arch, options in (
        ("hopper", ARCH, {"page_size": 16, "window": 128}),
        ("wide", ARCH, {"head_dim": 512}),
        ("codes", ARCH, {"cache_dtype": "float8_e4m3fn", "scales": "head"}),
        ("metal", "", {"page_size": 24, "cache_dtype": "float8_e4m3fn", "scales": "page"}),
    ):
        sizes = {"head_dim": 128, "dtype": "bfloat16", "cache_dtype": "bfloat16", "scale": 0.1}
        of = DecodeProblem("cuda" if arch else "metal", arch, NUM_SMS, **{**sizes, **options})
        listed = Listed()
        decode_launch.compile_kernels(of, None, listed)
        for make, arguments, pass_configs in listed.kernels:
            yield Case(f"attention_decode {name} {make.__name__}", make, arguments, pass_configs, CUDA if arch else METAL)


FAMILIES = (tiled_moe, around_moe, moe_on_hopper, scaled_matmuls, matmuls, gated_delta, attentions)
