"""Operands of a small mixture of experts, as `mxfp4_moe` takes them, with weights that are stored wider than they are."""

import dataclasses
import functools

import torch

from tilelang_ext import formats, quantization, reference
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.formats import hidden_format
from tilelang_ext.kernels.mxfp4_moe.launch import compiled as compiled_for_device
from tilelang_ext.kernels.mxfp4_moe.launch import launch, problem_of
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, Problem
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights

SWIGLU = Activation()
LINEAR = Activation("swiglu", alpha=0.0, limit=2.0**20)  # g / 2 * (u + 1)
TOKENS, TOP_K, E, H, I = 5, 2, 4, 96, 96
STORED_H, STORED_I, STORED_K13, STORED_K2 = 104, 104, 160, 128
MX = formats.BlockScaledLayout.e8m0_k32()
TOPK_IDS = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 9]])  # none to expert 2; no expert 9


def problem(tokens: int, top_k: int, num_experts: int, **changes) -> Problem:
    """A problem for CUDA with bfloat16 activations and weights in the general layout, but for `changes`."""
    fields = {"num_local_experts": num_experts, "hidden_size": 2880, "intermediate_size": 2880, "dtype": "bfloat16"}
    fields |= {"ids_dtype": "int64", "a_format": "bfloat16", "weights_layout": GENERAL_LAYOUT, "activation": SWIGLU}
    fields |= {"epilogue": "reduce", "target_kind": "cuda", "num_sms": 132}
    return Problem(tokens, top_k, num_experts, **fields | changes)


def launch_kernels(
    tensors, out, activation=SWIGLU, a_format="bfloat16", epilogue="reduce", mask=None, compiled=compiled_for_device, **changes
) -> None:
    """Launch what a GPU gets for (x, topk_ids, topk_weights, w13, w2); `changes` are made to the problem."""
    operands = Operands(*tensors, mask)
    problem = dataclasses.replace(problem_of(operands, activation, a_format, epilogue), **changes)
    launch(problem, operands, out, compiled=compiled)


def stored(rows, k, generator):
    spread = torch.exp2(torch.randint(-2, 2, (E, rows, k // 32), generator=generator).float()).repeat_interleave(32, -1)
    codes, scale = quantization.quantize(torch.randn(E, rows, k, generator=generator) * spread / 4, formats.E2M1, MX)
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


def arguments(activation=SWIGLU, mask=None, a_format="bfloat16"):
    """Operands with padding of NaN, as mxfp4_moe takes them, and the float64 result with activations rounded to `a_format`."""
    x, topk_weights, w13, w2, d13, d2, (bias13, bias2) = case()
    x = x.half() if a_format == "float16" else x
    weights = (
        prepare_mxfp4_weights(*w13, gate="separated", rows=d13.shape[1], k=d13.shape[2]),
        prepare_mxfp4_weights(*w2, rows=d2.shape[1], k=d2.shape[2]),
    )
    act = reference.silu_mul if activation.name == "silu" else reference.swiglu
    options = {
        "activation": functools.partial(act, gate="separated"),
        "bias13": bias13,
        "bias2": bias2,
        "between": hidden_format(a_format),
        "expert_mask": mask,
    }
    expected = reference.moe(reference.requantize(x, a_format), TOPK_IDS, topk_weights, d13, d2, **options)
    return (x, TOPK_IDS, topk_weights, *weights), expected


@functools.cache
def one_hot():
    """Tokens whose x is 1 at one k, layers of 8 experts that return a column of random weights with LINEAR, and those columns.

    Layer "w2" returns columns of w2, layers "gate" and "up" those of a half of w13; the other weights are the identity or zero.
    """
    experts, size = 8, 96
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (experts, size, size // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(125, 130, (experts, size, size // 32), generator=generator, dtype=torch.uint8)
    topk_ids = (torch.arange(size) % experts)[:, None]
    expected = reference.dequantize(codes, scale, formats.E2M1, MX)[topk_ids[:, 0], :, torch.arange(size)].bfloat16()
    eye = torch.eye(size).expand(experts, size, size)
    random, one, nothing = (codes, scale), *(quantization.quantize(factor * eye, formats.E2M1, MX) for factor in (1, 0))

    def layer(gate, up, bias_gate, bias_up, w2):
        bias = torch.tensor([bias_gate, bias_up]).repeat_interleave(size).expand(experts, -1)
        w13 = [torch.cat(pair, 1) for pair in zip(gate, up, strict=True)]
        return prepare_mxfp4_weights(*w13, bias, gate="separated"), prepare_mxfp4_weights(*w2)

    layers = {
        "w2": layer(one, nothing, 0.0, 1.0, random),
        "gate": layer(random, nothing, 0.0, 1.0, one),
        "up": layer(nothing, random, 2.0, -1.0, one),
    }
    return (torch.eye(size).bfloat16(), topk_ids, torch.ones(size, 1)), layers, expected
