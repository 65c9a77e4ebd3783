"""Activations of a user: traced into the epilogue, told apart by what they compute, and by name in plans."""

import functools
import re

import pytest
import torch
from kernels.mxfp4_moe.operands import arguments
from kernels.mxfp4_moe.targets import compiled
from numeric import assert_close
from tilelang import tvm
from tilelang.engine.lower import lower
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import reference
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe import sm90_mma, sm90_wgmma
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.launch import launch
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.signature import options_of
from tilelang_ext.kernels.mxfp4_moe.weights import tile_for_hopper

_EXPONENTIAL = r"T\.exp\(|expf"


def macro(factor=1.0):
    """The square of a rectified gate, by a variable whose name kernels have too."""

    @T.macro
    def relu_squared(gate, up):
        accumulator = T.max(gate, T.float32(0)) * T.float32(factor)
        return accumulator * accumulator * up

    return relu_squared


def relu_squared(gate, up):
    return gate.clamp(min=0) ** 2 * up


def cosine(result, expected):
    return torch.nn.functional.cosine_similarity(result.double(), expected.double(), dim=1).mean()


def test_told_apart_by_what_is_computed():
    assert Activation.custom(macro()) == Activation.custom(macro())
    assert Activation.custom(macro()) != Activation.custom(macro(2.0))
    x = torch.zeros(1, dtype=torch.bfloat16)
    names = {options_of(Activation.custom(macro(factor)), None, x)[0] for factor in (1.0, 2.0)}
    assert len(names) == 2, "a plan's key has the name"


def test_on_the_cpu_by_the_function_of_tensors():
    operands, of_silu = arguments(Activation("silu"))
    result = mxfp4_moe(*operands, activation=Activation.custom(macro(), relu_squared))
    assert cosine(result, of_silu) < 0.99
    message = r"must have a function of torch tensors on the CPU; got 'custom .*' without; pass"
    with pytest.raises(NotImplementedError, match=message):
        mxfp4_moe(*operands, activation=Activation.custom(macro(3.0)))


@pytest.mark.parametrize("name", ["custom", "clamped_silu"])
def test_kernels_in_the_simulator(name, monkeypatch):
    """Metal's kernels give what the function of tensors gives; a limit of 0.5 clamps most gates and ups."""
    activation = Activation.custom(macro(), relu_squared) if name == "custom" else Activation(name, limit=0.5)
    operands, _ = arguments()
    expected = mxfp4_moe(*operands, activation=activation)

    def of_target(make, arguments, device, pass_configs):
        return compiled(make, arguments, "metal")

    monkeypatch.setattr(moe_operator, "_by_reference", functools.partial(launch, compiled=of_target))
    result = mxfp4_moe(*operands, activation=activation)
    assert cosine(result, expected) >= 0.9999
    assert_close(result, expected.double(), dtype="bfloat16")


@pytest.mark.cuda
@pytest.mark.parametrize("copies", [1, 8])  # of each token: few rows per expert, and many
@pytest.mark.parametrize("a_format", ["general", "bfloat16", "fp8"])
@pytest.mark.parametrize("name", ["custom", "clamped_silu"])
def test_on_a_gpu(name, a_format, copies):
    """The GPU gives what the function of tensors gives, whichever weights the kernels read."""
    if a_format != "general" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an NVIDIA Hopper GPU")
    activation = Activation.custom(macro(), relu_squared) if name == "custom" else Activation(name, limit=0.5)
    operands, _ = arguments()
    tokens, weights = [each.repeat(copies, 1) for each in operands[:3]], operands[3:]
    expected = mxfp4_moe(*tokens, *weights, activation=activation).double()
    if a_format != "general":
        weights = [tile_for_hopper(each, a_dtype=a_format) for each in weights]
    weights = [type(each)(*(part.cuda() for part in each[:3]), *each[3:]) for each in weights]
    options = {"activation": activation, "a_dtype": "fp8" if a_format == "fp8" else None}
    result = mxfp4_moe(*(each.cuda() for each in tokens), *weights, **options).cpu()
    assert cosine(result, expected) >= (0.999 if a_format == "fp8" else 0.9999)
    if a_format != "fp8":
        assert_close(result, expected, dtype="bfloat16")


def test_reference_of_clamped_silu():
    gate_up = torch.tensor([[3.0, -3.0, 0.25, 2.0, -2.0, 0.5]])
    gate, up = torch.tensor([1.0, -3.0, 0.25]).double(), torch.tensor([1.0, -1.0, 0.5]).double()
    torch.testing.assert_close(reference.clamped_silu(gate_up, limit=1.0)[0], gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("module", [sm90_mma, sm90_wgmma], ids=["mma", "wgmma"])
def test_traced_into_the_kernels_for_hopper(module):
    """The rectified gate of the macro is there, and no sigmoid."""
    config = sm90_mma.Config(8, 2, 1, 1) if module is sm90_mma else sm90_wgmma.Config(16, 4, 2)
    first = (config,) if module is sm90_mma else (config, 132)
    text = module.gate_up(*first, Activation.custom(macro())).script()
    assert "T.max" in text
    assert not re.search(_EXPONENTIAL, text)
    assert re.search(_EXPONENTIAL, module.gate_up(*first, Activation("silu")).script())


def test_lowered_for_cuda():
    target = Target({"kind": "cuda", "arch": "sm_90a"})
    with tvm.transform.PassContext(config=sm90_mma.PASS_CONFIGS), target:
        kernel = sm90_mma.gate_up(sm90_mma.Config(8, 2, 1, 1), Activation.custom(macro(3.0)))
        text = lower(kernel, target=target, enable_device_compile=False).kernel_source
    assert not re.search(_EXPONENTIAL, text)
    assert re.search(r"max\(", text[text.index("__global__") :]), "the rectified gate"


def test_unknown_names():
    operands, _ = arguments()
    with pytest.raises(ValueError, match="activation must be one of swiglu, silu, clamped_silu; got 'gelu'; pick one, or call"):
        mxfp4_moe(*operands, activation=Activation("gelu"))
