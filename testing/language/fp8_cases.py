"""Operands and kernels of T.fp8_scaled_matmul that the tests of every target share."""

# Without `from __future__ import annotations`: this file holds kernels.

import torch

from tilelang_ext import formats, quantization
from tilelang_ext import language as T

L = T.BlockScaledLayout
F8 = "float8_e4m3fn"
TENSOR, ROW, E8M0 = (L.per_tensor(),) * 2, (L.per_row(),) * 2, (L.e8m0_k32(),) * 2
BLOCK = (L.block(1, 128), L.block(128, 128))
LAYOUTS = {"tensor": TENSOR, "row": ROW, "block": BLOCK, "e8m0": E8M0, "row and block": (L.per_row(), L.block(128, 128))}
FORMATS = {f.dtype: f for f in formats.FP8_OPERANDS}


def operand(rows, K, layout, dtype="float8_e4m3fn", seed=0, spread=4):
    """Codes and scales of values whose magnitude changes from row to row, and from group to group that has a scale, by
    powers of two up to `spread` either way."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, K, generator=generator)
    values *= torch.exp2(torch.randint(-spread, spread + 1, (rows, 1), generator=generator).float())
    if layout.k is not None:
        groups = torch.exp2(torch.randint(-spread, spread + 1, (1, -(-K // layout.k)), generator=generator).float())
        values *= groups.repeat_interleave(layout.k, 1)[:, :K]
    codes, scale = quantization.quantize(values, FORMATS[dtype], layout)
    return codes, scale


def dtype_of(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def whole(
    M,
    N,
    K,
    a="float8_e4m3fn",
    b="float8_e4m3fn",
    out="float32",
    scope="fragment",
    clear=True,
    scale="float32",
    A_scope="global",
):
    """One tile of one block, one scale per row; C starts as it is given unless `clear`."""

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), a),
        SA: T.Tensor((M, 1), scale),
        B: T.Tensor((N, K), b),
        SB: T.Tensor((N, 1), scale),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(1, threads=64) as _:
            if A_scope == "fragment":
                A_t = T.alloc_fragment((M, K), a)
                T.copy(A, A_t)
            else:
                A_t = A
            if scope == "global":
                T.fp8_scaled_matmul(A_t, SA, B, SB, C, transpose_B=True, clear_accum=clear)
            else:
                C_t = T.alloc_shared((M, N), out) if scope == "shared" else T.alloc_fragment((M, N), out)
                T.copy(C, C_t)
                T.fp8_scaled_matmul(A_t, SA, B, SB, C_t, transpose_B=True, clear_accum=clear)
                T.copy(C_t, C)

    return kernel


def trace(*, A=((64, 64), "float8_e4m3fn"), SA=((64,), "float32"), B=((64, 64), "float8_e4m3fn"), SB=((64,), "float32"),
          C=((64, 64), "float32"), C_scope="global", **options):  # fmt: skip
    """Trace one call with operands of the shapes and dtypes given, for its errors."""

    @T.prim_func
    def kernel(A: T.Tensor(*A), SA: T.Tensor(*SA), B: T.Tensor(*B), SB: T.Tensor(*SB), C: T.Tensor(*C)):
        with T.Kernel(1, threads=128) as _:
            if C_scope == "local":
                C_t = T.alloc_local((64, 64), "float32")
                T.fp8_scaled_matmul(A, SA, B, SB, C_t, transpose_B=True, **options)
            else:
                T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True, **options)

    return kernel
