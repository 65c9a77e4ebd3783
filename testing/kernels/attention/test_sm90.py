"""Attention on Hopper: values by running the CUDA text on the CPU, and the machine code."""

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.attention.operands import FUNCTIONS, check, expected, operands, problem, text_of
from kernels.hopper import Box, execute

from tilelang_ext.kernels.attention import sm90_forward, sm90_wide
from tilelang_ext.kernels.attention.sm90_forward import ARCH, Config

FORWARD = problem(64, num_sms=3, causal=True, has_sinks=True, has_lengths=True), Config(2, 32, 2, 1)
WIDE = problem(264, num_sms=2, causal=True, has_sinks=True, has_lengths=True)


def run(of, config, sizes, cu_q=None, cu_k=None):
    """Check one launch against float64; every other byte of memory is a NaN."""
    dtype = getattr(torch, of.dtype)
    q, k, v, sinks = operands(*sizes, of.head_dim, dtype)
    tensors = {"q": q, "k": k, "v": v, "sinks": sinks}
    tensors["out"] = torch.full(q.shape, torch.nan, dtype=dtype)
    tensors["lse"] = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    wanted = expected(of, q, k, v, sinks, cu_q, cu_k)
    if of.has_lengths:
        tensors |= {"cu_q": torch.tensor(cu_q, dtype=torch.int32), "cu_k": torch.tensor(cu_k, dtype=torch.int32)}
        for tensor, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
            tensor[:, cu[-1] :] = torch.nan
    batch, S_q, S_k, heads, kv_heads = sizes
    scalars = {"batch": batch, "__1": S_q, "__2": S_k, "heads": heads, "kv_heads": kv_heads}
    scalars |= {"queries": S_q, "keys": S_k, "num_cu_q": len(cu_q or ()), "num_cu_k": len(cu_k or ())}
    if config is None:
        rows = (64, sm90_wide._BLOCK_N // 2, sm90_wide._V_ROWS // 2)
        text, cluster = text_of(sm90_wide.attention, of), 2
    else:
        rows = (config.block_M, config.block_N, config.block_N)
        text, cluster = text_of(sm90_forward.attention, of, config), 1
    boxes = {name: Box(rows, 64) for name, rows in zip("qkv", rows, strict=True)}
    execute(text, (of.num_sms, 1), tensors, boxes, scalars, cluster, FUNCTIONS)
    check(tensors["out"], tensors["lse"], *wanted)


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
        # Three consumers; a window that hides whole blocks; head_dim ends inside a panel; fewer queries than keys
        (problem(72, num_sms=2, window=50), Config(3, 48, 4, 2, False), (2, 40, 130, 2, 2), ()),
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
