"""Tile programs of a GPU on the CPU: products with epilogues, attention, reductions, arrays that no stack holds."""

import threading
import time

import pytest
import torch
from cpu.run import check, compile_c
from numeric import assert_close

import tilelang_ext  # noqa: F401
from tilelang_ext import language as T
from tilelang_ext.cpu.workspace import STACK_BYTES


def matmul(M, N, K, dtype, out, accumulator="float32", trans_A=False, trans_B=False, stages=2, dtype_B=None):
    """C = max(A B + bias, 0), by tiles of 32x32x32 in a pipelined loop, with edges; B has the dtype of A if not given."""
    dtype_B = dtype_B or dtype

    @T.prim_func
    def kernel(
        A: T.Tensor((K, M) if trans_A else (M, K), dtype),
        B: T.Tensor((N, K) if trans_B else (K, N), dtype_B),
        bias: T.Tensor((N,), "float32"),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(T.ceildiv(N, 32), T.ceildiv(M, 32), threads=128) as (bx, by):
            A_s = T.alloc_shared((32, 32), dtype)
            B_s = T.alloc_shared((32, 32), dtype_B)
            C_f = T.alloc_fragment((32, 32), accumulator)
            T.use_swizzle(8)
            T.annotate_layout({A_s: T.Layout((32, 32), lambda i, j: (j, i))})
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=stages):
                if trans_A:
                    T.copy(A[k * 32, by * 32], A_s)
                else:
                    T.copy(A[by * 32, k * 32], A_s)
                if trans_B:
                    T.copy(B[bx * 32, k * 32], B_s)
                else:
                    T.copy(B[k * 32, bx * 32], B_s)
                T.gemm(A_s, B_s, C_f, transpose_A=trans_A, transpose_B=trans_B)
            for i, j in T.Parallel(32, 32):
                if bx * 32 + j < N:
                    C_f[i, j] = T.max(C_f[i, j] + T.cast(bias[bx * 32 + j], accumulator), T.cast(0, accumulator))
            T.copy(C_f, C[by * 32, bx * 32])

    return kernel


@pytest.mark.parametrize(
    ("dtype", "dtype_B", "out", "trans_A", "trans_B", "stages"),
    [
        ("float16", "float16", "float16", False, False, 0),
        ("bfloat16", "bfloat16", "float32", False, True, 1),
        ("bfloat16", "bfloat16", "bfloat16", True, False, 2),
        ("float32", "float32", "float32", True, True, 3),
        ("float16", "float8_e5m2", "float16", False, True, 2),
    ],
)
def test_matmul_with_epilogue(dtype, dtype_B, out, trans_A, trans_B, stages):
    M, N, K = 40, 70, 100
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(M, K, generator=generator).to(getattr(torch, dtype))
    B = torch.randn(K, N, generator=generator).to(getattr(torch, dtype_B))
    bias = torch.randn(N, generator=generator)
    expected = (A.double() @ B.double() + bias.double()).clamp(min=0)
    given = (A.T.contiguous() if trans_A else A, B.T.contiguous() if trans_B else B, bias)
    C = torch.full((M, N), torch.nan).to(getattr(torch, out))
    kernel = matmul(M, N, K, dtype, out, trans_A=trans_A, trans_B=trans_B, stages=stages, dtype_B=dtype_B)
    check(kernel, given, C, expected, out)


def test_integers():
    M = N = K = 64
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randint(-128, 128, (64, 64), generator=generator).to(torch.int8) for _ in range(2))
    C = torch.full((M, N), -1, dtype=torch.int32)
    compile_c(matmul(M, N, K, "int8", "int32", accumulator="int32"))(A, B, torch.zeros(N), C)
    assert torch.equal(C.long(), (A.long() @ B.long()).clamp(min=0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("clear", [True, False, None])
def test_a_16_bit_accumulator_is_rounded_once(dtype, clear):
    """Within a T.gemm the sum is float32; `clear_accum` may be known (True, False) or an expression (None: in step 0)."""
    M, N, K = 16, 24, 512

    @T.prim_func
    def kernel(A: T.Tensor((M, K), dtype), B: T.Tensor((N, K), dtype), C: T.Tensor((M, N), dtype)):
        with T.Kernel(1, threads=64) as _:
            C_f = T.alloc_fragment((M, N), dtype)
            T.copy(C, C_f)
            for step in T.serial(1):
                T.gemm(A, B, C_f, transpose_B=True, clear_accum=(step == 0) if clear is None else clear)
            T.copy(C_f, C)

    generator = torch.Generator().manual_seed(2)
    A, B, C = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in ((M, K), (N, K), (M, N)))
    expected = A.double() @ B.double().T + (C.double() if clear is False else 0)
    check(kernel, (A, B), C if clear is False else torch.full_like(C, torch.nan), expected, dtype)


def test_regions_of_operands():
    """A tile of a tile, and a stage of several; what lies beside the region stays."""
    dtype = "bfloat16"

    @T.prim_func
    def kernel(A: T.Tensor((3, 32, 64), dtype), B: T.Tensor((64, 64), dtype), C: T.Tensor((32, 64), "float32")):
        with T.Kernel(1, threads=64) as _:
            A_s = T.alloc_shared((3, 32, 64), dtype)
            B_s = T.alloc_shared((64, 64), dtype)
            C_f = T.alloc_fragment((32, 64), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.fill(C_f, 7)
            for stage in T.serial(1, 3):
                T.gemm(A_s[stage, 8:24, 16:48], B_s[32:64, 0:40], C_f[16:32, 24:64])
            T.copy(C_f, C)

    generator = torch.Generator().manual_seed(3)
    A, B = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 32, 64), (64, 64)))
    expected = torch.full((32, 64), 7.0, dtype=torch.float64)
    for stage in (1, 2):
        expected[16:, 24:] += A[stage, 8:24, 16:48].double() @ B[32:, :40].double()
    check(kernel, (A, B), torch.full((32, 64), torch.nan), expected)


@pytest.mark.parametrize("refused", ["two shared tiles", "fill of shared", "a bfloat16 value"])
def test_what_upstream_refuses_without_fragments(refused):
    @T.prim_func
    def kernel(X: T.Tensor((32, 32), "float32"), Y: T.Tensor((32, 32), "float32")):
        with T.Kernel(1, threads=32) as _:
            x = T.alloc_shared((32, 32), "float32")
            if refused == "fill of shared":
                T.clear(x)
            T.copy(X, x)
            if refused == "two shared tiles":
                y = T.alloc_shared((32, 32), "float32")
                T.copy(x, y)
                T.copy(y, Y)
            else:
                for i, j in T.Parallel(32, 32):
                    Y[i, j] = T.cast(T.cast(x[i, j], "bfloat16"), "float32") if refused == "a bfloat16 value" else x[i, j]

    X = torch.randn(32, 32, generator=torch.Generator().manual_seed(6))
    Y = torch.full_like(X, torch.nan)
    compile_c(kernel)(X, Y)
    assert torch.equal(Y, X.bfloat16().float() if refused == "a bfloat16 value" else X)


def test_hints_for_a_gpu_change_nothing():
    """Barriers, batched reductions, fast functions, asynchronous copies, reductions of shared tiles."""

    @T.prim_func
    def kernel(X: T.Tensor((32, 48), "float32"), Y: T.Tensor((3, 32), "float32")):
        with T.Kernel(1, threads=128) as _:
            x_s = T.alloc_shared((32, 48), "float32")
            x = T.alloc_fragment((32, 48), "float32")
            row = T.alloc_fragment((32,), "float32")
            T.async_copy(X, x_s)
            T.sync_threads()
            T.copy(x_s, x)
            T.reduce_max(x, row, dim=1, batch=2)
            T.copy(row, Y[0, :])
            T.reduce_sum(x_s, row, dim=1)
            T.copy(row, Y[1, :])
            for i, j in T.Parallel(32, 48):
                x[i, j] = T.__exp(x[i, j])
            T.reduce_min(x, row, dim=1)
            T.copy(row, Y[2, :])

    X = torch.randn(32, 48, generator=torch.Generator().manual_seed(7))
    expected = torch.stack([X.double().amax(1), X.double().sum(1), X.double().exp().amin(1)])
    check(kernel, (X,), torch.full((3, 32), torch.nan), expected)


def test_attention():
    """The online softmax: two products of which one feeds the other, row maxima and sums, exponentials, masks."""
    heads, length, dim, block = 2, 96, 32, 32
    dtype = "float16"
    scale = dim**-0.5 * 1.44269504

    @T.prim_func
    def kernel(
        Q: T.Tensor((heads, length, dim), dtype),
        K: T.Tensor((heads, length, dim), dtype),
        V: T.Tensor((heads, length, dim), dtype),
        O: T.Tensor((heads, length, dim), "float32"),
    ):
        with T.Kernel(length // block, heads, threads=128) as (bx, head):
            Q_s = T.alloc_shared((block, dim), dtype)
            K_s = T.alloc_shared((block, dim), dtype)
            V_s = T.alloc_shared((block, dim), dtype)
            scores = T.alloc_fragment((block, block), "float32")
            weights = T.alloc_fragment((block, block), dtype)
            out = T.alloc_fragment((block, dim), "float32")
            maximum = T.alloc_fragment((block,), "float32")
            previous = T.alloc_fragment((block,), "float32")
            row_sum = T.alloc_fragment((block,), "float32")
            total = T.alloc_fragment((block,), "float32")
            T.copy(Q[head, bx * block : (bx + 1) * block, :], Q_s)
            T.fill(out, 0)
            T.fill(total, 0)
            T.fill(maximum, -T.infinity("float32"))
            for step in T.Pipelined(bx + 1, num_stages=2):
                T.copy(K[head, step * block : (step + 1) * block, :], K_s)
                for i, j in T.Parallel(block, block):
                    scores[i, j] = T.if_then_else(bx * block + i >= step * block + j, 0, -T.infinity("float32"))
                T.gemm(Q_s, K_s, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                T.copy(maximum, previous)
                T.reduce_max(scores, maximum, dim=1, clear=False)
                for i, j in T.Parallel(block, block):
                    scores[i, j] = T.exp2(scores[i, j] * scale - maximum[i] * scale)
                T.reduce_sum(scores, row_sum, dim=1)
                for i in T.Parallel(block):
                    total[i] = total[i] * T.exp2((previous[i] - maximum[i]) * scale) + row_sum[i]
                for i, j in T.Parallel(block, dim):
                    out[i, j] *= T.exp2((previous[i] - maximum[i]) * scale)
                T.copy(scores, weights)
                T.copy(V[head, step * block : (step + 1) * block, :], V_s)
                T.gemm(weights, V_s, out, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(block, dim):
                out[i, j] /= total[i]
            T.copy(out, O[head, bx * block : (bx + 1) * block, :])

    generator = torch.Generator().manual_seed(4)
    Q, K, V = (torch.randn(heads, length, dim, generator=generator).half() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(Q.double(), K.double(), V.double(), is_causal=True)
    C = torch.full((heads, length, dim), torch.nan)
    compile_c(kernel)(Q, K, V, C)
    assert_close(C, expected, dtype="float16")  # the weights are rounded to it


@pytest.mark.parametrize("columns", [64, STACK_BYTES // 64 // 4 + 1])
def test_arrays_larger_than_a_stack(columns):
    """The second size exceeds what may lie on the stack; values and neighbours stay apart, in a thread with a small stack."""

    @T.prim_func
    def kernel(X: T.Tensor((64, columns), "float32"), Y: T.Tensor((64, columns), "bfloat16")):
        with T.Kernel(2, threads=128) as block:
            x = T.alloc_fragment((64, columns), "float32")
            y = T.alloc_fragment((64, columns), "float32")
            z = T.alloc_fragment((64, columns), "float32")
            row = T.alloc_fragment((64,), "float32")
            T.copy(X, x)
            T.reduce_max(x, row, dim=1)
            for i, j in T.Parallel(64, columns):
                y[i, j] = x[i, j] - row[i]
                z[i, j] = x[i, j] * 2
            for i, j in T.Parallel(64, columns):
                Y[i, j] = T.cast(y[i, j] + z[i, j] + block, "bfloat16")

    run = compile_c(kernel)
    assert ("tilelang_ext::workspace(" in run.get_kernel_source()) is (columns > 64)
    X = torch.randn(64, columns, generator=torch.Generator().manual_seed(5))
    Y = torch.full_like(X, torch.nan).bfloat16()
    threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=run, args=(X, Y))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(0)
    assert torch.equal(Y, ((X - X.amax(1, keepdim=True)) + X * 2 + 1).bfloat16())


def test_fast_enough_to_debug_with():
    """16 million products and more of decoded codes: a tenth of a second where nothing else runs."""
    kernel = compile_c(matmul(256, 256, 256, "float8_e4m3fn", "float32", trans_B=True))
    A, B = (torch.randn(256, 256).to(torch.float8_e4m3fn) for _ in range(2))
    C = torch.zeros(256, 256)
    start = time.process_time()
    kernel(A, B, torch.zeros(256), C)
    assert time.process_time() - start < 1.0


def scans(dtype, scope, reverse):
    """Along both axes, to another tile, in place, and of a part of one."""

    @T.prim_func
    def kernel(
        A: T.Tensor((5, 12), dtype),
        rows: T.Tensor((5, 12), dtype),
        columns: T.Tensor((5, 12), dtype),
        part: T.Tensor((5, 12), dtype),
        most: T.Tensor((12,), dtype),
    ):
        with T.Kernel(1, threads=64):
            a, b = (
                T.alloc_fragment((5, 12), dtype) if scope == "fragment" else T.alloc_shared((5, 12), dtype),
                T.alloc_shared((5, 12), dtype),
            )
            line = T.alloc_shared((12,), dtype)
            T.copy(A, a)
            T.cumsum(a, b, dim=1, reverse=reverse)
            T.copy(b, rows)
            T.copy(A, b)
            T.cumsum(b, dim=0, reverse=reverse)
            T.copy(b, columns)
            T.copy(A, b)
            T.cumsum(b[1:4, 2:9], dim=1, reverse=reverse)
            T.copy(b, part)
            T.copy(A[3, 0:12], line)
            T.cummax(line, dim=0, reverse=reverse)
            T.copy(line, most)

    return kernel


@pytest.mark.parametrize(
    ("dtype", "scope", "reverse"),
    [("float32", "shared", False), ("float16", "fragment", True), ("bfloat16", "shared", True), ("int32", "fragment", False),
     ("int8", "shared", True)],
)  # fmt: skip
def test_scans(dtype, scope, reverse):
    """Sums of 16-bit floats are rounded once each: 1 / 256 is lost beside 2 if every sum is rounded before the next."""
    a = torch.randint(-4, 5, (5, 12), generator=torch.Generator().manual_seed(7)).to(getattr(torch, dtype))
    if dtype == "bfloat16":
        a[0] = torch.tensor([2.0] + [1 / 256] * 11).flip(0)
    results = [torch.zeros_like(a) for _ in range(3)] + [torch.zeros_like(a[0])]
    compile_c(scans(dtype, scope, reverse))(a, *results)

    def scan(x, dim, of=torch.cumsum):
        x = x.double()
        return of(x.flip(dim), dim).flip(dim) if reverse else of(x, dim)

    part = a.double()
    part[1:4, 2:9] = scan(a[1:4, 2:9], 1)
    expected = [scan(a, 1), scan(a, 0), part, scan(a[3], 0, lambda x, dim: x.cummax(dim).values)]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted.to(a.dtype))
