"""Kernels that the tests of the ROCm room share, and how they are lowered to HIP text."""

# Without `from __future__ import annotations`: this file holds kernels.

import functools

from tilelang_ext import formats
from tilelang_ext import language as T
from tilelang_ext.rocm import program

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
FP8 = tuple(format.dtype for format in formats.FP8_OPERANDS)
L = T.BlockScaledLayout
LAYOUTS = {
    "tensor": (L.per_tensor(), L.per_tensor()),
    "row": (L.per_row(), L.per_row()),
    "block": (L.block(1, 128), L.block(128, 128)),
    "e8m0": (L.e8m0_k32(), L.e8m0_k32()),
}
# Two layouts on each architecture, run and compiled; the other two are in test_scaled_mm.py, whose kernels multiply so.
SCALED_LAYOUTS = [
    (arch, layout)
    for arch, layouts in {
        "gfx90a": ("row", "e8m0"),
        "gfx942": ("tensor", "block"),
        "gfx950": ("tensor", "row"),
        "gfx1100": ("tensor", "e8m0"),
        "gfx1201": ("row", "block"),
    }.items()
    for layout in layouts
]
SCALED_SIZE = {"M": 40, "N": 150, "K": 288}  # rows and columns end inside a tile, K inside a step of 128


@functools.cache
def lower(kernel, arch: str) -> program.HipProgram:
    """The HIP program of a kernel, lowered once for all tests; `lower.__wrapped__` lowers anew."""
    return program.lower(kernel, {"kind": "hip", "mcpu": arch})


# What makes a kernel is cached too: the same options are the same prim_func, hence one lowering.
@functools.cache
def gemm(
    a,
    b,
    *,
    M=64,
    N=64,
    K=128,
    accum="float32",
    trans_A=False,
    trans_B=True,
    A_scope="shared",
    B_scope="shared",
    C_scope="fragment",
    threads=128,
):
    """One tile of T.gemm, its operands in the scopes given."""
    A_shape, B_shape = ((K, M) if trans_A else (M, K)), ((N, K) if trans_B else (K, N))
    alloc = {"shared": T.alloc_shared, "fragment": T.alloc_fragment}

    @T.prim_func
    def kernel(A: T.Tensor(A_shape, a), B: T.Tensor(B_shape, b), C: T.Tensor((M, N), accum)):
        with T.Kernel(1, threads=threads):
            A_s = alloc[A_scope](A_shape, a)
            B_s = alloc[B_scope](B_shape, b)
            C_f = alloc[C_scope]((M, N), accum)
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, C_f, transpose_A=trans_A, transpose_B=trans_B, clear_accum=True)
            T.copy(C_f, C)

    return kernel


@functools.cache
def scaled_matmul(
    layout: str,
    *,
    a="float8_e4m3fn",
    b="float8_e4m3fn",
    M=64,
    N=128,
    K=288,
    block_M=32,
    block_N=64,
    threads=128,
    require_native=False,
):
    """T.fp8_scaled_matmul on operands in global memory; K ends inside a step of 128."""
    layouts = LAYOUTS[layout]
    scale_dtype = "uint8" if layouts[0].scale_format else "float32"

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), a),
        SA: T.Tensor(layouts[0].scale_shape(M, K), scale_dtype),
        B: T.Tensor((N, K), b),
        SB: T.Tensor(layouts[1].scale_shape(N, K), scale_dtype),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.fp8_scaled_matmul(
                A[by * block_M : by * block_M + block_M, 0:K],
                SA,
                B[bx * block_N : bx * block_N + block_N, 0:K],
                SB,
                C_f,
                transpose_B=True,
                scale_layout=layouts,
                clear_accum=True,
                require_native=require_native,
            )
            T.copy(C_f, C[by * block_M, bx * block_N])

    return kernel


@functools.cache
def attention_products(dtype, *, M=64, N=64, D=64, threads=128):
    """Two chained products: the first one's result is the register operand of the second."""

    @T.prim_func
    def kernel(
        Q: T.Tensor((M, D), dtype),
        K: T.Tensor((N, D), dtype),
        V: T.Tensor((D, N), dtype),
        O: T.Tensor((M, D), "float32"),
    ):
        with T.Kernel(1, threads=threads):
            Q_s = T.alloc_shared((M, D), dtype)
            K_s = T.alloc_shared((N, D), dtype)
            V_s = T.alloc_shared((D, N), dtype)
            S = T.alloc_fragment((M, N), "float32")
            P = T.alloc_fragment((M, N), dtype)
            O_f = T.alloc_fragment((M, D), "float32")
            T.copy(Q, Q_s)
            T.copy(K, K_s)
            T.copy(V, V_s)
            T.gemm(Q_s, K_s, S, transpose_B=True, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(S, P)
            T.gemm(P, V_s, O_f, transpose_B=True, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(O_f, O)

    return kernel


@functools.cache
def shared_accumulator(M=64, N=64, K=64):
    """A half product and an fp8 product into one accumulator."""

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float16"),
        B: T.Tensor((N, K), "float16"),
        A8: T.Tensor((M, K), "float8_e4m3fn"),
        B8: T.Tensor((N, K), "float8_e4m3fn"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128):
            A_s = T.alloc_shared((M, K), "float16")
            B_s = T.alloc_shared((N, K), "float16")
            A8_s = T.alloc_shared((M, K), "float8_e4m3fn")
            B8_s = T.alloc_shared((N, K), "float8_e4m3fn")
            C_f = T.alloc_fragment((M, N), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.copy(A8, A8_s)
            T.copy(B8, B8_s)
            T.gemm(A_s, B_s, C_f, transpose_B=True, clear_accum=True)
            T.gemm(A8_s, B8_s, C_f, transpose_B=True)
            T.copy(C_f, C)

    return kernel
