"""Both products of the mixture of experts, and the sum of slots, against float64; poison wherever weights are padded."""

import functools

import pytest
import torch
from kernels.moe_targets import runner
from numeric import assert_close

from tilelang_ext import formats, quantize, reference
from tilelang_ext.kernels.mxfp4_moe_stages import Activation, Config, down, gate_up, pick_config, sum_slots

TOKENS, TOP_K, E, H, I = 5, 2, 4, 96, 96
STORED_H, STORED_I, STORED_K13, STORED_K2 = 104, 104, 160, 128
MX = formats.BlockScaledLayout.e8m0_k32()
TOPK_IDS = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 9]], dtype=torch.int32)  # none to expert 2; no expert 9
CONFIG = Config(16)
KERNELS = {
    "gate_up": lambda: gate_up(CONFIG, Activation(), "bfloat16"),
    "reduce": lambda: down(CONFIG, "bfloat16", "reduce"),
    "atomic": lambda: down(CONFIG, "bfloat16", "atomic"),
    "sum": lambda: sum_slots("bfloat16"),
}


@functools.cache
def kernel(name, target):
    return runner(KERNELS[name](), target)


def stored(rows, k, generator):
    spread = torch.exp2(torch.randint(-2, 2, (E, rows, k // 32), generator=generator).float()).repeat_interleave(32, -1)
    codes, scale = quantize.quantize(torch.randn(E, rows, k, generator=generator) * spread, formats.E2M1, MX)
    return codes, scale, torch.randn(E, rows, generator=generator)


@functools.cache
def case():
    """x, topk_weights, (codes, scale, bias) of w13 and w2 with NaN past the end, dequantised weights that count."""
    generator = torch.Generator().manual_seed(0)
    (w13, s13, b13), (w2, s2, b2) = stored(2 * STORED_I, STORED_K13, generator), stored(STORED_H, STORED_K2, generator)
    rows = torch.cat([torch.arange(I), STORED_I + torch.arange(I)])
    d13 = reference.dequantize(w13, s13, formats.E2M1, MX)[:, rows, :H]
    d2 = reference.dequantize(w2, s2, formats.E2M1, MX)[:, :H, :I]
    biases = b13[:, rows], b2[:, :H].clone()
    s13[:, :, H // 32 :], s2[:, :, -(-I // 32) :], s2[:, H:], b2[:, H:] = 255, 255, 255, torch.nan
    for half in (0, STORED_I):
        s13[:, half + I : half + STORED_I], b13[:, half + I : half + STORED_I] = 255, torch.nan
    x = torch.randn(TOKENS, H, generator=generator).bfloat16()
    return x, torch.rand(TOKENS, TOP_K, generator=generator), (w13, s13, b13), (w2, s2, b2), d13, d2, biases


@pytest.mark.parametrize("target", ["c", "metal"])
def test_values(target):
    x, topk_weights, w13, w2, d13, d2, (bias13, bias2) = case()
    rows = reference.moe_sort(TOPK_IDS, topk_weights, E, CONFIG.block_M)
    hidden = torch.full((len(rows.token_ids), I // 32, 32), torch.nan).bfloat16()
    w13, w2 = ((codes.unflatten(-1, (-1, 16)), *rest) for codes, *rest in (w13, w2))
    kernel("gate_up", target)(x.view(TOKENS, -1, 32), rows.token_ids, rows.expert_ids, rows.num_valid, *w13, hidden)
    activation = functools.partial(reference.swiglu, gate="separated")
    options = {"activation": activation, "bias13": bias13, "bias2": bias2, "between": "bfloat16"}
    expected = reference.moe(x, TOPK_IDS, topk_weights, d13, d2, **options)

    arguments = (hidden, rows.token_ids, rows.weights, rows.expert_ids, rows.num_valid, *w2)
    partial = torch.full((TOKENS, TOP_K, H), torch.nan)
    kernel("reduce", target)(*arguments, partial)
    assert partial[4, 1].isnan().all(), "no expert 9 wrote"
    out = torch.full((TOKENS, H), torch.nan).bfloat16()
    kernel("sum", target)(partial, TOPK_IDS, torch.ones(E, dtype=torch.int32), out)
    assert_close(out, expected, dtype="bfloat16")

    total = torch.zeros(TOKENS, H)
    kernel("atomic", target)(*arguments, total)
    assert_close(total, expected, dtype="bfloat16")


def test_tile_by_rows_of_an_expert():
    assert [pick_config(tokens, 4, 32, "cuda").block_M for tokens in (1, 128, 256, 512, 4096)] == [16, 16, 32, 64, 128]
    assert pick_config(4096, 4, 32, "metal").block_M == 64
