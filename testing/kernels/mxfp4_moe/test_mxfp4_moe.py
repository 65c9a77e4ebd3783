"""The operator `mxfp4_moe`: the CPU against float64, tracing, errors by message."""

import pytest
import torch
from kernels.mxfp4_moe.operands import MX, SWIGLU, arguments
from numeric import assert_close

from tilelang_ext import formats, quantization, reference
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import check_topk_ids
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.weights import from_arguments, prepare_mxfp4_weights, to_arguments


@pytest.mark.parametrize("activation", [SWIGLU, Activation("silu")], ids=lambda a: a.name)
def test_cpu(activation):
    operands, expected = arguments(activation)
    out = torch.full_like(operands[0], torch.nan)
    assert mxfp4_moe(*operands, activation=activation, out=out) is out
    assert_close(out, expected, dtype="bfloat16")
    assert_close(mxfp4_moe(*operands, activation=activation, epilogue="atomic"), expected, dtype="bfloat16")


def test_cpu_with_experts_elsewhere():
    mask = torch.tensor([False, True, False, True, True, False, False, False, False, True])  # expert 9 is the last of four
    operands, expected = arguments(mask=mask)
    assert_close(mxfp4_moe(*operands, activation=SWIGLU, expert_mask=mask), expected, dtype="bfloat16")


A_DTYPES = {
    "bfloat16": (None, torch.bfloat16),
    "fp8": ("fp8", torch.float8_e4m3fn),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4", torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("a_format", A_DTYPES)
def test_cpu_activations(a_format):
    operands, expected = arguments(a_format=a_format)
    for a_dtype in A_DTYPES[a_format]:
        assert_close(mxfp4_moe(*operands, activation=SWIGLU, a_dtype=a_dtype), expected, dtype="bfloat16")


def test_no_tokens():
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    assert mxfp4_moe(x[:0], topk_ids[:0], topk_weights[:0], w13, w2, activation=SWIGLU).shape == (0, x.shape[1])
    assert not mxfp4_moe(x, topk_ids[:, :0], topk_weights[:, :0], w13, w2, activation=SWIGLU).any()


def test_activations_in_fewer_bits_cost_little():
    """The cosine with a model in which nothing is rounded. Without biases, which are not rounded, a4w4 has 0.98."""
    tokens, H, I, E, top_k = 64, 512, 256, 4, 2
    generator = torch.Generator().manual_seed(0)

    def weights(rows, k, gate):
        codes, scale = quantization.quantize(torch.randn(E, rows, k, generator=generator) / k**0.5, formats.E2M1, MX)
        return prepare_mxfp4_weights(codes, scale, torch.randn(E, rows, generator=generator), gate=gate)

    w13, w2 = weights(2 * I, H, "separated"), weights(H, I, None)
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    topk_ids = torch.rand(tokens, E, generator=generator).topk(top_k).indices
    operands = (x, topk_ids, torch.rand(tokens, top_k, generator=generator), w13, w2)
    exact = mxfp4_moe(*operands, activation=SWIGLU)
    for a_dtype, least in (("fp8", 0.999), ("mxfp8", 0.999), ("mxfp4", 0.985)):
        got = mxfp4_moe(*operands, activation=SWIGLU, a_dtype=a_dtype)
        assert torch.nn.functional.cosine_similarity(got.double(), exact.double(), dim=1).mean() >= least, a_dtype


def test_cpu_dequantises_one_expert_at_a_time_and_only_those_used(monkeypatch):
    operands, _ = arguments()
    dequantize, dimensions = reference.dequantize, []

    def counted(codes, *rest):
        dimensions.append(codes.ndim)
        return dequantize(codes, *rest)

    monkeypatch.setattr(reference, "dequantize", counted)
    mxfp4_moe(*operands, activation=SWIGLU)
    assert dimensions == [2] * 6  # two matrices of three experts


def test_operators():
    """What torch asks of an operator: schema, shapes without data, tracing whole."""
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    arguments_of_op = (x, topk_ids, topk_weights, *to_arguments(w13), *to_arguments(w2))
    arguments_of_op += ("swiglu", 1.702, 7.0, "mxfp4", "reduce", None)
    torch.library.opcheck(torch.ops.tilelang_ext.mxfp4_moe.default, arguments_of_op)
    torch.library.opcheck(torch.ops.tilelang_ext.mxfp4_moe_out.default, (*arguments_of_op, torch.empty_like(x)))

    def model(x, topk_ids, topk_weights):
        return 2 * mxfp4_moe(x, topk_ids, topk_weights, w13, w2, activation=SWIGLU, a_dtype="mxfp4")

    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count in (len(x), 3):
        given = x[:count], topk_ids[:count], topk_weights[:count]
        assert torch.equal(traced(*given), model(*given))


def test_check_topk_ids():
    check_topk_ids(torch.tensor([[0, 3], [2, 1]]), 4)
    check_topk_ids(torch.zeros(0, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"topk_ids: must be in \[0, 4\); got 4 at \(1, 0\); check the router"):
        check_topk_ids(torch.tensor([[0, 3], [4, 1]]), 4)
    with pytest.raises(ValueError, match=r"got -1 at \(0, 1\)"):
        check_topk_ids(torch.tensor([[0, -1]], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="must be distinct in a row; got 1 twice for token 1"):
        check_topk_ids(torch.tensor([[0, 3, 1], [1, 2, 1]]), 4)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(5, 96), TypeError, "x must be bfloat16 or float16"),
        (0, torch.zeros(5, 64).bfloat16(), ValueError, "x must be .tokens, H."),
        (0, torch.zeros(5, 96, 1).bfloat16(), ValueError, "x must be .tokens, H."),
        (1, torch.zeros(5, 2), TypeError, "topk_ids must be int32 or int64"),
        (1, torch.zeros(4, 2, dtype=torch.int32), ValueError, "one row per token"),
        (2, torch.zeros(5, 2, dtype=torch.int32), TypeError, "topk_weights must be"),
        (2, torch.zeros(5, 2, device="meta"), ValueError, "topk_weights must be on cpu"),
        (2, torch.zeros(5, 1), ValueError, "one row per token"),
        (3, arguments()[0][3]._replace(rows=64), ValueError, "check the pair of weights"),
        (4, arguments()[0][4]._replace(rows=64), ValueError, "check the pair of weights"),
        (4, arguments()[0][4]._replace(codes=torch.zeros(3, 104, 64, dtype=torch.uint8)), ValueError, "equally many experts"),
        (4, tuple(arguments()[0][4]), TypeError, "w2 must be MXFP4Weights or HopperWeights; got tuple"),
    ],
)
def test_errors_of_operands(index, value, error, message):
    operands = list(arguments()[0])
    operands[index] = value
    with pytest.raises(error, match=f"mxfp4_moe: .*{message}"):
        mxfp4_moe(*operands, activation=SWIGLU)


def test_errors_of_options():
    x, topk_ids, topk_weights, w13, w2 = arguments()[0]
    with pytest.raises(ValueError, match="at most 4 slots"):
        mxfp4_moe(x, topk_ids.repeat(1, 3), topk_weights.repeat(1, 3), w13, w2, activation=SWIGLU)
    with pytest.raises(TypeError, match="expert_mask must be bool"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, expert_mask=torch.ones(4))
    with pytest.raises(ValueError, match="expert_mask must be true for the 4 experts"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, expert_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="activation must be an Activation"):
        mxfp4_moe(*arguments()[0], activation="swiglu")
    with pytest.raises(ValueError, match="activation must be one of swiglu, silu, clamped_silu; got 'gelu'"):
        mxfp4_moe(*arguments()[0], activation=Activation("gelu"))
    for out in (torch.empty(5, 97).bfloat16(), torch.empty(5, 96), torch.empty(96, 5).bfloat16().t()):
        with pytest.raises(ValueError, match=r"out must be contiguous torch.bfloat16 of shape"):
            mxfp4_moe(*arguments()[0], activation=SWIGLU, out=out)
    with pytest.raises(ValueError, match="epilogue must be"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, epilogue="sum")
    with pytest.raises(TypeError, match="a_dtype must be"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, a_dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="layout of weights must be one of general, hopper_bfloat16, hopper_fp8; got 'tiled'"):
        from_arguments(*w2[:5], "tiled", gated=False)


@pytest.mark.parametrize(("gate13", "gate2"), [(None, None), ("interleaved", "interleaved"), (None, "separated")])
def test_weights_in_the_wrong_place(gate13, gate2):
    """gpt-oss rows without `gate`, or w2 with one: right shapes, other numbers."""
    (x, ids, topk_weights, w13, w2), _ = arguments()

    def prepare(weights, gate):
        return prepare_mxfp4_weights(*weights[:3], gate=gate, rows=weights.rows, k=weights.k)

    words = {True: "with gate=", False: "without"}
    got = f"got w13 {words[gate13 is not None]} and w2 {words[gate2 is not None]};"
    with pytest.raises(ValueError, match=f"w13 must be prepared with gate= and w2 without; {got}"):
        mxfp4_moe(x, ids, topk_weights, prepare(w13, gate13), prepare(w2, gate2), activation=Activation())
    with pytest.raises(ValueError, match="w13 must be prepared with gate= and w2 without; got w13 without and w2 with gate=;"):
        mxfp4_moe(x, ids, topk_weights, w2, w13, activation=Activation())
