"""Kernels of one operator after another, for any target, with what each computes."""

import math

import torch

from tilelang_ext import language as T

# ruff: noqa: SIM102  conditions within conditions are what is tested
N = 64
# As float16 and float32: rounds a number of up to ten bits to an integer when it is added and subtracted.
_ROUNDING = {"float16": 1536.0, "float32": 12582912.0, "float64": 6755399441055744.0}
_CONSTANT = 0.123456791  # in float32 its last two digits matter


def floats(dtype):
    """Rows of C: a - a; a rounded by a sum and a difference; a != a; a == a; not a < b; a rounded, ties to even; ties away from
    zero; a constant."""
    c, number = _ROUNDING[dtype], getattr(T, dtype)

    @T.prim_func
    def kernel(A: T.Tensor((N,), dtype), B: T.Tensor((N,), dtype), C: T.Tensor((8, N), dtype)):
        with T.Kernel(1, threads=32):
            a, b = T.alloc_fragment((N,), dtype), T.alloc_fragment((N,), dtype)
            T.copy(A, a)
            T.copy(B, b)
            for i in T.Parallel(N):
                C[0, i] = a[i] - a[i]
                C[1, i] = (a[i] + T.cast(c, dtype)) - T.cast(c, dtype)
                C[2, i] = T.if_then_else(a[i] != a[i], T.cast(1, dtype), T.cast(0, dtype))
                C[3, i] = T.if_then_else(a[i] == a[i], T.cast(1, dtype), T.cast(0, dtype))
                C[4, i] = T.if_then_else(T.Not(a[i] < b[i]), T.cast(1, dtype), T.cast(0, dtype))
                C[5, i] = T.round(a[i])
                C[6, i] = T.round(a[i], "ties-away-from-zero")
                C[7, i] = number(_CONSTANT)

    return kernel


def float_case(dtype):
    dtype = getattr(torch, dtype)
    a = torch.cat(
        [torch.tensor([math.nan, math.inf, -math.inf, 0.5, 1.5, 2.5, -0.5, -2.5]), torch.randint(-99, 99, (N - 8,)) / 4]
    )
    a, b = a.to(dtype), torch.randn(N).to(dtype)
    away = a.sign() * (a.abs() + 0.5).floor()
    rows = (a - a, a.round(), a.isnan(), ~a.isnan(), ~(a < b), a.round(), away, torch.full((N,), _CONSTANT, dtype=dtype))
    wants = torch.stack([row.to(dtype) for row in rows])
    return (a, b, torch.zeros(8, N, dtype=dtype)), wants


def booleans():
    """Rows of C: ~a, ~(a & b), a where not b else b. Rows of R: any of each row of M, all of it, and both with P's rows."""

    @T.prim_func
    def kernel(
        A: T.Tensor((N,), "bool"), B: T.Tensor((N,), "bool"), M: T.Tensor((16, N), "bool"), P: T.Tensor((2, 16), "bool"),
        C: T.Tensor((3, N), "bool"), R: T.Tensor((4, 16), "bool"),
    ):  # fmt: skip
        with T.Kernel(1, threads=32):
            m, r = T.alloc_fragment((16, N), "bool"), T.alloc_fragment((16,), "bool")
            for i in T.Parallel(N):
                C[0, i] = ~A[i]
                C[1, i] = ~(A[i] & B[i])
                C[2, i] = T.if_then_else(~B[i], A[i], B[i])
            T.copy(M, m)
            T.reduce_max(m, r, dim=1)
            T.copy(r, R[0, :])
            T.reduce_min(m, r, dim=1)
            T.copy(r, R[1, :])
            T.copy(P[0, :], r)
            T.reduce_max(m, r, dim=1, clear=False)
            T.copy(r, R[2, :])
            T.copy(P[1, :], r)
            T.reduce_bitand(m, r, dim=1, clear=False)
            T.copy(r, R[3, :])

    return kernel


def boolean_case():
    a, b = torch.rand(N) > 0.5, torch.rand(N) > 0.5
    m = torch.rand(16, N) > torch.tensor([0.99, 0.01]).repeat(8)[:, None]
    m[:4] = torch.tensor([False, False, True, True])[:, None]
    before = torch.rand(2, 16) > 0.5
    want_c = torch.stack([~a, ~(a & b), torch.where(~b, a, b)])
    want_r = torch.stack([m.any(1), m.all(1), before[0] | m.any(1), before[1] & m.all(1)])
    outputs = torch.zeros(3, N, dtype=torch.bool), torch.zeros(4, 16, dtype=torch.bool)
    return (a, b, m, before, *outputs), want_c, want_r


NARROW = ("int8", "uint8", "int16", "uint16")


def narrow_integers(length=N):
    """Rows of each C: shifts, sums, products, ~ and differences of 8 and 16 bits, shifted back, halved and compared."""

    def emit(dtype, s):
        @T.macro
        def rows(A, C, tx):
            C[0, tx] = (A[tx] << T.cast(s, dtype)) >> T.cast(s, dtype)
            C[1, tx] = (A[tx] + A[tx]) >> T.cast(1, dtype)
            C[2, tx] = (A[tx] * T.cast(3, dtype)) // T.cast(2, dtype)
            C[3, tx] = (~A[tx]) >> T.cast(1, dtype)
            C[4, tx] = T.if_then_else(A[tx] - T.cast(100, dtype) > A[tx], T.cast(1, dtype), T.cast(0, dtype))

        return rows

    @T.prim_func
    def kernel(
        A0: T.Tensor((length,), "int8"), A1: T.Tensor((length,), "uint8"), A2: T.Tensor((length,), "int16"),
        A3: T.Tensor((length,), "uint16"), C0: T.Tensor((5, length), "int8"), C1: T.Tensor((5, length), "uint8"),
        C2: T.Tensor((5, length), "int16"), C3: T.Tensor((5, length), "uint16"),
    ):  # fmt: skip
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding()
            emit("int8", 4)(A0, C0, tx)
            emit("uint8", 4)(A1, C1, tx)
            emit("int16", 8)(A2, C2, tx)
            emit("uint16", 8)(A3, C3, tx)

    return kernel


def narrow_case():
    arguments, outputs, wants = [], [], []
    for name in NARROW:
        dtype, bits = getattr(torch, name), 8 if name.endswith("8") else 16
        low = 0 if name.startswith("u") else -(1 << bits - 1)

        def wrapped(x, low=low, bits=bits):
            return (x - low) % (1 << bits) + low

        a = torch.randint(low, low + (1 << bits), (N,))
        s = bits // 2
        rows = (
            wrapped(a << s) >> s,
            wrapped(a + a) >> 1,
            wrapped(a * 3).div(2, rounding_mode="floor"),
            wrapped(~a) >> 1,
            (wrapped(a - 100) > a).long(),
        )
        arguments.append(a.to(dtype))
        outputs.append(torch.zeros(5, N, dtype=dtype))
        wants.append(torch.stack(rows))
    return (*arguments, *outputs), outputs, wants


def guarded_casts(dtype, threads=64):
    """Casting stores under two conditions, under one with another branch, and under one that differs from lane to lane.

    What the conditions exclude keeps its value: P > 0 and row < n; P > 0, else the negative; and P > 1 of those of P > 0.
    """

    @T.prim_func
    def kernel(
        A: T.Tensor((16, 64), "float32"),
        P: T.Tensor((16,), "int32"),
        Q: T.Tensor((64,), "int32"),
        nested: T.Tensor((16, 64), dtype),
        both: T.Tensor((16, 64), dtype),
        lanes: T.Tensor((16, 64), dtype),
        n: T.int32,
    ):
        with T.Kernel(1, threads=threads):
            A_f = T.alloc_fragment((16, 64), "float32")
            T.copy(A, A_f)
            for i, j in T.Parallel(16, 64):
                if i < n:
                    if P[i] > 0:
                        nested[i, j] = T.cast(A_f[i, j], dtype)
            for i, j in T.Parallel(16, 64):
                if P[i] > 0:
                    both[i, j] = T.cast(A_f[i, j], dtype)
                else:
                    both[i, j] = T.cast(-A_f[i, j], dtype)
            for i, j in T.Parallel(16, 64):
                if P[i] > 0:
                    if Q[j] > 0:
                        lanes[i, j] = T.cast(A_f[i, j], dtype)

    return kernel


def guarded_case(dtype):
    A = torch.randint(1, 8, (16, 64)).float()
    P, Q = (torch.arange(16) % 3).int(), (torch.arange(64) % 3).int()
    old = torch.full((16, 64), 9.0)
    takes, row = (P > 0)[:, None], (torch.arange(16) < 11)[:, None]
    wants = torch.where(takes & row, A, old), torch.where(takes, A, -A), torch.where(takes & (Q > 0), A, old)
    outputs = [old.to(getattr(torch, dtype)) for _ in wants]
    return (A, P, Q, *outputs, 11), outputs, wants
