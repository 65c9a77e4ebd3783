"""What tilelang's HIP generator and templates lack or AMD's headers refuse, said in other words: values, on the simulator."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate

HIP = "hip -mcpu=gfx942"
X = torch.linspace(-0.75, 0.75, 64)
UNARY = {"tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh}
UNARY |= {"tanh": torch.tanh, "erf": torch.erf}
FAST = {"__exp": torch.exp, "__log": torch.log, "__log2": torch.log2, "__log10": torch.log10, "__cos": torch.cos}
FAST |= {"__sin": torch.sin, "__tan": torch.tan}


def functions(names, dtype):
    calls = [getattr(T, name) for name in names]

    @T.prim_func
    def kernel(A: T.Tensor((64,), dtype), O: T.Tensor((len(names), 64), dtype)):
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding()
            apply(calls, A, O, tx)

    return kernel


@T.macro
def put(O, row, tx, value):
    O[row, tx] = value


def apply(calls, A, O, tx):
    for row, call in enumerate(calls):
        put(O, row, tx, call(A[tx]))


@pytest.mark.parametrize(
    ("table", "dtype"), [(UNARY, "float16"), (UNARY, "bfloat16"), (FAST, "float32")], ids=["half", "bfloat", "fast"]
)
def test_functions(table, dtype):
    x = (X + 2 if table is FAST else X).to(getattr(torch, dtype))
    out = torch.full((len(table), 64), float("nan")).to(x.dtype)
    assert not simulate(functions(tuple(table), dtype), x, out, target=HIP).findings
    for row, (name, function) in enumerate(table.items()):
        want = function(x.double())
        torch.testing.assert_close(out[row], want.to(x.dtype), rtol={"bfloat16": 8e-3}.get(dtype, 1e-3), atol=1e-3, msg=name)


def clamped(dtype):
    @T.prim_func
    def kernel(A: T.Tensor((512,), dtype), O: T.Tensor((512,), dtype)):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(512):
                O[i] = T.max(A[i], T.cast(300, dtype))

    return kernel


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_eight_values_of_16_bits_from_one(dtype):
    a, out = torch.arange(512).to(getattr(torch, dtype)), torch.zeros(512, dtype=getattr(torch, dtype))
    assert not simulate(clamped(dtype), a, out, target=HIP).findings
    assert out.tolist() == [max(i, 300) for i in range(512)]


def adds(dtype):
    @T.prim_func
    def kernel(X: T.Tensor((64,), dtype), C: T.Tensor((64,), dtype)):
        with T.Kernel(3, threads=32):
            T.atomic_add(C[0:64], X[0:64])

    return kernel


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_atomics_of_pairs(dtype):
    x, c = torch.randint(-8, 8, (64,)).to(getattr(torch, dtype)), torch.arange(64).to(getattr(torch, dtype))
    simulate(adds(dtype), x, c, target=HIP)
    assert torch.equal(c.float(), torch.arange(64) + 3 * x.float())


def products(dtype, clear):
    @T.prim_func
    def kernel(A: T.Tensor((64, 64), dtype), B: T.Tensor((64, 64), dtype), C: T.Tensor((64, 64), dtype)):
        with T.Kernel(1, threads=128):
            a, b = T.alloc_shared((64, 32), dtype), T.alloc_shared((64, 32), dtype)
            c = T.alloc_fragment((64, 64), dtype)
            if not clear:
                T.copy(C, c)
            for k in T.Pipelined(2, num_stages=0 if clear else 2):
                T.copy(A[0, k * 32], a)
                T.copy(B[0, k * 32], b)
                T.gemm(a, b, c, transpose_B=True, clear_accum=clear)
            T.copy(c, C)

    return kernel


@pytest.mark.parametrize(("dtype", "clear"), [("float16", False), ("bfloat16", True)])
def test_sums_of_16_bits(dtype, clear):
    a, b, c = (torch.randn(64, 64).to(getattr(torch, dtype)) for _ in range(3))
    want = a[:, 32:].double() @ b[:, 32:].double().t() if clear else c.double() + a.double() @ b.double().t()
    assert not simulate(products(dtype, clear), a, b, c, target=HIP).findings
    torch.testing.assert_close(c.double(), want, rtol=2e-2, atol=6e-2 if dtype == "bfloat16" else 2e-2)
