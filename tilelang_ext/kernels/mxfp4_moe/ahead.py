"""What calls of `mxfp4_moe` on a Hopper GPU compile, and such calls, told from the sizes of a model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.launch import add_variant, compile_launches, tokens_of_kernels
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, Problem
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE, TILE_FORMATS
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights, to_arguments
from tilelang_ext.launch.device import Target

A_FORMATS = tuple(HOPPER_LAYOUTS)  # of activations, for which there are kernels for weights returned by `tile_for_hopper`


def calls(
    experts: int, top_k: int, H: int, I: int, activation: Activation, target: Target, max_tokens: int
) -> Iterator[tuple[Problem, tuple]]:
    """Yield problems with arguments of `mxfp4_moe_out` whose tensors are empty, on the CPU: bfloat16 to bfloat16, int64 ids.

    One call for each format of activations and range of tokens that has kernels of its own.
    """
    for a_format in A_FORMATS:
        weights = (*_weights(experts, 2 * I, H, a_format, True), *_weights(experts, H, I, a_format, False))
        tokens = 1
        while tokens <= max_tokens:
            problem = Problem(
                tokens=tokens,
                top_k=top_k,
                num_experts=experts,
                num_local_experts=experts,
                hidden_size=H,
                intermediate_size=I,
                dtype="bfloat16",
                ids_dtype="int64",
                a_format=a_format,
                weights_layout=HOPPER_LAYOUTS[a_format],
                activation=activation,
                epilogue="reduce",
                target_kind=target.kind,
                num_sms=target.num_sms,
            )
            x, ids = torch.empty(tokens, H, dtype=torch.bfloat16), torch.empty(tokens, top_k, dtype=torch.int64)
            options = activation.name, activation.alpha, activation.limit, a_format, "reduce", None
            yield problem, (x, ids, torch.empty(tokens, top_k), *weights, *options, torch.empty_like(x))
            tokens = tokens_of_kernels(problem)[1] + 1


def _weights(experts: int, rows: int, k: int, a_format: str, gated: bool) -> tuple:
    tiles, tile = -(-rows // TILE), TILE_FORMATS[a_format]
    codes = torch.empty(experts, tiles, -(-k // tile.K), tile.tile_words, dtype=torch.uint32)
    row_scale = torch.empty(experts, tiles * TILE) if a_format == "fp8" else torch.empty(0, 0)
    assert k % MX_GROUP == 0
    return to_arguments(HopperWeights(codes, row_scale, torch.empty(experts, tiles * TILE), rows, k, a_format, gated))


def compile_call(problem: Problem, compile: Callable) -> None:
    """Call compile(make, *arguments, pass_configs) for each kernel of the problem."""
    compile_launches(problem, _Collector(compile))


class _Collector:
    """A device that compiles by a function, and launches nothing."""

    def __init__(self, compile: Callable):
        self.compile = compile


def add_call(plan, problem: Problem, arguments: tuple, arch: str) -> None:
    """Add the variant of such a call to a plan."""
    add_variant(plan, arguments, problem, arch)
