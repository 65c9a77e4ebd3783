"""What a kernel author gets wrong on Metal, and the message that says so: rule, value, what to do."""

import pytest
from metal.kernels import gemm

from tilelang_ext import language as T
from tilelang_ext import metal


def elementwise(dtype, threads=32, shared_elements=64):
    @T.prim_func
    def kernel(A: T.Tensor((64,), dtype), B: T.Tensor((64,), dtype)):
        with T.Kernel(1, threads=threads) as _:
            S = T.alloc_shared((shared_elements,), dtype)
            for i in T.Parallel(shared_elements):
                S[i] = A[i % 64]
            for i in T.Parallel(64):
                B[i] = S[shared_elements - 1 - i]

    return kernel


@pytest.mark.parametrize("name", ["M", "N", "K"])
def test_tile_not_a_multiple_of_8(name):
    blocks = {"M": 64, "N": 64, "K": 32, name: 12}
    with pytest.raises(
        ValueError, match=rf"T\.gemm: on Metal the tile's {name} must be a multiple of 8; got {name} = 12; round"
    ):
        metal.lower(gemm(64, 64, 64, blocks["M"], blocks["N"], blocks["K"]))


def test_threads_not_a_multiple_of_32():
    with pytest.raises(ValueError, match=r"T\.gemm: threads must be a multiple of 32, .*; got 48; use threads=32"):
        metal.lower(gemm(64, 64, 64, threads=48))


def test_more_simdgroups_than_the_tile_has_matrices():
    with pytest.raises(ValueError, match=r"T\.gemm: the tile must split .*; got a 16x16 tile and 8 simdgroups \(256 threads\)"):
        metal.lower(gemm(16, 16, 16, 16, 16, 16, threads=256))


def test_integer_operands():
    with pytest.raises(TypeError, match=r"T\.gemm: on Metal A must be float16, .*; got int8; cast it"):
        metal.lower(gemm(64, 64, 64, a="int8", b="int8"))


def test_integer_accumulator():
    with pytest.raises(TypeError, match=r"T\.gemm: on Metal C must be float32, .*; got int32 \(C_f\)"):
        metal.lower(gemm(64, 64, 64, accum_dtype="int32", out="int32"))


def test_slice_of_a_fragment_operand():
    @T.prim_func
    def kernel(A: T.Tensor((64, 64), "float16"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            A_f = T.alloc_fragment((64, 64), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.copy(A, A_f)
            T.copy(A[0:32, 0:64], B_s)
            T.gemm(A_f[0:64, 0:32], B_s, C_f, clear_accum=True)
            T.copy(C_f, C)

    with pytest.raises(ValueError, match=r"a fragment operand must be used whole; got a slice of A \(A_f\)"):
        metal.lower(kernel)


def test_float64():
    with pytest.raises(TypeError, match=r"Metal has no float64"):
        metal.lower(elementwise("float64"))


def test_threadgroup_memory():
    with pytest.raises(
        ValueError,
        match=r"shared memory: a Metal threadgroup has 32768 bytes; got 40000 in kernel \w+ \(\w+ 40000\); "
        r"use tiles of 1/2 of these elements \(20000 bytes\)",
    ):
        metal.lower(elementwise("float32", shared_elements=10000))


@pytest.mark.parametrize(
    ("block_K", "stages", "message"),
    [
        (32, 4, r"got 40832 .*\(A_s 20416 in 4 stages, B_s 20416 in 4 stages\); use num_stages=3 \(30624 bytes\)"),
        (64, 3, r"got 55200 .*\(A_s 27600 in 3 stages, B_s 27600 in 3 stages\); use num_stages=1 \(18400 bytes\)"),
        (256, 2, r"got 135104 .*; use tiles of 1/4 of these elements with num_stages=1 \(16888 bytes\)"),
    ],
)
def test_threadgroup_memory_names_what_fits(block_K, stages, message):
    @T.prim_func
    def kernel(A: T.Tensor((64, 1024), "float16"), B: T.Tensor((64, 1024), "float16"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128):
            A_s, B_s = T.alloc_shared((64, block_K), "float16"), T.alloc_shared((64, block_K), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.clear(C_f)
            for k in T.Pipelined(1024 // block_K, num_stages=stages):
                T.copy(A[0, k * block_K], A_s)
                T.copy(B[0, k * block_K], B_s)
                T.gemm(A_s, B_s, C_f, transpose_B=True)
            T.copy(C_f, C)

    with pytest.raises(ValueError, match=message):
        metal.lower(kernel)


def test_too_many_threads():
    with pytest.raises(ValueError, match=r"threads.*1024.*got 2048"):
        metal.lower(elementwise("float32", threads=2048))


def test_too_many_buffers():
    names = [f"B{i}" for i in range(32)]
    source = "@T.prim_func\ndef kernel(" + ", ".join(f"{n}: T.Tensor((32,), 'float32')" for n in names) + "):\n"
    source += "    with T.Kernel(1, threads=32) as _:\n        for i in T.Parallel(32):\n"
    source += "            B0[i] = " + " + ".join(f"{n}[i]" for n in names[1:]) + "\n"
    kernel = _define(source)
    with pytest.raises(ValueError, match=r"31.*got 32"):
        metal.lower(kernel)


def test_unknown_target():
    with pytest.raises(ValueError, match=r'target must be "metal", "metal4" or a Target; got .cuda.; pass one of these'):
        metal.lower(gemm(64, 64, 64), target="cuda")


def test_not_a_kernel():
    from tilelang_ext import simulate

    with pytest.raises(TypeError, match=r"a kernel must be a prim_func, .*; got function; pass the function decorated"):
        simulate(gemm)


def _define(source):
    """Compile `source` as a file would be: tilelang reads the text of a prim_func back."""
    import importlib.util
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many_buffers.py"
        path.write_text("from tilelang_ext import language as T\n\n" + source)
        spec = importlib.util.spec_from_file_location("many_buffers", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel
