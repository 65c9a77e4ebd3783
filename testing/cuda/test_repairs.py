"""What upstream gets wrong on target cuda and this package says in other words, by the emitted text; what is left, noticed."""

# ruff: noqa: SIM102  conditions within conditions are what is tested

import pytest
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext.cuda.repairs import repair
from tilelang_ext.passes.joined_guards import JoinGuardsOfCasts

ARCH = "sm_90"


def body_of(kernel):
    text = lower(kernel, ARCH)
    return text[text.rindex("__global__") :]


def elementwise(function, dtype, size=32):
    @T.prim_func
    def kernel(A: T.Tensor((size,), dtype), O: T.Tensor((size,), dtype)):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(size):
                O[i] = function(A[i])

    return kernel


def test_narrow_integers_wrap_at_their_width():
    text = body_of(elementwise(lambda x: (x << 8) >> 8, "uint16"))
    assert "((ushort)(((int)A[((int)threadIdx.x)]) << 8)) >> (ushort)8" in text


# Of what has bits beyond 8 or 16 in C, and what sees them
NARROW = [
    (lambda x: T.if_then_else(x + x > x, x, x - x * x), lambda x, wrap: torch.where(wrap(x + x) > x, x, x - x * x)),
    (lambda x: (x * x) // T.cast(7, x.dtype), lambda x, wrap: wrap(x * x) // 7),
    (lambda x: (x - x * x) % T.cast(7, x.dtype), lambda x, wrap: wrap(x - x * x) % 7),
    (lambda x: T.max(x * x, x + x), lambda x, wrap: torch.maximum(wrap(x * x), wrap(x + x))),
    (lambda x: T.min(~x, T.cast(9, x.dtype)), lambda x, wrap: wrap(~x).clamp(max=9)),
    (lambda x: T.cast(T.cast(x * x, "int32") // 3, x.dtype), lambda x, wrap: wrap(x * x) // 3),
    (lambda x: T.cast(T.cast(x + x, "float32") * 0.5, x.dtype), lambda x, wrap: (wrap(x + x) * 0.5).trunc().long()),
    (lambda x: T.if_then_else(x > x // T.cast(2, x.dtype), x * x, x) >> T.cast(1, x.dtype),
     lambda x, wrap: wrap(torch.where(x > x // 2, x * x, x)) >> 1),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_values_of_narrow_integers(dtype):
    functions = tuple(enumerate(function for function, _ in NARROW))

    @T.prim_func
    def kernel(A: T.Tensor((32,), dtype), O: T.Tensor((len(NARROW), 32), dtype)):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                for row, function in functions:
                    O[row, i] = function(A[i])

    bounds = torch.iinfo(getattr(torch, dtype))
    A = torch.linspace(bounds.min, bounds.max, 32).to(getattr(torch, dtype))
    O = torch.zeros(len(NARROW), 32, dtype=A.dtype)
    execute(lower(kernel.with_attr("global_symbol", "kernel"), ARCH), (1, 1), {"A": A, "O": O})
    for (_, wanted), got in zip(NARROW, O, strict=True):
        assert torch.equal(got, wanted(A.long(), lambda x: x.to(A.dtype).long()).to(A.dtype))


@needs_compiler
def test_a_strided_loop_that_some_threads_skip():
    """Threads from 40 on have no round of a loop whose extent is at most 1: that follows from the range of the thread index."""

    @T.prim_func
    def kernel(A: T.Tensor((40,), "int32"), O: T.Tensor((64,), "int32")):
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding()
            for k in T.serial(T.ceildiv(40 - tx, 64)):
                O[tx] = A[tx + k * 64] + 1

    A, O = torch.arange(40, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    execute(lower(kernel.with_attr("global_symbol", "kernel"), ARCH), (1, 1), {"A": A, "O": O})
    assert O.tolist() == [*range(1, 41), *[0] * 24]


def uneven(rows, columns, threads, reduces=False):
    @T.prim_func
    def kernel(A: T.Tensor((rows, columns), "float32"), O: T.Tensor((rows, columns), "float32")):
        with T.Kernel(1, threads=threads):
            f = T.alloc_fragment((rows, columns), "float32")
            g = T.alloc_fragment((rows, columns), "float32")
            m = T.alloc_fragment((rows,), "float32")
            T.copy(A, f)
            if reduces:
                T.reduce_max(f, m, dim=1)
            for i, j in T.Parallel(rows, columns):
                g[i, j] = f[i, j] + 1
            T.copy(g, O)

    return kernel.with_attr("global_symbol", "kernel")


@needs_compiler
@pytest.mark.parametrize("sizes", [(12, 40, 64), (20, 40, 96)])
def test_tiles_whose_elements_threads_do_not_divide(sizes):
    """Upstream has no layout for these."""
    A = torch.arange(sizes[0] * sizes[1], dtype=torch.float32).reshape(sizes[:2])
    O = torch.full_like(A, torch.nan)
    execute(lower(uneven(*sizes), ARCH), (1, 1), {"A": A, "O": O})
    assert torch.equal(O, A + 1)


def test_such_tiles_that_are_reduced():
    with pytest.raises(
        ValueError, match=r"^T.Parallel: fragments .* got f \(20, 40\) of float32, .* and 96 threads; take threads"
    ):
        lower(uneven(20, 40, 96, reduces=True), ARCH)


def test_floats_are_no_numbers_of_algebra():
    text = body_of(elementwise(lambda x: T.if_then_else(x != x, 1.0, x - x), "float32"))
    assert "A[((int)threadIdx.x)] != A[((int)threadIdx.x)]" in text
    assert "A[((int)threadIdx.x)] - A[((int)threadIdx.x)]" in text


def test_an_atomic_of_each_threads_value():
    @T.prim_func
    def kernel(A: T.Tensor((128,), "float32"), C: T.Tensor((1,), "float32")):
        with T.Kernel(1, threads=128):
            T.atomic_add(C, A[T.get_thread_binding()])

    assert "AtomicAdd((&(C[0])), A[((int)threadIdx.x)])" in body_of(kernel)


def test_both_guards_of_a_store_that_converts():
    @T.prim_func
    def kernel(A: T.Tensor((16, 64), "float32"), P: T.Tensor((16,), "int32"), C: T.Tensor((16, 64), "float16"), n: T.int32):
        with T.Kernel(1, threads=64):
            f = T.alloc_fragment((16, 64), "float32")
            T.copy(A, f)
            for i, j in T.Parallel(16, 64):
                if i < n:
                    if P[i] > 0:
                        C[i, j] = T.cast(f[i, j], "float16")

    guard = body_of(kernel).rpartition("*(uint2*)(C")[0].splitlines()[-2]
    assert "< n" in guard
    assert "P[" in guard


def test_guards_of_one_thread_stay():
    """Only a loop that is vectorised is taken apart, so only there conditions are joined."""

    @T.prim_func
    def kernel(A: T.Tensor((16,), "float32"), P: T.Tensor((16,), "int32"), C: T.Tensor((16,), "float16"), n: T.int32):
        with T.Kernel(1, threads=64):
            for i in T.serial(16):
                if i < n:
                    if P[i] > 0:
                        C[i] = T.cast(A[i], "float16")

    mod = tvm.IRModule({"main": kernel})
    assert tvm.ir.structural_equal(JoinGuardsOfCasts(mod), mod)


def test_what_bits_and_numbers_upstream_has_right():
    """Nothing repairs these on target cuda: the test tells when upstream changes them."""
    assert "!((bool)A[" in body_of(elementwise(lambda x: ~x, "bool"))
    assert "nearbyintf(" in body_of(elementwise(T.round, "float32"))
    assert "hrint(" in body_of(elementwise(T.round, "float16"))
    assert "0x1.3c0ca4283de1bp+0f" in body_of(elementwise(lambda x: x * T.float32(1.23456789), "float32"))


def test_a_constant_index_beyond_32_bits_still_wraps():
    """docs/guide/language_support.md: upstream folds it in 32 bits. When this fails, the row goes."""

    @T.prim_func
    def kernel(A: T.Tensor((70000, 40000), "float16"), C: T.Tensor((64,), "float16")):
        with T.Kernel(1, threads=64):
            for j in T.Parallel(64):
                C[j] = A[69999, 39900 + j]

    assert "1494967396" in body_of(kernel)


@T.prim_func
def small_tiles(A: T.Tensor((4, 16), "float32"), B: T.Tensor((16,), "float32")):
    """In place: eight threads of 128 hold an element. A count in shared memory, which each of them would add 1 to."""
    with T.Kernel(4, threads=128) as bx:
        a, b = T.alloc_fragment((1, 16), "float32"), T.alloc_fragment((16,), "float32")
        b_s = T.alloc_shared((16,), "float32")
        T.copy(A[bx, 0], a)
        for i, j in T.Parallel(1, 16):
            a[i, j] += 1
        T.copy(a, A[bx, 0])
        T.copy(A[bx, 0], b_s)
        for i in T.Parallel(16):
            b_s[i] = b_s[i] + 1
            b[i] = b_s[i]
        if bx == 3:
            T.copy(b, B)


@needs_compiler
def test_memory_is_updated_once_and_in_order():
    text = lower(small_tiles, ARCH)
    body = text[text.rindex("__global__") :]
    read, store = body.index("a[0] = A["), body.index("] = a[0];")
    assert "__syncthreads();" in body[read:store], "what another thread stores is read before"
    assert "b_s_old[0] = b_s[" in body
    assert "] = b_s_old[0];" in body
    A, B = torch.arange(64.0).reshape(4, 16), torch.full((16,), torch.nan)
    tensors = {"A": A.clone(), "B": B}
    execute(text, (4, 1), tensors)
    assert torch.equal(tensors["A"], A + 1)
    assert torch.equal(tensors["B"], A[3] + 2)


def unaffected():
    @T.prim_func
    def kernel(A: T.Tensor((64, 64), "float16"), C: T.Tensor((64, 64), "float16"), S: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=128):
            a, c = T.alloc_shared((64, 64), "float16"), T.alloc_fragment((64, 64), "float32")
            T.copy(A, a)
            T.gemm(a, a, c, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                if i < 60:
                    C[i, j] = T.cast(c[i, j] * S[i] - 1.0, "float16")

    return kernel


@pytest.mark.parametrize("make", [unaffected])
def test_other_programs_stay_as_they_are(make):
    mod = tvm.IRModule({"kernel": make()})
    assert tvm.ir.structural_equal(repair(mod), mod)
