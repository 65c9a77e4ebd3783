"""`mxfp4_moe` by its kernels, on target c and from their Metal text: the launches that a GPU gets, on memory full of NaN."""

import functools
from dataclasses import replace

import pytest
import torch
from kernels.mxfp4_moe.operands import LINEAR, MX, SWIGLU, arguments, one_hot, problem
from kernels.mxfp4_moe.targets import REPORTS, compiled
from numeric import assert_close
from simulator.mlx_figures import QMM_T_256

from tilelang_ext import formats, quantization, reference
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe import tiled
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.launch import launch
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.tiled import pick_config
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights, prepare_mxfp4_weights

SIZE = 96  # of H and of I: a tile and a half


@pytest.fixture(params=["c", "metal"])
def target(request, monkeypatch):
    """Tensors on the CPU get the launches of a GPU; memory that is not written holds NaN and the largest integers."""

    def of_target(make, arguments, device, pass_configs):
        return compiled(make, arguments, request.param)

    def on_target(problem, operands, out):
        launch(replace(problem, target_kind=request.param), operands, out, compiled=of_target)

    monkeypatch.setattr(moe_operator, "_by_reference", on_target)
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def cosine(result, expected):
    return torch.nn.functional.cosine_similarity(result.double(), expected.double(), dim=1)


CASES = [("metal", a_format, "swiglu") for a_format in ("bfloat16", "fp8", "mxfp4")]
CASES += [("c", "bfloat16", "swiglu"), ("c", "float16", "silu")]  # test_cuda_text.py has mxfp8


@pytest.mark.parametrize(("target", "a_format", "activation"), CASES, indirect=["target"])
def test_values(target, a_format, activation):
    operands, expected = arguments(Activation(activation), a_format=a_format)
    dtype = str(operands[0].dtype).removeprefix("torch.")
    result = mxfp4_moe(*operands, activation=Activation(activation), a_dtype=None if a_format == dtype else a_format)
    assert cosine(result, expected).mean() >= 0.9999
    # A sum in another order rounds to another code now and then.
    assert_close(result, expected, dtype=dtype, max_error=None if a_format == dtype else 0.03)


@pytest.mark.parametrize(("target", "a_dtype"), [("metal", "mxfp4"), ("metal", "fp8")], indirect=["target"])
def test_not_finite(target, a_dtype):
    """A token with an infinity becomes NaN, and no other does."""
    (x, *rest), _ = arguments()
    expected = mxfp4_moe(x, *rest, activation=SWIGLU, a_dtype=a_dtype)
    expected[2] = torch.nan
    x = x.clone()
    x[2, 40] = torch.inf
    result = mxfp4_moe(x, *rest, activation=SWIGLU, a_dtype=a_dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_routing(target):
    """Ids out of range, all tokens to one expert, one token, experts on other ranks: the result is that of reference.moe."""
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    everything = torch.ones(4, dtype=torch.bool)
    mask = torch.tensor([False, True, False, True, True, False, True])  # four of seven live here

    def check(x, topk_ids, expert_mask=None):
        out = torch.full_like(x, torch.nan)
        mxfp4_moe(x, topk_ids, topk_weights[: len(x)], w13, w2, activation=SWIGLU, expert_mask=expert_mask, out=out)
        expected = reference_of(
            x, topk_ids, topk_weights[: len(x)], w13, w2, everything if expert_mask is None else expert_mask
        )
        assert_close(out, expected, dtype="bfloat16")

    check(x, torch.full_like(topk_ids, 3))
    check(x, torch.tensor([[1, 2**32], [-1, 0], [1, 4], [2**32 + 3, 2], [2**63 - 1, -(2**63)]]))
    check(x[:1], topk_ids[:1])
    check(x, torch.tensor([[6, 0], [1, 2], [0, 2], [4, 3], [5, 7]]), mask)
    # A mask that names more experts than there are weights is wrong, and yet nothing is read that is not there.
    mxfp4_moe(x, topk_ids, topk_weights, w13, w2, activation=SWIGLU, expert_mask=torch.ones(7, dtype=torch.bool))


def reference_of(x, topk_ids, topk_weights, w13, w2, mask):
    half, I = w13.codes.shape[1] // 2, w13.rows // 2
    rows = torch.cat([torch.arange(I), half + torch.arange(I)])
    d13 = reference.dequantize(w13.codes, w13.scale, formats.E2M1, MX)[:, rows, : w13.k]
    d2 = reference.dequantize(w2.codes, w2.scale, formats.E2M1, MX)[:, : w2.rows, : w2.k]
    act = functools.partial(reference.swiglu, gate="separated")
    bias = {"bias13": w13.bias[:, rows], "bias2": w2.bias[:, : w2.rows]}
    return reference.moe(x, topk_ids, topk_weights, d13, d2, activation=act, between="bfloat16", expert_mask=mask, **bias)


def test_padding_is_not_computed_with(target):
    """The same bits whether weights are stored exactly, with NaN behind them, or with 1e30."""
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    padded = mxfp4_moe(x, topk_ids, topk_weights, w13, w2, activation=SWIGLU)
    half, I = w13.codes.shape[1] // 2, w13.rows // 2
    rows13 = torch.cat([torch.arange(I), half + torch.arange(I)])

    def exact(weights, rows):
        codes, scale = weights.codes[:, rows, : weights.k // 2], weights.scale[:, rows, : weights.k // 32]
        return MXFP4Weights(codes.contiguous(), scale.contiguous(), weights.bias[:, rows].contiguous(), *weights[3:])

    def large(weights):
        """The weights with 2^99 = 6e29 in place of each NaN."""
        scale = torch.where(weights.scale == 255, 226, weights.scale)
        return weights._replace(scale=scale, bias=weights.bias.nan_to_num(nan=1e30))

    exactly = mxfp4_moe(x, topk_ids, topk_weights, exact(w13, rows13), exact(w2, slice(w2.rows)), activation=SWIGLU)
    assert torch.equal(padded, exactly)
    assert torch.equal(padded, mxfp4_moe(x, topk_ids, topk_weights, large(w13), large(w2), activation=SWIGLU))


def test_order_of_tokens(target):
    """With reduce, the result of a token has the same bits wherever its rows are sorted to; with atomic, the same values."""
    (x, topk_ids, topk_weights, *weights), expected = arguments()
    order = torch.tensor([3, 0, 4, 2, 1])
    first = mxfp4_moe(x.t().contiguous().t(), topk_ids.t().contiguous().t(), topk_weights, *weights, activation=SWIGLU)
    second = mxfp4_moe(x[order], topk_ids[order], topk_weights[order], *weights, activation=SWIGLU)
    assert torch.equal(first[order], second)
    out = torch.full_like(x, torch.nan)
    mxfp4_moe(x, topk_ids, topk_weights, *weights, activation=SWIGLU, epilogue="atomic", out=out)
    assert_close(out, expected, dtype="bfloat16")


@pytest.mark.parametrize(("target", "a_format"), [("c", "mxfp4"), ("metal", "bfloat16")], indirect=["target"])
def test_one_hot(target, a_format):
    """With x = 1 at one k of a token, the column of the weights comes out bit for bit."""
    tokens, layers, expected = one_hot()
    for name, layer in layers.items():
        if a_format == "bfloat16" or name == "w2":  # a column of w13 is a hidden row, and would be quantised
            result = mxfp4_moe(*tokens, *layer, activation=LINEAR, a_dtype=None if a_format == "bfloat16" else a_format)
            assert torch.equal(result, expected), name


def test_wrong_weights_are_far_off(target):
    """The cosine distinguishes each mistake in reading weights from rounding; gate and up differ in size to be told apart."""
    E, tokens = 4, 8
    generator = torch.Generator().manual_seed(2)
    spread = torch.exp2(torch.randint(-3, 4, (E, 3 * SIZE, SIZE // 32), generator=generator).float()).repeat_interleave(32, -1)
    values = torch.randn(E, 3 * SIZE, SIZE, generator=generator) * spread / 32
    values[:, SIZE : 2 * SIZE] /= 8
    codes, scale = quantization.quantize(values, formats.E2M1, MX)
    x = torch.randn(tokens, SIZE, generator=generator).bfloat16()
    topk_ids = torch.rand(tokens, E, generator=generator).topk(2).indices.int()
    topk_weights = torch.rand(tokens, 2, generator=generator)

    def run(codes, scale):
        w13 = prepare_mxfp4_weights(codes[:, : 2 * SIZE], scale[:, : 2 * SIZE], gate="separated")
        return mxfp4_moe(
            x, topk_ids, topk_weights, w13, prepare_mxfp4_weights(codes[:, 2 * SIZE :], scale[:, 2 * SIZE :]), activation=SWIGLU
        )

    d = reference.dequantize(codes, scale, formats.E2M1, MX)
    act = functools.partial(reference.swiglu, gate="separated")
    expected = reference.moe(x, topk_ids, topk_weights, d[:, : 2 * SIZE], d[:, 2 * SIZE :], activation=act)
    assert cosine(run(codes, scale), expected).min() >= 0.9999
    swapped = torch.cat([codes[:, SIZE : 2 * SIZE], codes[:, :SIZE], codes[:, 2 * SIZE :]], 1)
    swapped_scale = torch.cat([scale[:, SIZE : 2 * SIZE], scale[:, :SIZE], scale[:, 2 * SIZE :]], 1)
    for wrong in (
        (codes >> 4 | codes << 4, scale),
        (swapped, swapped_scale),
        (codes, scale.roll(1, 2)),
        (codes, scale.roll(1, 1)),
    ):
        assert cosine(run(*wrong), expected).mean() < 0.5


def test_tile_by_rows_per_expert():
    for target_kind, largest in (("cuda", 128), ("metal", 64)):
        problems = [problem(tokens, 4, 32, target_kind=target_kind) for tokens in (1, 128, 256, 512, 4096)]
        assert [pick_config(each).block_M for each in problems] == [16, 16, 32, 64, largest]


@pytest.mark.parametrize("target", ["metal"], indirect=True)
def test_device_bytes_on_metal(target):
    """At most 1.02 of the least of the tiles: rows of x or hidden per column of tiles, weights per row, bias, ids once each.

    Threadgroup bytes per MMA are fewer than those of MLX's `fp_qmm_t` by weights in MXFP4.
    """
    tokens, H, I = 16, 1024, 1024
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (
        prepare_mxfp4_weights(*quantization.quantize(torch.randn(1, *shape, generator=generator), formats.E2M1, MX), **gate)
        for shape, gate in (((2 * I, H), {"gate": "separated"}), ((H, I), {}))
    )
    x, ids = torch.randn(tokens, H, generator=generator).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int32)
    assert mxfp4_moe(x, ids, torch.ones(tokens, 1), w13, w2, activation=SWIGLU).isfinite().all()
    for make, weights, bias, bytes_of_row in ((tiled.gate_up, w13, 8 * I, 2 * H + 4), (tiled.down, w2, 4 * H, 2 * I + 12)):
        report, config = REPORTS[make]
        assert config.block_M == tokens
        columns = 1024 // config.block_N
        for_every_thread = 2 * 4 * config.threads  # how many rows are valid, and the expert
        least = columns * (tokens * bytes_of_row + for_every_thread) + weights.codes.nbytes + weights.scale.nbytes + bias
        counts = report.counts
        assert least <= 1.001 * counts.device_bytes_read <= 1.02 * least, make
        assert counts.threadgroup_bytes_read < QMM_T_256[4].threadgroup_read * counts.mma, make
        total = counts.threadgroup_bytes_read + counts.threadgroup_bytes_written
        assert total < (QMM_T_256[4].threadgroup_read + QMM_T_256[4].threadgroup_written) * counts.mma, make
