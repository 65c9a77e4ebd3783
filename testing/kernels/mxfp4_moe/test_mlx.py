"""`mxfp4_moe` against MLX's own GEMMs with MXFP4 weights on the same bytes: `gather_qmm` and `dequantize`."""

import functools

import numpy as np
import pytest
import torch
from kernels.mxfp4_moe.targets import compiled
from numeric import assert_close

from tilelang_ext import checkpoints, quantization
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.launch import launch
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

E, H, I, TOP_K, TOKENS = 5, 96, 64, 3, 9  # the last expert has no token
BOUNDS = {"dtype": "bfloat16", "max_error": 3e-2, "rms_error": 4e-3}
MODE = {"mode": "mxfp4", "group_size": 32, "bits": 4}


@functools.cache
def case():
    """x, topk_ids, topk_weights, and (words, scale, bias) of gate, up and down as MLX has them.

    Scales differ by block, and gate is larger than up: mistaken for one another they are far off.
    """
    generator = torch.Generator().manual_seed(3)

    def weights(rows, k, size):
        spread = torch.exp2(torch.randint(-3, 4, (E, rows, k // 32), generator=generator).float()).repeat_interleave(32, -1)
        values = torch.randn(E, rows, k, generator=generator) * spread * size / k**0.5
        codes, scale = quantization.quantize(values, E2M1, BlockScaledLayout.e8m0_k32())
        return *checkpoints.to_mlx(codes, scale, "mxfp4"), torch.randn(E, rows, generator=generator) / 32

    x = torch.randn(TOKENS, H, generator=generator).bfloat16()
    topk_ids = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)]).int()
    topk_weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return x, topk_ids, topk_weights, weights(I, H, 0.5), weights(I, H, 0.05), weights(H, I, 0.5)


def array(tensor):
    return mx.array(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


def swiglu(g, u):
    g, u = mx.minimum(g, 7.0), mx.clip(u, -7.0, 7.0)
    return g * mx.sigmoid(1.702 * g) * (u + 1)


def by_mlx(product, is_sorted: bool) -> torch.Tensor:
    """The layer in float32; `product(rows, weights, experts, is_sorted)` multiplies each row with its expert's weights."""
    x, topk_ids, topk_weights, *layer = case()
    order = torch.argsort(topk_ids.flatten(), stable=True) if is_sorted else torch.arange(topk_ids.numel())
    experts = topk_ids.flatten()[order]
    gate, up, down = ([array(part) for part in weights] for weights in layer)
    biases = [weights[2][array(experts)] for weights in (gate, up, down)]
    rows = array(x)[array(order // TOP_K)]
    act = swiglu(*(product(rows, w, array(experts), is_sorted) + b for w, b in zip((gate, up), biases[:2], strict=True)))
    y = product(act, down, array(experts), is_sorted) + biases[2]
    y = torch.from_numpy(np.array(y)).double() * topk_weights.flatten()[order].double()[:, None]
    return torch.zeros(TOKENS, H, dtype=torch.float64).index_add_(0, order // TOP_K, y)


def gather_qmm(rows, weights, experts, is_sorted):
    words, scale, _ = weights
    y = mx.gather_qmm(rows[:, None], words, scale, rhs_indices=experts, sorted_indices=is_sorted, **MODE)
    return y[:, 0]


def dequantize(rows, weights, experts, is_sorted):
    words, scale, _ = weights
    return (mx.dequantize(words, scale, **MODE).astype(mx.float32)[experts] @ rows[:, :, None])[:, :, 0]


def operator():
    x, topk_ids, topk_weights, gate, up, down = case()
    gate_up = [torch.cat(pair, 1) for pair in zip(gate, up, strict=True)]
    w13 = prepare_mxfp4_weights(*gate_up, source="mlx", gate="separated")
    w2 = prepare_mxfp4_weights(*down, source="mlx")
    return moe_operator.mxfp4_moe(x, topk_ids, topk_weights, w13, w2, activation=Activation())


@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("product", [gather_qmm, dequantize])
def test_cpu(product, is_sorted):
    assert_close(operator(), by_mlx(product, is_sorted), **BOUNDS)


def test_kernels(monkeypatch):
    """The launches that a GPU gets, on target c."""

    def for_c(make, arguments, device, pass_configs):
        return compiled(make, arguments, "c")

    monkeypatch.setattr(moe_operator, "_by_reference", functools.partial(launch, compiled=for_c))
    assert_close(operator(), by_mlx(gather_qmm, True), **BOUNDS)


def test_the_bounds_tell_layouts_apart(monkeypatch):
    """What agrees above is far off with nibbles swapped, scales of the next block, or gate for up."""
    want = by_mlx(gather_qmm, False)
    x, topk_ids, topk_weights, gate, up, (words, scale, bias) = case()
    nibbles = words.view(torch.uint8)
    wrong = {
        "nibbles": (gate, up, ((nibbles >> 4 | nibbles << 4).view(torch.uint32), scale, bias)),
        "scales": (gate, up, (words, scale.roll(1, 1), bias)),
        "gate": (up, gate, (words, scale, bias)),
    }
    for what, layer in wrong.items():
        monkeypatch.setitem(globals(), "case", lambda layer=layer: (x, topk_ids, topk_weights, *layer))
        got = operator()
        assert torch.nn.functional.cosine_similarity(got.double(), want, dim=-1).mean() < 0.5, what
