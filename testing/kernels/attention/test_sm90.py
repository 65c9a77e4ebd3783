"""Attention on Hopper: values by running the CUDA text on the CPU, and the machine code."""

import re

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.attention.operands import E4M3, FUNCTIONS, check, expected, operands, problem, random_scales, text_of
from kernels.hopper import Box, execute

from tilelang_ext.kernels.attention import sm90_forward, sm90_parts, sm90_transpose, sm90_wide, sm90_wide_block
from tilelang_ext.kernels.attention.sm90_block import ARCH
from tilelang_ext.kernels.attention.sm90_block import SIMPLE_CONFIGS as SIMPLE
from tilelang_ext.kernels.attention.sm90_config import Config

FORWARD = problem(64, num_sms=3, causal=True, has_sinks=True, has_lengths=True), Config(2, 32, 2, 1)
WIDE = problem(264, num_sms=2, causal=True, has_sinks=True, has_lengths=True)


def run(of, config, sizes, cu_q=None, cu_k=None):
    """Check one launch against float64; every other byte of memory is a NaN."""
    dtype = getattr(torch, of.dtype)
    q, k, v, sinks = operands(*sizes, of.head_dim, dtype)
    scales = random_scales(of, *sizes[3:5])
    tensors = {"q": q, "k": k, "v": v, "sinks": sinks, **dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))}
    tensors["out"] = torch.full(q.shape, torch.nan, dtype=getattr(torch, of.result))
    tensors["lse"] = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    wanted = expected(of, q, k, v, sinks, cu_q, cu_k, scales)
    if of.has_lengths:
        tensors |= {"cu_q": torch.tensor(cu_q, dtype=torch.int32), "cu_k": torch.tensor(cu_k, dtype=torch.int32)}
        for tensor, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
            tensor[:, cu[-1] :] = torch.nan
    batch, S_q, S_k, heads, kv_heads = sizes
    scalars = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "q_scales": heads, "k_scales": 1, "v_scales": kv_heads}
    is_divided = config and not (of.is_causal or of.has_lengths)
    parts = 2 * of.num_sms
    if config:
        tensors["partial"] = torch.full((parts, config.block_M, -(-of.head_dim // 64) * 64), torch.nan)
        tensors["partial_lse"] = torch.full((parts, config.block_M), torch.nan)
        scalars |= {"parts": parts}
    scalars |= {"queries": S_q, "keys": S_k, "num_sinks": heads, "num_cu_q": len(cu_q or ()), "num_cu_k": len(cu_k or ())}
    if config is None:
        rows = (64, sm90_wide_block.BLOCK_N // 2, sm90_wide_block.V_ROWS // 2)
        text, cluster = text_of(sm90_wide.attention, of), 2
    else:
        rows = (config.block_M, config.block_N, config.block_N)
        text, cluster = text_of(sm90_forward.attention, of, config), 1
    # The text calls two extents __1 and __2; the end of a tile's sequence is that of the queries.
    end = re.search(r"\bv\[4\] = (__[12]);", text)
    scalars |= {"__1": S_k, "__2": S_q} if end and end[1] == "__2" else {"__1": S_q, "__2": S_k}
    boxes = {name: Box(rows, 128 // dtype.itemsize) for name, rows in zip("qkv", rows, strict=True)}
    boxes["out"] = Box(64, 64)
    if of.pack > 1:  # all heads: rows of (queries, heads) lie one after the other
        size = S_q * heads * of.head_dim
        tensors["q"] = q.as_strided((batch, S_q * heads, 1, of.head_dim), (size, of.head_dim, heads * of.head_dim, 1))
    if of.is_fp8:
        padded = -(-S_k // 16) * 16
        transposed = torch.full((batch, kv_heads, of.head_dim, padded), torch.nan, dtype=dtype)
        given = {"v": v, "v_transposed": transposed}
        grid = -(-padded // 128), kv_heads, batch
        execute(
            text_of(sm90_transpose.transpose, of, name="transpose", pass_configs=SIMPLE),
            grid,
            given,
            {},
            scalars | {"units": padded // 16},
        )
        tensors["v"] = transposed.transpose(1, 2).contiguous()  # (batch, head_dim, kv_heads, keys)
        boxes["v"] = Box(-(-of.head_dim // 64) * 64, 128)
    execute(text, (of.num_sms, 1), tensors, boxes, scalars, cluster, FUNCTIONS)
    if is_divided:
        text = text_of(
            sm90_parts.sum_parts, of, tensors["partial"].shape[1:], config.block_N, name="sum_parts", pass_configs=SIMPLE
        )
        tiles = -(-S_q // config.block_M) * batch * heads % of.num_sms
        execute(text, (config.block_M // sm90_parts.rows_of_block(of.head_dim), tiles), tensors, {}, scalars, 1, FUNCTIONS)
    check(tensors["out"], tensors["lse"], *wanted, rounds_to_fp8=of.is_fp8)


@needs_compiler
@pytest.mark.parametrize(
    ("of", "config", "sizes", "lengths"),
    [
        # Several tiles of a block; sequences without keys, without queries, with queries that see none, and ahead of NaNs
        (
            *FORWARD,
            (1, 200, 230, 2, 1),
            ([0, 70, 70, 75, 195], [0, 99, 130, 130, 210]),
        ),
        # Tiles that do not fill a wave, divided: 2 by 3 blocks, one of which has parts of both, with a sink
        (problem(64, num_sms=3, has_sinks=True), Config(2, 32, 2, 1), (1, 100, 390, 5, 1), ()),
        # The same with wider heads, whose parts are summed by blocks of fewer rows
        (problem(136, num_sms=3), Config(2, 32, 2, 1), (1, 70, 390, 4, 1), ()),
        # Three consumers; rows of two heads; a window that hides whole blocks; head_dim ends inside a panel; more keys
        (problem(72, num_sms=2, window=50, pack=2, has_sinks=True), Config(3, 48, 4, 2, False), (2, 192, 230, 2, 1), ()),
        # Codes of 8 bits: keys that end inside a block and inside 16, a window that begins inside 16
        (problem(80, E4M3, num_sms=2, window=50, has_sinks=True), Config(2, 128, 2, 1), (1, 140, 200, 2, 1), ()),
        # Wider heads, by the two blocks of a cluster: two key blocks, none and one; queries past a block's tile
        (
            WIDE,
            None,
            (1, 130, 300, 1, 1),
            ([0, 70, 75, 125], [0, 190, 190, 280]),
        ),
    ],
)
def test_values(of, config, sizes, lengths):
    run(of, config, sizes, *lengths)


@needs_nvcc
def test_machine_code():
    """No MMA waits for the one before (`compile_texts` sees to that), nothing spills, and turns are given by named barriers."""
    texts = {
        "forward": text_of(sm90_forward.attention, *FORWARD, name="forward"),
        "wide": text_of(sm90_wide.attention, WIDE, name="wide"),
    }
    compiled = compile_texts(texts, ARCH)
    assert compiled["forward"].spilled == 0
    assert compiled["wide"].spilled <= 128  # of addresses, ahead of the loop
    # Of each consumer: 4 of q k^T and 2 of P v for a block, in the first block's, the loop's and the last block's part
    assert compiled["forward"].count("HGMMA") == 2 * (2 * 4 + 2 * 2)
    assert compiled["forward"].count("BAR") >= 4
