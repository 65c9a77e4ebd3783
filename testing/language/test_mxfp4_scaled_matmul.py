"""T.mxfp4_scaled_matmul: activations of 16, 8 and 4 bits against float64 on every target; one-hot rows; errors by message."""

import pytest
import torch
from language.mx_run import run
from language.mxfp4_cases import KINDS, MX, activations, name_of, tiled, weights
from numeric import assert_close

from tilelang_ext import formats, reference
from tilelang_ext import language as T


def check(kind, M, N, K, target):
    (A, SA, x), (W, SW) = activations(kind, M, K), weights(N, K)
    C = torch.full((M, N), torch.nan)
    arguments = (A, torch.zeros(1, 1, dtype=torch.uint8) if SA is None else SA, W, SW, C)
    run(tiled(A, SA, W), *arguments, target=target)
    # A tensor core sums with fewer bits than float32.
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32", max_error=2e-3 if target == "cuda" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["c", "metal"])
def test_activations(target, kind):
    check(kind, 40, 150, 288, target)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("hip -mcpu=gfx942", "bfloat16"),
        ("hip -mcpu=gfx942", "fp4 per 32"),
        ("hip -mcpu=gfx1100", "fp8 per row"),
        ("hip -mcpu=gfx1100", "fp8 per 32"),
    ],
)
def test_activations_on_amd(target, kind):
    """Others are in testing/rocm/test_mxfp4.py, compiled as well."""
    check(kind, 40, 100, 96, target)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_activations_on_an_nvidia_gpu(kind):
    check(kind, 40, 150, 288, "cuda")


@pytest.mark.parametrize("target", ["c", "metal"])
def test_one_hot_rows_give_the_weights(target):
    M, N, K = 32, 64, 128
    W, SW = weights(N, K)
    A = torch.zeros(M, K, dtype=torch.bfloat16)
    columns = torch.randperm(K, generator=torch.Generator().manual_seed(3))[:M]
    A[torch.arange(M), columns] = 1
    C = torch.full((M, N), torch.nan)
    run(tiled(A, None, W), A, torch.zeros(1, 1, dtype=torch.uint8), W, SW, C, target=target)
    assert torch.equal(C.double(), reference.dequantize(W, SW, formats.E2M1, MX)[:, columns].T)


def test_broken_operands_are_far_off():
    """What the bounds must tell from a right result: swapped nibbles, scales of the next group."""
    W, SW = weights(64, 128)
    A = activations("bfloat16", 32, 128)[2]
    expected = reference.mxfp4_matmul(A, W, SW)
    for broken in (reference.mxfp4_matmul(A, W >> 4 | W << 4, SW), reference.mxfp4_matmul(A, W, SW.roll(1, 1))):
        with pytest.raises(AssertionError, match="max error"):
            assert_close(broken, expected, dtype="float32", max_error=3e-2)


def in_tiles(A_scope, W_scope, C_scope, out, clear, scale, M=32, N=64, K=64):
    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        SW: T.Tensor((N, K // 32), scale),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(1, threads=64) as _:
            A_t = T.alloc_shared((M, K), "bfloat16") if A_scope == "shared" else T.alloc_fragment((M, K), "bfloat16")
            W_t = T.alloc_shared((N, K // 2), "uint8") if W_scope == "shared" else T.alloc_fragment((N, K // 2), "uint8")
            T.copy(A, A_t)
            T.copy(W, W_t)
            if C_scope == "global":
                T.mxfp4_scaled_matmul(A_t, None, W_t, SW, C, clear_accum=clear)
            else:
                C_t = T.alloc_shared((M, N), out) if C_scope == "shared" else T.alloc_fragment((M, N), out)
                T.copy(C, C_t)
                T.mxfp4_scaled_matmul(A_t, None, W_t, SW, C_t, clear_accum=clear)
                T.copy(C_t, C)

    return kernel


@pytest.mark.parametrize(
    ("target", "A_scope", "W_scope", "C_scope", "out", "clear"),
    [
        ("c", "shared", "shared", "fragment", "float32", False),
        ("c", "shared", "fragment", "global", "float16", False),
        ("metal", "shared", "shared", "fragment", "float32", False),
        ("metal", "fragment", "shared", "shared", "bfloat16", False),
        ("metal", "shared", "fragment", "global", "float16", False),
        ("metal", "shared", "shared", "global", "bfloat16", True),
        ("hip -mcpu=gfx942", "fragment", "shared", "shared", "bfloat16", False),
        ("hip -mcpu=gfx942", "shared", "shared", "global", "bfloat16", True),
    ],
)
def test_scopes(target, A_scope, W_scope, C_scope, out, clear):
    """What C held is added unscaled, and C is rounded once."""
    (A, _, x), (W, SW) = activations("bfloat16", 32, 64), weights(64, 64)
    C = (torch.randn(32, 64, generator=torch.Generator().manual_seed(4)) * 100).to(getattr(torch, out))
    expected = reference.mxfp4_matmul(x, W, SW) + (0 if clear else C.double())
    if not target.startswith("hip"):  # tilelang's HIP has no type for E8M0: its bytes go as uint8
        SW = SW.view(torch.float8_e8m0fnu)
    run(in_tiles(A_scope, W_scope, C_scope, out, clear, name_of(SW)), A, W, SW, C, target=target)
    assert_close(C, expected, dtype=out)


@pytest.mark.parametrize(
    ("A", "scale_a", "W", "scale_w", "C", "error", "message"),
    [
        ("float32", None, (64, 32), (64, 2), "float32", TypeError, "A must be bfloat16, .*; got float32"),
        ("bfloat16", None, (64, 32), (64, 2), "int32", TypeError, "C must be float32, .*; got int32"),
        ("bfloat16", ("float32", (32, 1)), (64, 32), (64, 2), "float32", ValueError, "scale_a must be None for A in bfloat16"),
        ("float8_e4m3fn", None, (64, 32), (64, 2), "float32", ValueError, "scale_a must be given for A in float8_e4m3fn"),
        ("float8_e4m3fn", ("float16", (32, 1)), (64, 32), (64, 2), "float32", TypeError, "scale_a must be float32, uint8"),
        ("float8_e4m3fn", ("float32", (32, 2)), (64, 32), (64, 2), "float32", ValueError, r"scale_a must have shape \(32, 1\)"),
        ("bfloat16", None, (48, 32), (48, 2), "float32", ValueError, r"W_packed must have shape \(64, 32\)"),
        ("bfloat16", None, (64, 16), (64, 1), "float32", ValueError, r"A must have shape \(32, 32\); got \(32, 64\)"),
        ("bfloat16", None, (64, 24), (64, 2), "float32", ValueError, "K must be a multiple of 32, .*; got 48"),
        ("bfloat16", None, (64, 32), (64, 1), "float32", ValueError, r"scale_w must have shape \(64, 2\)"),
    ],
)
def test_errors(A, scale_a, W, scale_w, C, error, message):
    scale_dtype, scale_shape = scale_a or ("float32", (32, 1))
    with pytest.raises(error, match=f"T.mxfp4_scaled_matmul: {message}"):

        @T.prim_func
        def kernel(
            A: T.Tensor((32, 64), A),
            SA: T.Tensor(scale_shape, scale_dtype),
            W: T.Tensor(W, "uint8"),
            SW: T.Tensor(scale_w, "uint8"),
            C: T.Tensor((32, 64), C),
        ):
            with T.Kernel(1, threads=64) as _:
                T.mxfp4_scaled_matmul(A, SA if scale_a else None, W, SW, C)
