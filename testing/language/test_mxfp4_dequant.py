"""T.mxfp4_dequant: every byte of codes under every scale byte, bit for bit, on every target; and its errors by message."""

import pytest
import torch
from language.mx_run import TARGETS, run

from tilelang_ext import formats, quantization, reference
from tilelang_ext import language as T

MX = T.BlockScaledLayout.e8m0_k32()
DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn"]
N, K = 32, 256


def dequantizer(dtype, scope="fragment", source="global", scale_dtype="uint8"):
    @T.prim_func
    def kernel(W: T.Tensor((N, K // 2), "uint8"), S: T.Tensor((N, K // 32), scale_dtype), out: T.Tensor((N, K), dtype)):
        with T.Kernel(1, threads=64) as _:
            if source == "global":
                W_t, S_t = W, S
            elif source == "shared":
                W_t, S_t = T.alloc_shared((2, N, K // 2), "uint8"), T.alloc_shared((N, K // 32), scale_dtype)
                T.copy(W, W_t[1, :, :])
                T.copy(S, S_t)
            else:
                W_t, S_t = T.alloc_fragment((N, K // 2), "uint8"), T.alloc_fragment((N, K // 32), scale_dtype)
                T.copy(W, W_t)
                T.copy(S, S_t)
            W_t = W_t[1, :, :] if source == "shared" else W_t
            if scope == "global":
                T.mxfp4_dequant(W_t, S_t, out)
            else:
                out_t = T.alloc_shared((N, K), dtype) if scope == "shared" else T.alloc_fragment((N, K), dtype)
                T.mxfp4_dequant(W_t, S_t, out_t)
                T.copy(out_t, out)

    return kernel


def all_codes():
    """Every byte of two codes, under scales that differ in each row and group: all 256 of them."""
    W = torch.arange(256).repeat(N * K // 512).reshape(N, K // 2).to(torch.uint8)
    scale = torch.arange(256).reshape(N, K // 32).to(torch.uint8)
    return W, scale


def expected_of(W, scale, dtype):
    """The value in `dtype`; float8_e4m3fn saturates, as the host's encoder does and torch's cast does not."""
    value = reference.dequantize(W, scale, formats.E2M1, MX)
    if dtype == "float8_e4m3fn":
        return quantization.encode(value, formats.E4M3).view(torch.float8_e4m3fn)
    return value.float().to(getattr(torch, dtype))


def assert_same_bits(got, expected):
    """Equal bits, but for the payload of a NaN."""
    got, expected = got.float(), expected.float()
    same = (got.view(torch.int32) == expected.view(torch.int32)) | (got.isnan() & expected.isnan())
    where = (~same).nonzero()
    assert same.all(), f"{len(where)} differ, first at {where[0].tolist()}: {got[~same][0]} and not {expected[~same][0]}"


def check(target, dtype, W, scale, **options):
    out = torch.full((N, K), 77.0).to(getattr(torch, dtype))
    run(dequantizer(dtype, **options), W, scale, out, target=target)
    assert_same_bits(out, expected_of(W.view(torch.uint8), scale.view(torch.uint8), dtype))


@pytest.mark.parametrize(  # the two chips of AMD have one decoder, and take turns
    ("target", "dtype"),
    [
        (target, dtype)
        for i, target in enumerate(TARGETS)
        for j, dtype in enumerate(DTYPES)
        if not target.startswith("hip") or (i + j) % 2
    ],
)
def test_every_code_under_every_scale(target, dtype):
    check(target, dtype, *all_codes())


@pytest.mark.parametrize(
    ("target", "scope", "source"),
    [
        ("c", "global", "shared"),
        ("metal", "shared", "global"),
        ("metal", "global", "shared"),
        ("metal", "fragment", "fragment"),
        ("hip -mcpu=gfx942", "shared", "global"),
        ("hip -mcpu=gfx942", "fragment", "fragment"),
    ],
)
def test_scopes(target, scope, source):
    check(target, "bfloat16", *all_codes(), scope=scope, source=source)


def test_scales_in_their_own_dtype():
    W, scale = all_codes()
    check("metal", "bfloat16", W, scale.view(torch.float8_e8m0fnu), scale_dtype="float8_e8m0fnu")


def test_the_test_sees_swapped_nibbles():
    W, scale = all_codes()
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(expected_of(W >> 4 | W << 4, scale, "bfloat16"), expected_of(W, scale, "bfloat16"))


def test_without_scales():
    W, _ = all_codes()

    @T.prim_func
    def kernel(W: T.Tensor((N, K // 2), "uint8"), out: T.Tensor((N, K), "float8_e4m3fn")):
        with T.Kernel(1, threads=64) as _:
            T.mxfp4_dequant(W, None, out)

    out = torch.full((N, K), 77.0).to(torch.float8_e4m3fn)
    run(kernel, W, out, target="metal")
    assert_same_bits(out, quantization.decode(quantization.unpack(W), formats.E2M1))


@pytest.mark.parametrize(
    ("W", "scale", "out", "error", "message"),
    [
        (((8, 32), "int8"), ((8, 2), "uint8"), ((8, 64), "bfloat16"), TypeError, "W_packed must be uint8; got int8; pack two"),
        (((8, 32), "uint8"), ((8, 2), "float32"), ((8, 64), "bfloat16"), TypeError, "scale must be uint8, .*; got float32"),
        (((8, 32), "uint8"), ((8, 2), "uint8"), ((8, 64), "int8"), TypeError, "out must be bfloat16, .*; got int8"),
        (((8, 64), "uint8"), ((8, 2), "uint8"), ((8, 64), "bfloat16"), ValueError, r"W_packed must have shape \(8, 32\)"),
        (((8, 32), "uint8"), ((8, 1), "uint8"), ((8, 64), "bfloat16"), ValueError, r"scale must have shape \(8, 2\)"),
        (
            ((8, 24), "uint8"),
            ((8, 2), "uint8"),
            ((8, 48), "bfloat16"),
            ValueError,
            "K must be a multiple of 32, .*; got 48; pad K",
        ),
        (((32,), "uint8"), ((8, 2), "uint8"), ((8, 64), "bfloat16"), ValueError, "W_packed must have at least 2 dimensions"),
    ],
)
def test_errors(W, scale, out, error, message):
    with pytest.raises(error, match=f"T.mxfp4_dequant: {message}"):

        @T.prim_func
        def kernel(W: T.Tensor(*W), S: T.Tensor(*scale), out: T.Tensor(*out)):
            with T.Kernel(1, threads=64) as _:
                T.mxfp4_dequant(W, S, out)


def test_leading_indices_are_fixed():
    with pytest.raises(ValueError, match="leading dimensions of W_packed must be fixed"):

        @T.prim_func
        def kernel(W: T.Tensor((2, 8, 32), "uint8"), S: T.Tensor((8, 2), "uint8"), out: T.Tensor((8, 64), "bfloat16")):
            with T.Kernel(1, threads=64) as _:
                T.mxfp4_dequant(W, S, out)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_an_nvidia_gpu(dtype):
    check("cuda", dtype, *all_codes())
