"""Functions of a warp, of a block, of bits and of whole buffers, which mean what they mean on CUDA; hints that mean nothing."""

import pytest
import tilelang
import torch

from tilelang_ext import language as T
from tilelang_ext import metal, simulate

THREADS = 96
LANES = torch.arange(THREADS)


@T.prim_func
def votes(
    values: T.Tensor((THREADS,), "int32"),
    reals: T.Tensor((THREADS,), "float32"),
    longs: T.Tensor((THREADS,), "int64"),
    out: T.Tensor((12, THREADS), "int64"),
):
    with T.Kernel(1, threads=THREADS):
        tx = T.get_thread_binding()
        x = values[tx]
        out[0, tx] = T.syncthreads_count(x > 2)
        out[1, tx] = T.syncthreads_and(x >= 0)
        out[2, tx] = T.syncthreads_or(x == 6)
        out[3, tx] = T.cast(T.any_sync(x == 4), "int64")
        out[4, tx] = T.cast(T.all_sync(x < 6), "int64")
        out[5, tx] = T.cast(T.ballot(x == 1), "int64")
        out[6, tx] = T.cast(T.activemask(), "int64")
        out[7, tx] = T.cast(T.match_any_sync(x), "int64")
        out[8, tx] = T.cast(T.match_any_sync(reals[tx]), "int64")
        out[9, tx] = T.cast(T.match_all_sync(x // 64), "int64")
        out[10, tx] = T.cast(T.match_any_sync(longs[tx]), "int64")
        out[11, tx] = T.cast(T.match_all_sync(longs[tx]), "int64")


def same_lanes(values):
    """The mask of the lanes of each thread's warp that hold its value."""
    warps = values.reshape(-1, 32)
    return ((warps[:, :, None] == warps[:, None, :]).long() << torch.arange(32)).sum(-1).flatten()


def test_votes():
    values, reals = (LANES % 5).int(), torch.where(LANES % 3 == 0, 0.25, 0.5)
    longs = torch.where(LANES % 2 == 0, 1 << 40, 1)
    out = torch.full((12, THREADS), -1)
    report = simulate(votes, values, reals, longs, out)
    assert not report.findings, str(report)
    ones = torch.ones(THREADS, dtype=torch.int64)
    warps = values.reshape(-1, 32)
    want = [
        (values > 2).sum() * ones,
        ones,
        0 * ones,
        ones,
        ones,
        ((warps == 1).long() << torch.arange(32)).sum(-1).repeat_interleave(32),
        0xFFFFFFFF * ones,
        same_lanes(values),
        same_lanes(reals),
        0xFFFFFFFF * ones,
        same_lanes(longs),
        0 * ones,
    ]
    for row, expected in enumerate(want):
        assert torch.equal(out[row], expected), f"row {row}: {out[row].tolist()}"


@T.prim_func
def bits(masks: T.Tensor((32,), "uint32"), ffs: T.Tensor((32,), "int32"), fns: T.Tensor((3, 32), "uint32")):
    with T.Kernel(1, threads=32):
        tx = T.get_thread_binding()
        ffs[tx] = T.__ffs(T.reinterpret(masks[tx], "int32"))
        fns[0, tx] = T.__fns(masks[tx], 4, 2)
        fns[1, tx] = T.__fns(masks[tx], 20, -2)
        fns[2, tx] = T.__fns(masks[tx], 3, 0)


def nth_set(mask, base, n):
    if n == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    places = range(base, 32) if n > 0 else range(base, -1, -1)
    found = [i for i in places if mask >> i & 1]
    return found[abs(n) - 1] if len(found) >= abs(n) else 0xFFFFFFFF


def test_bits():
    masks = [0, 1, 1 << 31, 0xFFFFFFFF, *(0x9E3779B9 * i % 2**32 for i in range(28))]
    ffs, fns = torch.zeros(32, dtype=torch.int32), torch.zeros(3, 32, dtype=torch.uint32)
    report = simulate(bits, torch.tensor(masks, dtype=torch.uint32), ffs, fns)
    assert not report.findings, str(report)
    assert ffs.tolist() == [(mask & -mask).bit_length() for mask in masks]
    for row, (base, n) in enumerate(((4, 2), (20, -2), (3, 0))):
        assert fns[row].tolist() == [nth_set(mask, base, n) for mask in masks]


@T.prim_func
def buffers(flags: T.Tensor((3, 8), "bool"), numbers: T.Tensor((3, 8), "float32"), out: T.Tensor((5, 3), "int32")):
    with T.Kernel(3, threads=32) as row:
        tile = T.alloc_shared((8,), "bool")
        T.copy(flags[row, 0:8], tile)
        if T.get_thread_binding() == 0:
            out[0, row] = T.cast(T.any_of(flags[row, 0:8]), "int32")
            out[1, row] = T.cast(T.all_of(flags[row, 0:8]), "int32")
            out[2, row] = T.cast(T.any_of(tile), "int32")
            out[3, row] = T.cast(T.all_of(tile), "int32")
            out[4, row] = T.cast(T.any_of(numbers[row, 0:8]), "int32")


def test_any_and_all_of_a_buffer():
    flags = torch.tensor([[True] * 8, [False] * 8, [False] * 7 + [True]])
    out = torch.full((5, 3), -1, dtype=torch.int32)
    report = simulate(buffers, flags, flags.float() / 4, out)
    assert not report.findings, str(report)
    assert out.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 1]]


@T.prim_func
def dot(a: T.Tensor((128,), "int8"), b: T.Tensor((128,), "int8"), c: T.Tensor((32,), "int32")):
    with T.Kernel(1, threads=32):
        tx = T.get_thread_binding()
        x, y, total = T.alloc_local((4,), "int8"), T.alloc_local((4,), "int8"), T.alloc_local((1,), "int32")
        total[0] = c[tx]
        for v in T.vectorized(4):
            x[v] = a[tx * 4 + v]
            y[v] = b[tx * 4 + v]
        T.dp4a(x[0], y[0], total[0])
        c[tx] = total[0]


def test_dp4a():
    a, b = (torch.randint(-128, 128, (128,), dtype=torch.int8) for _ in range(2))
    c = torch.arange(32, dtype=torch.int32)
    report = simulate(dot, a, b, c)
    assert not report.findings, str(report)
    assert torch.equal(c, torch.arange(32) + (a.int() * b.int()).reshape(32, 4).sum(1).int())


def adds(dtype, given):
    @T.prim_func
    def kernel(X: T.Tensor((64,), given), C: T.Tensor((64,), dtype), S: T.Tensor((64,), dtype)):
        with T.Kernel(3, threads=32):
            tile = T.alloc_shared((64,), dtype)
            f = T.alloc_fragment((64,), given)
            T.clear(tile)
            T.copy(X, f)
            T.atomic_add(C[0:64], X[0:64])
            for i in T.Parallel(64):
                T.atomic_add(tile[i], f[i])
            T.copy(tile, S)

    return kernel


@pytest.mark.parametrize(("dtype", "given"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_atomics_of_pairs(dtype, given):
    x = torch.randint(-8, 8, (64,)).to(getattr(torch, given))
    c, s = torch.arange(64).to(getattr(torch, dtype)), torch.zeros(64, dtype=getattr(torch, dtype))
    report = simulate(adds(dtype, given), x, c, s)
    assert {finding.kind for finding in report.findings} <= {"race"}, "each block writes the same S"
    assert torch.equal(c.float(), torch.arange(64) + 3 * x.float())
    assert torch.equal(s.float(), x.float())


def adds_several(dtype, count):
    @T.prim_func
    def kernel(X: T.Tensor((64,), dtype), C: T.Tensor((64,), dtype), S: T.Tensor((64,), dtype)):
        with T.Kernel(3, threads=64 // count) as block:
            tile = T.alloc_shared((64,), dtype)
            T.clear(tile)
            for i in T.Parallel(64 // count):
                if count == 2:
                    T.atomic_addx2(C[i * 2], X[i * 2])
                    T.atomic_addx2(tile[i * 2], X[i * 2])
                else:
                    T.atomic_addx4(C[i * 4], X[i * 4])
                    T.atomic_addx4(tile[i * 4], X[i * 4])
            if block == 0:
                T.copy(tile, S)

    return kernel


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"])
@pytest.mark.parametrize(("dtype", "count"), [("float16", 2), ("bfloat16", 2), ("float16", 4), ("bfloat16", 4), ("float32", 4)])
def test_atomics_of_several(dtype, count, target):
    x = torch.randint(-8, 8, (64,)).to(getattr(torch, dtype))
    c, s = torch.arange(64).to(getattr(torch, dtype)), torch.zeros(64, dtype=getattr(torch, dtype))
    assert simulate(adds_several(dtype, count), x, c, s, target=target).findings == ()
    assert torch.equal(c.float(), torch.arange(64) + 3 * x.float())
    assert torch.equal(s.float(), x.float())


@pytest.mark.parametrize(("target", "dtype"), [("metal", "float32"), ("c", "float32"), ("hip -mcpu=gfx942", "bfloat16")])
def test_previous_values_of_several_are_refused(target, dtype):
    @T.prim_func
    def kernel(X: T.Tensor((64,), dtype), C: T.Tensor((64,), dtype), S: T.Tensor((64,), dtype)):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                S[i * 2 : i * 2 + 2] = T.atomic_addx2(C[i * 2], X[i * 2], return_prev=True)

    with pytest.raises(NotImplementedError, match=r"T.atomic_addx2: return_prev .*; got it on target \w+; call T.atomic_add 2"):
        tilelang.compile(kernel, target="c") if target == "c" else simulate(kernel, *[torch.zeros(64)] * 3, target=target)


def elected(size, hint):
    @T.prim_func
    def kernel(C: T.Tensor((128,), "int32")):
        with T.Kernel(1, threads=128):
            if hint:
                T.no_set_max_nreg()
            C[T.get_thread_binding()] = 0
            if T.shuffle_elect(size):
                C[T.get_thread_binding()] = 1

    return kernel


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
def test_elected_threads_and_hints(target):
    for size, hint in ((32, False), (64, True), (0, False)):
        out = torch.full((128,), -1, dtype=torch.int32)
        report = simulate(elected(size, hint), out, target=target)
        assert not report.findings, str(report)
        assert out.nonzero().flatten().tolist() == list(range(0, 128, size or 128))


@T.prim_func
def through_memory(A: T.Tensor((64,), "float32"), out: T.Tensor((64,), "float32")):
    with T.Kernel(1, threads=64):
        scratch = T.alloc_global((64,), "float32")
        tx = T.get_thread_binding()
        scratch[tx] = A[tx] + 1
        T.sync_threads()
        out[tx] = scratch[63 - tx]


def test_a_barrier_orders_device_memory_that_threads_exchange():
    a, out = torch.randn(64), torch.zeros(64)
    report = simulate(through_memory, a, out)
    assert not report.findings, str(report)
    assert torch.equal(out, a.flip(0) + 1)
    assert "mem_threadgroup | mem_flags::mem_device" in metal.lower(through_memory).source


def products(dtype, scope):
    @T.prim_func
    def kernel(A: T.Tensor((50, 64), dtype), B: T.Tensor((64, 64), dtype), C: T.Tensor((50, 64), "float32")):
        with T.Kernel(1, threads=128):
            c = T.alloc_fragment((64, 64), "float32")
            T.clear(c)
            if scope == "global":
                for k in T.serial(2):
                    T.gemm(A[0:64, k * 32 : k * 32 + 32], B[0:64, k * 32 : k * 32 + 32], c, transpose_B=True)
            else:
                a, b = T.alloc_shared((64, 32), scope), T.alloc_shared((64, 32), scope)
                for k in T.serial(2):
                    T.copy(A[0, k * 32], a)
                    T.copy(B[0, k * 32], b)
                    T.gemm(a, b, c, transpose_B=True)
            T.copy(c, C[0, 0])

    return kernel


@pytest.mark.parametrize(
    ("dtype", "scope", "target"),
    [
        ("float16", "global", "metal"),
        ("float16", "global", "metal4"),
        ("float32", T.tfloat32, "metal"),
        ("float32", T.tfloat32, "metal4"),
    ],
)
def test_gemm_of_device_memory_and_of_tfloat32(dtype, scope, target):
    a, b, c = torch.randn(50, 64).to(getattr(torch, dtype)), torch.randn(64, 64).to(getattr(torch, dtype)), torch.zeros(50, 64)
    report = simulate(products(dtype, scope), a, b, c, target=target)
    assert not report.findings, str(report)
    torch.testing.assert_close(c.double(), a.double() @ b.double().t(), rtol=2e-5, atol=2e-5)
