"""`mxfp4_moe` at its door: the CPU and the kernels on target c against float64, tracing, errors by message."""

import functools

import pytest
import tilelang
import torch
from kernels.test_mxfp4_moe_stages import TOPK_IDS, case
from numeric import assert_close

from tilelang_ext import reference
from tilelang_ext.kernels import mxfp4_moe as door
from tilelang_ext.kernels.mxfp4_moe import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe_stages import Activation
from tilelang_ext.kernels.mxfp4_moe_weights import prepare_mxfp4_weights

SWIGLU = Activation()


def arguments(activation=SWIGLU, mask=None, kind="bfloat16"):
    """Operands whose padding is NaN, as mxfp4_moe takes them, and the float64 result with activations rounded to `kind`."""
    x, topk_weights, w13, w2, d13, d2, (bias13, bias2) = case()
    weights = (
        prepare_mxfp4_weights(*w13, gate="separated", rows=d13.shape[1], k=d13.shape[2]),
        prepare_mxfp4_weights(*w2, rows=d2.shape[1], k=d2.shape[2]),
    )
    act = reference.silu_mul if activation.name == "silu" else reference.swiglu
    options = {
        "activation": functools.partial(act, gate="separated"),
        "bias13": bias13,
        "bias2": bias2,
        "between": "mxfp8" if kind == "fp8" else kind,
        "expert_mask": mask,
    }
    expected = reference.moe(reference.requantize(x, kind), TOPK_IDS, topk_weights, d13, d2, **options)
    return (x, TOPK_IDS, topk_weights, *weights), expected


@pytest.mark.parametrize("activation", [SWIGLU, Activation("silu")], ids=lambda a: a.name)
def test_cpu(activation):
    operands, expected = arguments(activation)
    out = torch.full_like(operands[0], torch.nan)
    assert mxfp4_moe(*operands, activation=activation, out=out) is out
    assert_close(out, expected, dtype="bfloat16")
    assert_close(mxfp4_moe(*operands, activation=activation, epilogue="atomic"), expected, dtype="bfloat16")


A_DTYPES = {
    "bfloat16": (None, torch.bfloat16),
    "fp8": ("fp8", torch.float8_e4m3fn),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4", torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("kind", A_DTYPES)
def test_cpu_activations(kind):
    operands, expected = arguments(kind=kind)
    for a_dtype in A_DTYPES[kind]:
        assert_close(mxfp4_moe(*operands, activation=SWIGLU, a_dtype=a_dtype), expected, dtype="bfloat16")


@pytest.mark.parametrize(("kind", "epilogue"), [*((kind, "reduce") for kind in A_DTYPES), ("bfloat16", "atomic")])
def test_kernels(kind, epilogue, monkeypatch):
    """The launches that a GPU gets, on target c."""
    monkeypatch.setattr(door, "_compiled", lambda make, options, device: tilelang.compile(make(*options), target="c"))
    monkeypatch.setattr(door, "_by_reference", door._by_kernels)
    operands, expected = arguments(kind=kind)
    result = mxfp4_moe(*operands, activation=SWIGLU, a_dtype=A_DTYPES[kind][0], epilogue=epilogue)
    assert_close(result, expected, dtype="bfloat16")


def test_no_tokens():
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    assert mxfp4_moe(x[:0], topk_ids[:0], topk_weights[:0], w13, w2, activation=SWIGLU).shape == (0, x.shape[1])
    assert not mxfp4_moe(x, topk_ids[:, :0], topk_weights[:, :0], w13, w2, activation=SWIGLU).any()


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(5, 96), TypeError, "x must be bfloat16 or float16"),
        (0, torch.zeros(5, 64).bfloat16(), ValueError, "x must be .tokens, H."),
        (1, torch.zeros(5, 2), TypeError, "topk_ids must be int32 or int64"),
        (1, torch.zeros(4, 2, dtype=torch.int32), ValueError, "one row a token"),
        (2, torch.zeros(5, 2, dtype=torch.int32), TypeError, "topk_weights must be"),
        (2, torch.zeros(5, 2, device="meta"), ValueError, "topk_weights must be on cpu"),
    ],
)
def test_errors(index, value, error, message):
    operands = list(arguments()[0])
    operands[index] = value
    with pytest.raises(error, match=message):
        mxfp4_moe(*operands, activation=SWIGLU)
    with pytest.raises(ValueError, match="epilogue must be"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, epilogue="sum")
    with pytest.raises(TypeError, match="a_dtype must be"):
        mxfp4_moe(*arguments()[0], activation=SWIGLU, a_dtype=torch.float8_e5m2)
