"""Launches of the mixture of experts on Hopper, for weights of `tile_for_hopper`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilelang_ext.kernels.mxfp4_moe import sm90_mma as few
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter as rows
from tilelang_ext.kernels.mxfp4_moe import sm90_wgmma as many
from tilelang_ext.kernels.mxfp4_moe.routing import TOKEN_BITS, Routing
from tilelang_ext.kernels.mxfp4_moe.sm90_packing import OPERANDS

_ANY = 1 << 31  # slots

# The kernels and tiles, by the rows an expert has when all are equally busy, each the fastest of some on an H200 at sizes of
# docs/performance.md; the bounds between them were not searched.
_TABLES = {
    "bfloat16": (
        # (most rows of an expert, most slots of all tokens, module, config)
        (6, 64, few, few.Config(8, 4, 2, 4)),  # few blocks: K is split, to fill the processors
        (6, _ANY, few, few.Config(8, 8, 1, 4)),
        (12, _ANY, many, many.Config(16, 4, 10)),  # tokens are read for 512 rows
        (18, _ANY, many, many.Config(24, 4, 9)),
        (40, _ANY, many, many.Config(48, 2, 13)),
        (80, _ANY, many, many.Config(80, 2, 9)),
        (400, _ANY, many, many.Config(128, 2, 7)),
        (1 << TOKEN_BITS, _ANY, many, many.Config(256, 1, 5)),
    ),
    "fp8": (
        (6, _ANY, many, many.Config(8, 2, 11)),
        (12, _ANY, many, many.Config(16, 4, 5)),
        (18, _ANY, many, many.Config(32, 2, 9)),
        (40, _ANY, many, many.Config(48, 2, 8)),
        (80, _ANY, many, many.Config(80, 2, 7)),
        (400, _ANY, many, many.Config(144, 1, 7)),  # two tiles for 256 +- 16 rows
        (1 << TOKEN_BITS, _ANY, many, many.Config(256, 1, 4)),  # a tile is decoded for twice the tokens
    ),
}
# Instead of blocks of 512 rows, where those leave more of the processors without work in the last round.
_OF_256_ROWS = {
    "bfloat16": {many.Config(16, 4, 10): many.Config(16, 2, 18), many.Config(24, 4, 9): many.Config(24, 2, 17)},
    "fp8": {many.Config(16, 4, 5): many.Config(16, 2, 11)},
}


def kind_of(w) -> str:
    """Return the kind of activations that weights of `tile_for_hopper` are for."""
    return next(kind for kind, operand in OPERANDS.items() if w.codes.shape[-1] == operand.tile_words)


def check(x: Tensor, kind: str, w13, w2) -> None:
    """Raise for what these kernels do not take."""
    kinds = {kind_of(w13), kind_of(w2)}
    if x.dtype != torch.bfloat16 or kinds != {kind}:
        raise NotImplementedError(
            "mxfp4_moe: weights of tile_for_hopper are for bfloat16 x and its own a_dtype, here "
            f"{' and '.join(sorted(kinds))}; got x {x.dtype}, a_dtype {kind}; "
            "use the weights of prepare_mxfp4_weights as they are"
        )
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        raise NotImplementedError(
            f"mxfp4_moe: weights of tile_for_hopper are for NVIDIA GPUs of compute capability 9.0; got {x.device}; "
            "use the weights of prepare_mxfp4_weights as they are"
        )


def pick(tokens: int, top_k: int, num_experts: int, kind: str) -> tuple:
    """Return the module and the configuration for these sizes."""
    slots = tokens * top_k
    return next(
        (module, config) for rows, most, module, config in _TABLES[kind] if slots <= rows * num_experts and slots <= most
    )


def fitting(config, kind: str, rows: int, num_experts: int):
    """Return `config`, or one of fewer rows a block where weights (num_experts, rows) then take a tenth less of rounds."""
    other = _OF_256_ROWS[kind].get(config, config)

    def rows_of_a_processor(one) -> int:
        return -(-num_experts * -(-rows // one.rows) // many.num_processors()) * one.rows

    return other if rows_of_a_processor(other) < 0.9 * rows_of_a_processor(config) else config


def run(module, config, activation, epilogue: str, x: Tensor, routing: Routing, w13, w2, y: Tensor, compiled: Callable) -> None:
    """Launch both products of x (tokens, H) with kernels that `compiled` makes runnable; y of `slots_type`."""
    token_ids, weights, expert_ids, num_valid, positions = routing
    capacity = len(token_ids)

    def kernel(make, *arguments, configs=module.PASS_CONFIGS):
        return compiled(make, arguments, x.device, tuple(configs.items()))

    hidden = x.new_empty(capacity, w2.k)
    if module is few:
        kernel(few.gate_up, config, activation)(x, token_ids, expert_ids, w13.codes.view(-1, few.LANE_WORDS), w13.bias, hidden)
        down = kernel(few.down, config, epilogue)
        down(hidden, token_ids, weights, expert_ids, w2.codes.view(-1, few.LANE_WORDS), w2.bias, y)
        return
    kind = kind_of(w13)
    operand = OPERANDS[kind]
    if kind == "fp8":
        (sorted_x, scale_x), quantized = _quantized(capacity, x.shape[1], x.device), _quantized(capacity, w2.k, x.device)
        kernel(rows.scatter_quantized, x.shape[1], configs=rows.PASS_CONFIGS)(x, positions, sorted_x, scale_x)
    else:
        sorted_x, scale_x = x.new_empty(capacity, x.shape[1]), weights.new_empty(0)
        quantized = hidden, scale_x
        kernel(rows.scatter, configs=rows.PASS_CONFIGS)(x, positions, sorted_x)
    experts = w13.codes.shape[0]
    kernel(many.gate_up, fitting(config, kind, 2 * w2.k, experts), activation, operand)(
        sorted_x, scale_x, expert_ids, num_valid, w13.codes, w13.scale, w13.bias, hidden
    )
    if kind == "fp8":
        kernel(rows.quantize_sorted, w2.k, configs=rows.PASS_CONFIGS)(hidden, positions.flatten(), *quantized)
    down = kernel(many.down, fitting(config, kind, w2.rows, experts), epilogue, operand)
    down(*quantized, token_ids, weights, expert_ids, num_valid, w2.codes, w2.scale, w2.bias, y)


def _quantized(count: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tensors for rows of E4M3 and their scales."""
    return torch.empty(count, k, dtype=torch.float8_e4m3fn, device=device), torch.empty(count, device=device)
