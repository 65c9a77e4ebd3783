"""Expert weights from checkpoints' layouts: the same codes, scales and biases whatever the layout, errors by message."""

import pytest
import torch

from tilelang_ext import checkpoints, formats, quantization
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights

E, N, K = 3, 10, 64


def plain():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(E, N, K, generator=generator) * torch.exp2(torch.arange(N) % 5 - 2.0)[:, None]
    codes, scale = quantization.quantize(values, formats.E2M1, formats.BlockScaledLayout.e8m0_k32())
    return codes, scale, torch.randn(E, N, generator=generator)


def assert_same(weights, codes, scale, bias):
    assert torch.equal(weights.codes, codes)
    assert torch.equal(weights.scale, scale)
    assert torch.equal(weights.bias, bias)
    assert all(each.is_contiguous() for each in weights[:3])


def test_sources():
    codes, scale, bias = plain()
    assert_same(prepare_mxfp4_weights(codes, scale, bias), codes, scale, bias)
    assert_same(prepare_mxfp4_weights(*checkpoints.to_gpt_oss(codes, scale), bias, source="gpt_oss"), codes, scale, bias)
    assert_same(prepare_mxfp4_weights(*checkpoints.to_mlx(codes, scale, "mxfp4"), bias, source="mlx"), codes, scale, bias)


def test_interleaved_gate():
    codes, scale, bias = plain()
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    got = prepare_mxfp4_weights(codes, scale, bias.bfloat16(), gate="interleaved")
    assert_same(got, codes[:, order], scale[:, order], bias.bfloat16().float()[:, order])
    assert_same(prepare_mxfp4_weights(codes, scale, bias, gate="separated"), codes, scale, bias)


def test_no_bias_and_padding():
    codes, scale, _ = plain()
    got = prepare_mxfp4_weights(codes, scale)
    assert_same(got, codes, scale, torch.zeros(E, N))
    assert (got.rows, got.k) == (N, K)
    padded = prepare_mxfp4_weights(codes, scale, gate="separated", rows=8, k=32)
    assert (padded.rows, padded.k) == (8, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": "hf"}, ValueError, "source must be one of"),
        ({"weight": plain()[0][0], "scale": plain()[1][0], "bias": None}, ValueError, "stack the experts"),
        ({"bias": torch.zeros(E, N + 1)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(E, N, dtype=torch.int32)}, TypeError, "bias must be a float"),
        ({"gate": "up"}, ValueError, "gate must be"),
        ({"rows": N + 1}, ValueError, "rows must be"),
        ({"rows": 7, "gate": "separated"}, ValueError, "rows must be"),
        ({"k": 48}, ValueError, "k must be a multiple of 32"),
        ({"k": 96}, ValueError, "k must be a multiple of 32"),
        ({"scale": torch.zeros(E, N, 3, dtype=torch.uint8)}, ValueError, "scale: must have shape"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    codes, scale, bias = plain()
    arguments = {"weight": codes, "scale": scale, "bias": bias} | change
    with pytest.raises(error, match=message):
        prepare_mxfp4_weights(**arguments)
