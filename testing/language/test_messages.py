"""What an intrinsic refuses is one error by the style's rule, with nothing printed before it."""

import logging

import numpy as np
import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import quantization
from tilelang_ext.formats import E4M3, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe.experts import NAMES, MXFP4Experts
from tilelang_ext.kernels.scaled_mm.arguments import only_scale
from tilelang_ext.language.scales import read_scales

LAYOUT = BlockScaledLayout.per_row()


def product(scale_shape=(64, 2), **options):
    @T.prim_func
    def kernel(
        A: T.Tensor((64, 256), "float8_e4m3fn"),
        B: T.Tensor((64, 256), "float8_e4m3fn"),
        S: T.Tensor(scale_shape, "float32"),
        C: T.Tensor((64, 64), "float32"),
    ):
        with T.Kernel(1, threads=128):
            c = T.alloc_fragment((64, 64), "float32")
            T.clear(c)
            T.fp8_scaled_matmul(A, S, B, 1.0, c, transpose_B=True, **options)
            T.copy(c, C)

    return kernel


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scale_layout": "block"},
            TypeError,
            r"^T\.fp8_scaled_matmul: scale_layout must be a T\.BlockScaledLayout; got 'block'; pass one, such as",
        ),
        (
            {"scale_shape": (2, 64)},
            ValueError,
            r"^T\.fp8_scaled_matmul: scale_a must have shape \(64, 2\) for block\(1, 128\); got \(2, 64\); pass the transpose",
        ),
        ({"scales": 1}, TypeError, r"got an unexpected keyword argument 'scales'"),
    ],
)
def test_nothing_is_printed_before_the_error(options, error, message, monkeypatch):
    records = []
    logger = logging.getLogger("tilelang.language.eager.builder")
    monkeypatch.setattr(logger, "callHandlers", records.append)
    with pytest.raises(error, match=message):
        product(**options)
    assert not records


def test_the_text_of_other_errors_is_still_printed(monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("tilelang.language.eager.builder"), "callHandlers", records.append)
    with pytest.raises(ZeroDivisionError):

        @T.prim_func
        def kernel(A: T.Tensor((32,), "float32")):
            with T.Kernel(1, threads=32):
                A[0] = 1 // len("")

    assert any("Failed to build prim_func" in record.getMessage() for record in records)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: quantization.quantize(x, torch.float8_e4m3fn, LAYOUT),
            r"quantize: format must be a FloatFormat; got torch\.f",
        ),
        (
            lambda x: quantization.quantize(x, "e4m3", LAYOUT),
            r"quantize: format must be a FloatFormat; got 'e4m3'; pass one of",
        ),
        (lambda x: quantization.quantize(x, E4M3, "per_row"), r"quantize: layout must be a BlockScaledLayout; got 'per_row'"),
        (
            lambda x: quantization.quantize(x.numpy(), E4M3, LAYOUT),
            r"quantize: values: must be a torch tensor; got a numpy ndarray",
        ),
        (
            lambda x: quantization.encode(x.numpy(), E4M3),
            r"encode: values: must be a torch tensor; got a numpy ndarray; convert",
        ),
        (lambda x: quantization.encode(x, "e4m3"), r"encode: format must be a FloatFormat; got 'e4m3'"),
        (lambda x: quantization.decode(x.numpy(), E4M3), r"codes: must be a torch tensor; got a numpy ndarray"),
        (lambda x: quantization.decode(x, torch.uint8), r"codes: format must be a FloatFormat; got torch\.uint8"),
        (lambda x: only_scale("scale_a", x.numpy()), r"^scaled_mm: scale_a must be a torch tensor; got ndarray; convert it$"),
        (
            lambda x: MXFP4Experts.from_checkpoint(dict.fromkeys(NAMES, np.zeros((1, 1, 1, 16)))),
            r"MXFP4Experts: gate_up_proj_blocks must be a torch tensor; got ndarray; convert it",
        ),
    ],
)
def test_other_things_than_tensors_and_formats(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.ones(2, 32))


def test_a_transposed_scale_is_answered_with_the_wanted_shape():
    from tilelang import tvm

    buffer = tvm.tirx.decl_buffer((8, 64), "uint8")
    with pytest.raises(
        ValueError, match=r"T\.test: scale_a must have shape \(64, 8\) for e8m0_k32\(\); got \(8, 64\); pass the"
    ):
        read_scales("T.test", "scale_a", buffer, None, shape=(64, 256), begin=(0, 0), matrix=(64, 256))
