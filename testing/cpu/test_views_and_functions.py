"""Target c: other shapes and types of a tile, functions that upstream has no C for, and tensors of bool."""

import pytest
import tilelang
import torch

from tilelang_ext import language as T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_of_a_tile_and_functions(dtype):
    bits = "int32" if dtype == "float32" else "uint16"

    @T.prim_func
    def kernel(
        A: T.Tensor((8, 16), dtype),
        mask: T.Tensor((64,), "bool"),
        reshaped: T.Tensor((4, 32), dtype),
        codes: T.Tensor((8, 16), bits),
        functions: T.Tensor((3, 8, 16), dtype),
        inverse: T.Tensor((64,), "bool"),
        rows: T.Tensor((8, 1), "float32"),
    ):
        with T.Kernel(1, threads=32):
            a_s = T.alloc_shared((8, 16), dtype)
            a_f, row_f = T.alloc_fragment((8, 16), "float32"), T.alloc_fragment((8, 1), "float32")
            T.copy(A, a_s)
            wide = T.reshape(a_s, (4, 32))
            code = T.view(a_s, (8, 16), bits)
            for i, j in T.Parallel(4, 32):
                reshaped[i, j] = wide[i, j]
            for i, j in T.Parallel(8, 16):
                codes[i, j] = code[i, j]
                functions[0, i, j] = T.abs(a_s[i, j])
                functions[1, i, j] = T.fmod(a_s[i, j], T.cast(0.75, dtype))
                functions[2, i, j] = T.exp10(a_s[i, j])
                a_f[i, j] = T.cast(a_s[i, j], "float32")
            T.reduce_sum(a_f, row_f, dim=1)
            T.copy(row_f, rows)
            for i in T.Parallel(64):
                inverse[i] = T.Not(mask[i])

    A = torch.randn(8, 16).to(getattr(torch, dtype))
    A[0, 0] = -0.0
    mask, inverse = torch.rand(64) < 0.5, torch.zeros(64, dtype=torch.bool)
    reshaped, functions = torch.zeros(4, 32).to(A.dtype), torch.zeros(3, 8, 16).to(A.dtype)
    codes, rows = torch.zeros(8, 16, dtype=getattr(torch, bits)), torch.zeros(8, 1)
    tilelang.compile(kernel, target="c")(A, mask, reshaped, codes, functions, inverse, rows)
    assert torch.equal(reshaped, A.reshape(4, 32))
    assert torch.equal(codes.view(torch.uint8), A.view(torch.uint8))
    wide = A.double()
    expected = torch.stack([wide.abs(), wide.fmod(0.75), 10**wide])
    assert torch.equal(functions[0].view(codes.dtype).to(torch.int64), A.abs().view(codes.dtype).to(torch.int64))
    assert torch.allclose(functions.double(), expected, rtol=1e-6 if dtype == "float32" else 2**-8, atol=0)
    assert torch.equal(inverse, ~mask)
    assert torch.allclose(rows.double(), wide.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("source", "destination"), [("float16", "float32"), ("float32", "float16")])
def test_a_copy_converts_half(source, destination):
    @T.prim_func
    def kernel(A: T.Tensor((8, 32), source), C: T.Tensor((8, 32), destination)):
        with T.Kernel(1):
            T.import_source("// text without the end of its line")
            T.copy(A, C)

    A = torch.randn(8, 32).to(getattr(torch, source))
    C = torch.full((8, 32), torch.nan, dtype=getattr(torch, destination))
    tilelang.compile(kernel, target="c")(A, C)
    assert torch.equal(C, A.to(C.dtype))


def test_another_shape_of_an_argument_and_a_fragment_of_another_type():
    """Upstream's host code passes arguments by name, `wide` being what A's is called; halves are carried as codes."""

    @T.prim_func
    def kernel(A: T.Tensor((8, 4), "float32"), C: T.Tensor((4, 8), "float32"), halves: T.Tensor((8, 8), "bfloat16")):
        with T.Kernel(1, threads=32):
            wide = T.reshape(A, (4, 8))
            for i, j in T.Parallel(4, 8):
                C[i, j] = wide[i, 7 - j] + A[0, i]
            a_f = T.alloc_fragment((8, 4), "float32")
            T.copy(A, a_f)
            half = T.view(a_f, (8, 8), "bfloat16")
            for i, j in T.Parallel(8, 8):
                halves[i, j] = half[i, j]

    A, C, halves = torch.randn(8, 4), torch.full((4, 8), torch.nan), torch.zeros(8, 8).bfloat16()
    tilelang.compile(kernel, target="c")(A, C, halves)
    assert torch.equal(C, A.reshape(4, 8).flip(1) + A[0][:, None])
    assert torch.equal(halves.view(torch.int16), A.view(torch.int16))


def test_functions_of_halves_without_a_tile():
    """A kernel that upstream's CPU backend takes, but for these."""

    @T.prim_func
    def kernel(A: T.Tensor((32,), "float16"), C: T.Tensor((4, 32), "float16")):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                C[0, i] = T.exp(A[i])
                C[1, i] = T.sqrt(A[i])
                C[2, i] = T.tanh(A[i])
                C[3, i] = T.sigmoid(A[i])

    A, C = torch.rand(32).half(), torch.full((4, 32), torch.nan).half()
    tilelang.compile(kernel, target="c")(A, C)
    wide = A.double()
    expected = torch.stack([wide.exp(), wide.sqrt(), wide.tanh(), wide.sigmoid()])
    assert torch.allclose(C.double(), expected, rtol=2**-9, atol=0)
