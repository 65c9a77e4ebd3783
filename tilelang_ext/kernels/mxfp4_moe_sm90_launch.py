"""Launches of the mixture of experts on Hopper, for weights of `tile_for_hopper` and bfloat16 activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import tilelang
import torch
from torch import Tensor

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels import mxfp4_moe_sm90 as many
from tilelang_ext.kernels import mxfp4_moe_sm90_few as few
from tilelang_ext.kernels.mxfp4_moe_sm90_tiles import LANE_WORDS
from tilelang_ext.kernels.mxfp4_moe_sort import TOKEN_BITS

ARCH = "sm_90a"
_TOKEN = (1 << TOKEN_BITS) - 1
_GATHER_THREADS, _GATHER_ELEMENTS = 128, 8

# The kernels and tiles, by the rows an expert has when all are equally busy; each measured on an H200 at sizes of
# docs/performance.md; the bounds between them were not searched.
_TABLE = (
    # (most rows of an expert, most slots of all tokens, module, config)
    (6, 64, few, few.Config(8, 4, 2, 4)),  # few blocks: K is split, to fill the processors
    (6, 1 << 31, few, few.Config(8, 8, 1, 4)),
    (24, 1 << 31, many, many.Config(32, 4, 6)),  # tokens are read for 512 rows
    (80, 1 << 31, many, many.Config(96, 2, 8)),
    (1 << TOKEN_BITS, 1 << 31, many, many.Config(128, 2, 7)),
)


def check(x: Tensor, kind: str) -> None:
    """Raise for what these kernels do not take."""
    if x.dtype != torch.bfloat16 or kind != "bfloat16":
        raise NotImplementedError(
            f"mxfp4_moe: weights of tile_for_hopper take bfloat16 activations; got x {x.dtype}, a_dtype {kind}; "
            "use the weights of prepare_mxfp4_weights as they are"
        )
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        raise NotImplementedError(
            f"mxfp4_moe: weights of tile_for_hopper are for NVIDIA GPUs of compute capability 9.0; got {x.device}; "
            "use the weights of prepare_mxfp4_weights as they are"
        )


def pick(tokens: int, top_k: int, num_experts: int) -> tuple:
    """Return the module and the configuration for these sizes."""
    slots = tokens * top_k
    return next((module, config) for rows, most, module, config in _TABLE if slots <= rows * num_experts and slots <= most)


def gather():
    """The prim_func: (x, token_ids, num_valid, gathered), rows of x (tokens, H) in sorted order.

    Rows that are padding, and past num_valid, are left as they are.
    """
    tokens, groups, rows = T.dynamic("tokens"), T.dynamic("groups"), T.dynamic("rows")
    H, columns = groups * MX_GROUP, _GATHER_THREADS * _GATHER_ELEMENTS

    @T.prim_func
    def gather(
        x: T.Tensor((tokens, H), "bfloat16"),
        token_ids: T.Tensor((rows,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        gathered: T.Tensor((rows, H), "bfloat16"),
    ):
        with T.Kernel(rows, T.ceildiv(H, columns), threads=_GATHER_THREADS) as (row, by):  # y ends at 65535
            tx = T.get_thread_binding()
            if row < num_valid[0]:
                token = token_ids[row] & _TOKEN
                column = by * columns + tx * _GATHER_ELEMENTS
                if token < tokens and column < H:
                    for v in T.vectorized(_GATHER_ELEMENTS):
                        gathered[row, column + v] = x[token, column + v]

    return gather


@cache
def _compiled(make: Callable, arguments: tuple, pass_configs: tuple) -> Callable:
    target = {"kind": "cuda", "arch": ARCH}
    return tilelang.compile(make(*arguments), target=target, pass_configs=dict(pass_configs))


def run(module, config, activation, epilogue: str, x: Tensor, routing: tuple, w13, w2, y: Tensor) -> None:
    """Launch both products of x (tokens, H) with `routing`: token_ids, weights, expert_ids and num_valid of `moe_sort`."""
    token_ids, weights, expert_ids, num_valid = routing
    pass_configs = tuple(module.PASS_CONFIGS.items())
    hidden = x.new_empty(len(token_ids), w2.k)
    gate_up = _compiled(module.gate_up, (config, activation), pass_configs)
    if module is many:
        gathered = x.new_empty(len(token_ids), x.shape[1])
        _compiled(gather, (), tuple(few.PASS_CONFIGS.items()))(x, token_ids, num_valid, gathered)
        gate_up(gathered, expert_ids, num_valid, w13.codes, w13.bias, hidden)
    else:
        gate_up(x, token_ids, expert_ids, num_valid, w13.codes.view(-1, LANE_WORDS), w13.bias, hidden)
    down = _compiled(module.down, (config, epilogue), pass_configs)
    codes = w2.codes if module is many else w2.codes.view(-1, LANE_WORDS)
    down(hidden, token_ids, weights, expert_ids, num_valid, codes, w2.bias, y)
