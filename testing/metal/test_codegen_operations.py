"""Operations in generated Metal text: matrices, exchange between lanes, reductions, scans, atomics, grid order."""

import pytest
import torch
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.metal.program import lower


def run(kernel, *arguments):
    program = lower(kernel)
    report = simulate(program, *arguments)
    assert report.findings == ()
    return program.source


def simdgroup_mma(c, a, b):
    """The builtin under test, on pointers to the lane's two elements."""
    return tvm.tirx.call_intrin("handle", tvm.ir.Op.get("tilelang_ext.metal_simdgroup_mma"), c, a, b)


def mma_kernel(a_dtype, b_dtype, row, column):
    """C += A @ B for one 8x8 tile, each lane loading and storing at (row(lane), column(lane)) and its right neighbour."""

    @T.prim_func
    def kernel(
        A: T.Tensor((8, 8), a_dtype),
        B: T.Tensor((8, 8), b_dtype),
        C: T.Tensor((8, 8), "float32"),
    ):
        with T.Kernel(1, threads=32):
            lane = T.get_thread_binding()
            a = T.alloc_local((4,), a_dtype)
            b = T.alloc_local((2,), b_dtype)
            c = T.alloc_local((2,), "float32")
            for i in T.serial(2):
                a[2 + i] = A[row(lane), column(lane) + i]
                b[i] = B[row(lane), column(lane) + i]
                c[i] = C[row(lane), column(lane) + i]
            T.evaluate(simdgroup_mma(T.address_of(c[0]), T.address_of(a[2]), T.address_of(b[0])))
            for i in T.serial(2):
                C[row(lane), column(lane) + i] = c[i]

    return kernel


def tile_row(lane):
    return ((lane // 4) & 4) + ((lane // 2) & 3)


def tile_column(lane):
    return ((lane // 4) & 2) * 2 + (lane & 1) * 2


@pytest.mark.parametrize(
    ("a_dtype", "b_dtype"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32"), ("float32", "bfloat16")],
)
def test_simdgroup_mma(a_dtype, b_dtype):
    a = torch.randn(8, 8).to(getattr(torch, a_dtype))
    b = torch.randn(8, 8).to(getattr(torch, b_dtype))
    c = torch.randn(8, 8)
    expected = c.double() + a.double() @ b.double()
    source = run(mma_kernel(a_dtype, b_dtype, tile_row, tile_column), a, b, c)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
    assert "#include <metal_simdgroup_matrix>" in source


def test_a_wrong_lane_layout_breaks_the_product():
    a, b = torch.randn(8, 8).half(), torch.randn(8, 8).half()
    c = torch.zeros(8, 8)
    run(mma_kernel("float16", "float16", lambda lane: lane // 4, lambda lane: (lane % 4) * 2), a, b, c)
    assert (c - a.float() @ b.float()).abs().max() > 0.1


REDUCTIONS = {
    "sum": (T.warp_reduce_sum, lambda x: x.double().sum(-1)),
    "max": (T.warp_reduce_max, lambda x: x.double().amax(-1)),
    "min": (T.warp_reduce_min, lambda x: x.double().amin(-1)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint32", "int64"])
def test_warp_reduce(dtype):
    reduce_sum, reduce_max, reduce_min = (function for function, _ in REDUCTIONS.values())

    @T.prim_func
    def kernel(
        A: T.Tensor((64,), dtype),
        C: T.Tensor((3, 64), dtype),
    ):
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding()
            C[0, tx] = reduce_sum(A[tx])
            C[1, tx] = reduce_max(A[tx])
            C[2, tx] = reduce_min(A[tx])

    a = (torch.randperm(64) - (0 if dtype == "uint32" else 20)).to(getattr(torch, dtype))
    out = torch.zeros(3, 64).to(a.dtype)
    run(kernel, a, out)
    for (name, (_, reference)), row in zip(REDUCTIONS.items(), out, strict=True):
        expected = reference(a.view(2, 32)).repeat_interleave(32)
        tolerance = 2**-7 if dtype == "bfloat16" else 2**-9 if dtype == "float16" else 0
        torch.testing.assert_close(row.double(), expected, rtol=tolerance, atol=0, msg=name)


def test_warp_reduce_of_bits():
    @T.prim_func
    def kernel(
        A: T.Tensor((32,), "int32"),
        C: T.Tensor((2, 32), "int32"),
    ):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            C[0, tx] = T.warp_reduce_bitand(A[tx])
            C[1, tx] = T.warp_reduce_bitor(A[tx])

    a = torch.tensor([0b1100 | (1 << (4 + i % 20)) for i in range(32)], dtype=torch.int32)
    out = torch.zeros(2, 32, dtype=torch.int32)
    run(kernel, a, out)
    assert out[0].eq(0b1100).all()
    assert out[1].eq((1 << 24) - 4).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int64", "bool", "float8_e4m3fn"])
def test_shuffles(dtype):
    @T.prim_func
    def kernel(
        A: T.Tensor((32,), dtype),
        C: T.Tensor((4, 32), dtype),
    ):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            C[0, tx] = T.shfl_xor(A[tx], 5)
            C[1, tx] = T.shfl_sync(A[tx], 7)
            C[2, tx] = T.shfl_up(A[tx], 3)
            C[3, tx] = T.shfl_down(A[tx], 3)

    a = torch.arange(32).sub(9).float() if dtype != "bool" else torch.arange(32) % 3 == 0
    a = a.to(getattr(torch, dtype))
    out = torch.zeros(4, 32).to(a.dtype)
    run(kernel, a, out)
    lanes = torch.arange(32)
    for row, source in zip(out, (lanes ^ 5, lanes * 0 + 7, lanes - 3, lanes + 3), strict=True):
        inside = (source >= 0) & (source < 32)  # Metal leaves lanes without a source alone
        assert torch.equal(row.float()[inside], a.float()[source[inside]])


@pytest.mark.parametrize(("dtype", "count"), [("float16", 4), ("bfloat16", 4), ("int32", 2), ("int64", 2), ("int64", 4)])
def test_shuffles_of_vectors(dtype, count):
    """Four carriers of 16 or 32 bits at most: int64 goes as two of 32."""

    @T.prim_func
    def kernel(A: T.Tensor((32 * count,), dtype), C: T.Tensor((32 * count,), dtype)):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            C[T.Ramp(tx * count, 1, count)] = T.shfl_xor(A[T.Ramp(tx * count, 1, count)], 5)

    a = (torch.arange(32 * count) * 5 - 90).to(getattr(torch, dtype))
    out = torch.zeros_like(a)
    if (dtype, count) == ("int64", 4):
        with pytest.raises(TypeError, match="simd_shuffle_xor: lanes exchange at most 16 bytes; got int64x4; exchange it"):
            lower(kernel)
        return
    run(kernel, a, out)
    assert torch.equal(out.view(32, count), a.view(32, count)[torch.arange(32) ^ 5])


def reduce_kernel(rows, columns, dim, reductions, dtype, threads):
    """C[k] = the reduction of A along dim by the k-th (kind, clear) of `reductions`, into B without clear."""
    reduced = columns if dim == 0 else rows

    @T.macro
    def reduce_one(A_f, B, C, k, kind, clear):
        C_f = T.alloc_fragment((reduced,), dtype)
        T.copy(B, C_f)
        getattr(T, f"reduce_{kind}")(A_f, C_f, dim=dim, **({} if clear else {"clear": False}))
        T.copy(C_f, C[k, :])

    def reduce_all(A_f, B, C):
        for k, (kind, clear) in enumerate(reductions):
            reduce_one(A_f, B, C, k, kind, clear)

    @T.prim_func
    def kernel(
        A: T.Tensor((rows, columns), dtype),
        B: T.Tensor((reduced,), dtype),
        C: T.Tensor((len(reductions), reduced), dtype),
    ):
        with T.Kernel(1, threads=threads):
            A_f = T.alloc_fragment((rows, columns), dtype)
            T.copy(A, A_f)
            reduce_all(A_f, B, C)

    return kernel


TORCH_REDUCE = {
    "sum": lambda a, dim: a.sum(dim),
    "abssum": lambda a, dim: a.abs().sum(dim),
    "max": lambda a, dim: a.amax(dim),
    "min": lambda a, dim: a.amin(dim),
    "absmax": lambda a, dim: a.abs().amax(dim),
}
JOIN = {"sum": torch.add, "abssum": torch.add, "max": torch.maximum, "min": torch.minimum, "absmax": torch.maximum}


@pytest.mark.parametrize(("dim", "threads"), [(1, 32), (0, 128), (1, 256)], ids=["lanes", "simdgroups", "both"])
def test_reduce(dim, threads):
    reductions = [*((kind, True) for kind in TORCH_REDUCE), *((kind, False) for kind in TORCH_REDUCE if kind != "abssum")]
    rows, columns = (4, 512) if threads == 256 else (16, 64)
    a = torch.randint(-50, 50, (rows, columns)).float()
    before = torch.full((a.shape[1 - dim],), 7.0)
    out = torch.full((len(reductions), len(before)), float("nan"))
    run(reduce_kernel(rows, columns, dim, reductions, "float32", threads), a, before, out)
    for (kind, clear), row in zip(reductions, out, strict=True):
        expected = TORCH_REDUCE[kind](a, dim)
        assert torch.equal(row, expected if clear else JOIN[kind](before, expected)), (kind, clear)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "int64", "int8"])
def test_reduce_of_every_type(dtype):
    a = torch.randint(-3, 4, (16, 64)).to(getattr(torch, dtype))
    out = torch.zeros(2, 64, dtype=a.dtype)
    run(reduce_kernel(16, 64, 0, [("sum", True), ("max", True)], dtype, 128), a, torch.zeros_like(out[0]), out)
    for kind, row in zip(("sum", "max"), out, strict=True):
        assert torch.equal(row, TORCH_REDUCE[kind](a, 0).to(a.dtype)), kind


def test_a_reduction_across_simdgroups_shares_its_barriers():
    source = lower(reduce_kernel(16, 256, 0, [("sum", True)], "float32", 128)).source
    body = source[source.index("kernel void") :]
    assert body.count("all_reduce_shared") == 1, "one exchange for all elements of a thread"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_cumsum(dim, reverse):
    @T.prim_func
    def kernel(
        A: T.Tensor((40, 72), "float32"),
        C: T.Tensor((40, 72), "float32"),
    ):
        with T.Kernel(1, threads=64):
            A_s = T.alloc_shared((40, 72), "float32")
            T.copy(A, A_s)
            T.cumsum(A_s, A_s, dim=dim, reverse=reverse)
            T.copy(A_s, C)

    a = torch.randint(-9, 9, (40, 72)).float()
    out = torch.zeros_like(a)
    run(kernel, a, out)
    expected = a.flip(dim).cumsum(dim).flip(dim) if reverse else a.cumsum(dim)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32"])
@pytest.mark.parametrize("scope", ["global", "shared"])
def test_atomics(dtype, scope):
    """128 threads of 4 threadgroups meet in three elements."""

    @T.prim_func
    def kernel(
        A: T.Tensor((512,), dtype),
        B: T.Tensor((3,), dtype),
        C: T.Tensor((3,), dtype),
    ):
        with T.Kernel(4, threads=128) as bx:
            tx = T.get_thread_binding()
            C_s = T.alloc_shared((3,), dtype)
            if scope == "shared":
                if tx < 3:
                    C_s[tx] = B[tx]
                T.sync_threads()
                T.atomic_add(C_s[0], A[bx * 128 + tx])
                T.atomic_max(C_s[1], A[bx * 128 + tx])
                T.atomic_min(C_s[2], A[bx * 128 + tx])
                T.sync_threads()
                if tx == 0:
                    T.atomic_add(C[0], C_s[0])
                    T.atomic_max(C[1], C_s[1])
                    T.atomic_min(C[2], C_s[2])
            else:
                T.atomic_add(C[0], A[bx * 128 + tx])
                T.atomic_max(C[1], A[bx * 128 + tx])
                T.atomic_min(C[2], A[bx * 128 + tx])

    low = 0 if dtype == "uint32" else -100
    a = torch.randint(low, 1000, (512,), generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    out = torch.tensor([0, 0, 5000]).to(a.dtype)
    run(kernel, a, out.clone(), out)
    assert out.tolist() == [a.long().sum().item(), max(a.tolist()), min(a.tolist())]


@pytest.mark.parametrize(
    ("dtype", "scope", "count"), [("float16", "global", 7), ("bfloat16", "shared", 5), ("float16", "shared", 8)]
)
def test_atomics_of_16_bits(dtype, scope, count):
    """Neighbours in a word are updated at once, an odd number of them too, by values of the type and of another."""

    @T.prim_func
    def kernel(
        A: T.Tensor((256,), dtype),
        F: T.Tensor((256,), "float32"),
        C: T.Tensor((3, count), dtype),
        before: T.Tensor((64,), dtype),
    ):
        with T.Kernel(4, threads=64) as bx:
            tx = T.get_thread_binding()
            C_s = T.alloc_shared((3, count), dtype)
            if scope == "shared":
                T.clear(C_s)
                T.atomic_add(C_s[0, tx % count], A[bx * 64 + tx])
                T.atomic_max(C_s[1, tx % count], A[bx * 64 + tx])
                T.atomic_min(C_s[2, tx % count], A[bx * 64 + tx])
                for i, j in T.Parallel(3, count):
                    T.atomic_add(C[i, j], C_s[i, j])
            else:
                T.atomic_add(C[0, tx % count], F[bx * 64 + tx])
                T.atomic_max(C[1, tx % count], A[bx * 64 + tx])
                T.atomic_min(C[2, tx % count], A[bx * 64 + tx])
            if bx == 0:
                before[tx] = T.atomic_add(C_s[0, tx % count], T.cast(0, dtype), return_prev=True)

    a = torch.randint(-3, 4, (256,), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    out, before = torch.zeros(3, count, dtype=a.dtype), torch.full((64,), torch.nan, dtype=a.dtype)
    program = lower(kernel)
    assert "atomic_update_half<SumOp>" in program.source
    report = simulate(program, a, a.float(), out, before)
    assert {finding.kind for finding in report.findings} <= ({"uninitialised"} if scope == "global" else set()), str(report)
    place = (torch.arange(256) % 64 % count).long()
    of = torch.zeros(4, 3, count, dtype=torch.float64)  # of each block
    for block, at, value in zip(torch.arange(256) // 64, place, a.double(), strict=True):
        of[block, 0, at] += value
        of[block, 1, at] = max(of[block, 1, at], value)
        of[block, 2, at] = min(of[block, 2, at], value)
    expected = of.sum(0) if scope == "shared" else torch.stack([of[:, 0].sum(0), of[:, 1].amax(0), of[:, 2].amin(0)])
    assert torch.equal(out.double(), expected)
    if scope == "shared":
        assert torch.equal(before.double(), of[0, 0][place[:64]])


def test_atomic_add_of_a_tile():
    @T.prim_func
    def kernel(
        A: T.Tensor((4, 64), "float32"),
        C: T.Tensor((64,), "float32"),
    ):
        with T.Kernel(4, threads=32) as bx:
            A_s = T.alloc_shared((64,), "float32")
            T.copy(A[bx, :], A_s)
            T.atomic_add(C, A_s)

    a = torch.randint(0, 9, (4, 64)).float()
    out = torch.ones(64)
    run(kernel, a, out)
    assert torch.equal(out, 1 + a.sum(0))


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7)])
def test_swizzle_visits_every_threadgroup_once(order, grid):
    @T.prim_func
    def kernel(C: T.Tensor((grid[1], grid[0]), "int32")):
        with T.Kernel(*grid, threads=32) as (bx, by):
            tx = T.get_thread_binding()
            T.use_swizzle(2, order=order)
            if tx == 0:
                C[by, bx] = C[by, bx] + 1 + by * 100 + bx

    out = torch.zeros(grid[1], grid[0], dtype=torch.int32)
    source = run(kernel, out)
    rows, columns = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[0]), indexing="ij")
    assert torch.equal(out, (1 + rows * 100 + columns).int())
    assert f"swizzle_{order}<2>(blockIdx, gridDim)" in source
