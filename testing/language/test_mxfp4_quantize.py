"""T.mx_quantize: codes and scales of the host's quantiser, bit for bit, on every target; errors by message."""

import pytest
import torch
from language.mx_run import TARGETS, run

from tilelang_ext import formats, quantization
from tilelang_ext import language as T

MX = T.BlockScaledLayout.e8m0_k32()
ELEMENTS = {"mxfp4": formats.E2M1, "mxfp8": formats.E4M3}
M, K = 32, 128


def values():
    """All magnitudes of float32, subnormals too, and the hard cases: zeros, ties, maxima at and beside a power of two."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 120, (M, K // 32), generator=generator).double()
    x = (torch.randn(M, K, generator=generator).double() * torch.exp2(exponents).repeat_interleave(32, 1)).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[0, :32] = 0.0
    x[1, :32] = -0.0
    x[2, :64] = torch.cat([ties, -ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(9.0))]).repeat(2)
    x[3] = 1e-44
    x[4, :32] = torch.finfo(torch.float32).max
    steps = torch.arange(1, 33)
    x[5] = torch.cat([448 - 2.0 * steps, 448 * torch.exp2(-steps.float()), 2.0**-6 - steps * 2.0**-10, 6 - 4.0 / steps])
    return x


def quantizer(format, source, dtype):
    shape, out_dtype = ((M, K // 2), "uint8") if format == "mxfp4" else ((M, K), "float8_e4m3fn")

    @T.prim_func
    def kernel(X: T.Tensor((M, K), dtype), out: T.Tensor(shape, out_dtype), scale: T.Tensor((M, K // 32), "uint8")):
        with T.Kernel(1, threads=64) as _:
            if source == "global":
                T.mx_quantize(X, out, scale, format=format)
            else:
                X_f, out_f = T.alloc_fragment((M, K), dtype), T.alloc_fragment(shape, out_dtype)
                scale_f = T.alloc_fragment((M, K // 32), "uint8")
                T.copy(X, X_f)
                T.mx_quantize(X_f, out_f, scale_f, format=format)
                T.copy(out_f, out)
                T.copy(scale_f, scale)

    return kernel


def check(target, format, source, x):
    codes, scale = quantization.quantize(x, ELEMENTS[format], MX)
    out, out_scale = torch.full_like(codes.view(torch.uint8), 0x5A).view(codes.dtype), torch.full_like(scale, 0x5A)
    run(quantizer(format, source, str(x.dtype).removeprefix("torch.")), x, out, out_scale, target=target)
    assert torch.equal(out_scale, scale)
    assert torch.equal(out.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(("format", "source"), [("mxfp4", "global"), ("mxfp8", "fragment")])  # test_of_bfloat16 has another
@pytest.mark.parametrize("target", [*TARGETS, pytest.param("cuda", marks=pytest.mark.cuda)])
def test_codes_and_scales(target, format, source):
    check(target, format, source, values())


def test_of_bfloat16():
    check("metal", "mxfp4", "fragment", values().clamp(-1e38, 1e38).bfloat16())


def test_a_group_with_nan_or_infinity_has_the_scale_nan():
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    x[3, 40], x[4, 127] = torch.nan, -torch.inf
    scale = torch.zeros(M, K // 32, dtype=torch.uint8)
    run(quantizer("mxfp4", "global", "float32"), x, torch.zeros(M, K // 2, dtype=torch.uint8), scale, target="metal")
    assert (scale == 255).nonzero().tolist() == [[3, 1], [4, 3]]


@pytest.mark.parametrize(
    ("X", "out", "scale", "format", "error", "message"),
    [
        (((8, 64), "float32"), ((8, 32), "uint8"), ((8, 2), "uint8"), "nvfp4", ValueError, "format must be 'mxfp4' or 'mxfp8'"),
        (((8, 64), "int32"), ((8, 32), "uint8"), ((8, 2), "uint8"), "mxfp4", TypeError, "X must be float32, .*; got int32"),
        (((8, 64), "float32"), ((8, 64), "uint8"), ((8, 2), "uint8"), "mxfp4", ValueError, r"out must have shape \(8, 32\)"),
        (((8, 64), "float32"), ((8, 32), "uint8"), ((8, 4), "uint8"), "mxfp4", ValueError, r"scale must have shape \(8, 2\)"),
        (((8, 64), "float32"), ((8, 64), "int8"), ((8, 2), "uint8"), "mxfp8", TypeError, "out must be float8_e4m3fn, uint8"),
        (
            ((8, 48), "float32"),
            ((8, 24), "uint8"),
            ((8, 2), "uint8"),
            "mxfp4",
            ValueError,
            "K must be a multiple of 32, .*; got 48",
        ),
    ],
)
def test_errors(X, out, scale, format, error, message):
    with pytest.raises(error, match=f"T.mx_quantize: {message}"):

        @T.prim_func
        def kernel(X: T.Tensor(*X), out: T.Tensor(*out), scale: T.Tensor(*scale)):
            with T.Kernel(1, threads=64) as _:
                T.mx_quantize(X, out, scale, format=format)
