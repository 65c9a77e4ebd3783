"""What the CPU backend leaves alone, what it refuses and how."""

import subprocess
import sys

import pytest
import tilelang
import torch
from cpu.run import compile_c
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext.cpu import backend

# A kernel in upstream's words alone: run with and without tilelang_ext.
PLAIN = """
import sys
import tilelang
if sys.argv[1] == "with":
    import tilelang_ext
import tilelang.language as T
tilelang.disable_cache()

@T.prim_func
def elementwise(A: T.Tensor((64, 64), "float32"), B: T.Tensor((64, 64), "float16"), C: T.Tensor((64, 64), "float32")):
    with T.Kernel(2, threads=128) as bx:
        for i, j in T.Parallel(32, 64):
            C[bx * 32 + i, j] = A[bx * 32 + i, j] * 0.375 + A[i, j]

@T.prim_func
def product(A: T.Tensor((64, 64), "float16"), B: T.Tensor((64, 64), "float16"), C: T.Tensor((64, 64), "float32")):
    with T.Kernel(2, threads=128) as bx:
        A_s = T.alloc_shared((32, 64), "float16")
        C_l = T.alloc_local((32, 64), "float32")
        T.copy(A[bx * 32, 0], A_s)
        T.clear(C_l)
        T.gemm(A_s, B, C_l)
        T.copy(C_l, C[bx * 32, 0])

for kernel in (elementwise, product):
    print(tilelang.compile(kernel, target="c").get_kernel_source())
"""


def test_kernels_that_upstream_compiles_keep_their_text(tmp_path):
    program = tmp_path / "plain.py"
    program.write_text(PLAIN)
    texts = []
    for way in ("with", "without"):
        done = subprocess.run([sys.executable, program, way], capture_output=True, text=True, timeout=300, check=True)
        texts.append(done.stdout[done.stdout.index("// tilelang target") :])
        texts[-1] = "\n".join(line for line in texts[-1].splitlines() if "TileLang" not in line)  # log lines have the time
    assert texts[0] == texts[1]
    assert texts[0].count("kernel(float* A") + texts[0].count("kernel(half* A") >= 2
    assert "tilelang_ext" not in texts[0]


def test_the_cache_tells_these_passes_apart():
    """Every way to spell the target gets the key of these passes, once; other targets get none."""
    for given in ("c", {"kind": "c"}, Target("c"), backend.normalize_target("c")):
        assert [key for key in backend.normalize_target(given).keys if "tilelang_ext" in key] == [backend.lowering_key()]
    for other in ("cuda", {"kind": "metal"}, "auto", "llvm"):
        assert backend.normalize_target(other) is None


def refused(write):
    """A kernel with one fragment, and one statement that the CPU cannot run."""

    @T.prim_func
    def kernel(A: T.Tensor((32, 32), "float32"), B: T.Tensor((32, 32), "float32")):
        with T.Kernel(1, threads=128) as _:
            x = T.alloc_fragment((32, 32), "float32")
            s = T.alloc_shared((32, 32), "float32")
            T.copy(A, x)
            T.copy(A, s)
            write(x, s)
            T.copy(x, B)

    return kernel


@T.macro
def shuffle(x, s):
    x[0, 0] = T.warp_reduce_sum(x[0, 0])


@T.macro
def thread(x, s):
    x[0, 0] = T.cast(T.get_thread_binding(), "float32")


@T.macro
def vector(x, s):
    h = T.alloc_fragment((32,), "float16")
    h[T.Ramp(0, 1, 4)] = T.cast(x[0, T.Ramp(0, 1, 4)], "float16x4")


@T.macro
def vector_load(x, s):
    h = T.alloc_fragment((32,), "float8_e5m2")
    x[0, T.Ramp(0, 1, 4)] = T.cast(h[T.Ramp(0, 1, 4)], "float32x4")


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (shuffle, NotImplementedError, r"T\.warp_reduce_sum: .+; got it on target c; use tile operators"),
        (thread, NotImplementedError, r"target c: blocks have one thread; got thread index \w+ in .*; use tile operators"),
        (vector, NotImplementedError, r"target c: one float16 at a time can be .*; got .*; cast to float32"),
        (vector_load, NotImplementedError, r"target c: one float8_e5m2 at a time can be .*; got h\["),
    ],
)
def test_errors(write, error, message):
    with pytest.raises(error, match=message):
        compile_c(refused(write))


def test_a_narrow_scalar_is_refused():
    @T.prim_func
    def kernel(x: T.bfloat16, A: T.Tensor((32,), "bfloat16")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(32):
                A[i] = x

    with pytest.raises(TypeError, match=r"x: a scalar parameter must be .*; got bfloat16; declare it as T.float32, and write"):
        compile_c(kernel)


def test_a_symbolic_tile_is_refused():
    n = T.dynamic("n")

    @T.prim_func
    def kernel(A: T.Tensor((n,), "float32")):
        with T.Kernel(1, threads=32) as _:
            x = T.alloc_fragment((n,), "float32")
            for i in T.serial(n):
                x[i] = A[i]
            for i in T.serial(n):
                A[i] = x[i]

    with pytest.raises(ValueError, match=r"target c: sizes of tiles must be known .*; got shape \[n\] for x; use a constant"):
        compile_c(kernel)


def test_a_tensor_of_another_dtype_is_refused():
    """The user passes the dtype of the signature: codes stay out of sight."""

    @T.prim_func
    def kernel(A: T.Tensor((32,), "float8_e4m3fn"), B: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(32):
                B[i] = T.cast(A[i], "float32")

    run = compile_c(kernel)
    with pytest.raises(ValueError, match=r"dtype"):
        run(torch.zeros(32, dtype=torch.uint8), torch.zeros(32))


def test_jit():
    """`tilelang.jit` takes the same way, and makes outputs of narrow types."""

    @tilelang.jit(out_idx=[-1], target="c")
    def doubled(n):
        @T.prim_func
        def kernel(A: T.Tensor((n,), "float8_e4m3fn"), B: T.Tensor((n,), "bfloat16")):
            with T.Kernel(T.ceildiv(n, 64), threads=64) as block:
                for i in T.Parallel(64):
                    if block * 64 + i < n:
                        B[block * 64 + i] = T.cast(T.cast(A[block * 64 + i], "float32") * 2, "bfloat16")

        return kernel

    A = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    assert torch.equal(doubled(100)(A), (A.float() * 2).bfloat16())
