"""What generated Metal text looks like, and the errors that stop a kernel no Mac would run."""

import linecache
import re
import subprocess
import sys

import pytest
from metal.kernels import scale
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext.metal.program import lower


def source_of(kernel) -> str:
    return lower(kernel).source


def test_signature_and_body():
    source = source_of(scale)
    kernel = source[source.index("struct") :]
    assert (
        kernel
        == """struct scale_kernel_args_t {
  alignas(8) float s;
  alignas(8) int n;
};

[[max_total_threads_per_threadgroup(32)]]
kernel void scale_kernel(
    const device half* A [[buffer(0)]],
    device bfloat* B [[buffer(1)]],
    constant scale_kernel_args_t& arg [[buffer(2)]],
    uint3 blockIdx [[threadgroup_position_in_grid]],
    uint3 threadIdx [[thread_position_in_threadgroup]]) {
  const int bx = int(blockIdx.x);
  const int tx = int(threadIdx.x);
"""
        + kernel[kernel.index("  #pragma") :]
    )
    assert source.startswith("#include <metal_stdlib>\nusing namespace metal;\n")


def test_the_text_does_not_depend_on_the_run():
    code = "from metal.kernels import scale; from tilelang_ext.metal.program import lower; print(lower(scale).source)"

    def text_with(seed):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert text_with("1") == text_with("2")


def test_a_helper_called_is_a_helper_defined_once():
    @T.prim_func
    def kernel(
        A: T.Tensor((64,), "float8_e4m3fn"),
        B: T.Tensor((64,), "float8_e5m2"),
        C: T.Tensor((64,), "float32"),
    ):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                C[i] = T.erf(A[i].astype("float32"))
            for i in T.serial(64):
                B[i] = (A[i].astype("float32") * 2.0).astype("float8_e5m2")

    source = source_of(kernel)
    prelude, body = source.split("kernel void ")
    defined = re.findall(r"^inline \w+ (\w+\(\w+)", prelude, re.M)
    assert len(defined) == len(set(defined)), "one definition an overload"
    for helper in ("erf", "e4m3fn_to_half", "float_to_e5m2"):
        assert f"{helper}(" in body
        assert any(d.startswith(helper + "(") for d in defined)
    for helper in ("e5m2_to_half", "float_to_e4m3fn", "all_reduce", "simdgroup_mma"):
        assert helper not in source, "only what is called"


def test_threadgroup_arrays_are_aligned_and_lead_the_kernel():
    @T.prim_func
    def kernel(A: T.Tensor((64,), "float16")):
        with T.Kernel(1, threads=32):
            for _ in T.serial(2):
                A_s = T.alloc_shared((64,), "float16", scope="shared")
                T.copy(A, A_s)
                for i in T.Parallel(64):
                    A[i] = A_s[63 - i]

    body = source_of(kernel).split(") {\n")[1]
    assert body.lstrip().startswith(("const int tx", "alignas(16) threadgroup"))
    assert body.count("alignas(16) threadgroup half A_s[64];") == 1


@pytest.mark.parametrize("lanes", [2, 4])
def test_bfloat_vectors_are_vectors(lanes):
    @T.prim_func
    def kernel(
        A: T.Tensor((64,), "bfloat16"),
        B: T.Tensor((64,), "bfloat16"),
    ):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            if tx < 64 // lanes:
                for j in T.vectorized(lanes):
                    B[tx * lanes + j] = A[tx * lanes + j]

    assert f"*(device bfloat{lanes}*)(B + (tx * {lanes})) = *(device bfloat{lanes}*)(A + (tx * {lanes}));" in source_of(kernel)


def test_names_that_mean_something_in_metal():
    @T.prim_func
    def kernel(
        device: T.Tensor((64,), "float32"),
        half: T.Tensor((64,), "float32"),
        exp: T.float32,
    ):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                half[i] = T.exp(device[i]) * exp

    source = source_of(kernel)
    assert "device float* device " not in source
    assert "device float* half " not in source
    assert "exp(*(device float2*)(device_1 + " in source
    assert "arg.exp_1" in source


def test_matmul2d_text():
    def matmul2d(c, a, b, *constants):
        return tvm.tirx.call_intrin("handle", tvm.ir.Op.get("tilelang_ext.metal_matmul2d"), c, a, b, *constants)

    @T.prim_func
    def kernel(C: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=32):
            a = T.alloc_local((8,), "float16")
            b = T.alloc_local((16,), "float16")
            c = T.alloc_local((16,), "float32")
            T.evaluate(matmul2d(T.address_of(c[0]), T.address_of(a[0]), T.address_of(b[0]), 16, 32, 16, False, True))
            C[0] = c[0]

    source = source_of(kernel)
    assert "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>" in source
    assert "matmul2d<16, 32, 16, false, true>(c, a, b);" in source
    assert "MetalPerformancePrimitives" not in source_of(scale)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_float64_names_the_buffer():
    @T.prim_func
    def kernel(weights: T.Tensor((64,), "float64")):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                weights[i] = weights[i] * 2

    with pytest.raises(TypeError, match=r"weights: Metal has no float64; got a float64 buffer in kernel .*; use float32"):
        lower(kernel)


def test_more_than_31_buffers():
    """Trace a function of 32 tensors."""
    names = [f"A{i}" for i in range(32)]
    parameters = ", ".join(f'{name}: T.Tensor((32,), "float32")' for name in names)
    body = "\n".join(f"            {name}[tx] = 1.0" for name in names)
    lines = f"def kernel({parameters}):\n    with T.Kernel(1, threads=32):\n            tx = T.get_thread_binding()\n{body}\n"
    linecache.cache["<many buffers>"] = (len(lines), None, lines.splitlines(True), "<many buffers>")
    scope = {"T": T}
    exec(compile(lines, "<many buffers>", "exec"), scope)
    with pytest.raises(ValueError, match=r"buffers: a Metal kernel takes at most 31 .*; got 32 in kernel"):
        lower(T.prim_func(scope["kernel"]))


def test_too_much_threadgroup_memory():
    @T.prim_func
    def kernel(A: T.Tensor((128, 128), "float32")):
        with T.Kernel(1, threads=128):
            A_s = T.alloc_shared((128, 128), "float32")
            T.copy(A, A_s)
            T.copy(A_s, A)

    with pytest.raises(ValueError, match=r"(shared|threadgroup).*32768.*got 6\d+.*use"):
        lower(kernel)


def test_too_many_threads():
    @T.prim_func
    def kernel(A: T.Tensor((2048,), "float32")):
        with T.Kernel(1, threads=2048):
            for i in T.Parallel(2048):
                A[i] = 1.0

    with pytest.raises(ValueError, match=r"threads: .*1024.*got 2048"):
        lower(kernel)


def test_threads_that_are_no_multiple_of_32():
    @T.prim_func
    def reduces(A: T.Tensor((48,), "float32")):
        with T.Kernel(1, threads=48):
            tx = T.get_thread_binding()
            A[tx] = T.warp_reduce_sum(A[tx])

    @T.prim_func
    def adds(A: T.Tensor((48,), "float32")):
        with T.Kernel(1, threads=48):
            tx = T.get_thread_binding()
            A[tx] = A[tx] + 1.0

    with pytest.raises(ValueError, match=r"threads: must be a multiple of 32 .*; got 48 in kernel .*threads=64"):
        lower(reduces)
    lower(adds)


@pytest.mark.parametrize("dtype", ["int64", "int16", "float8_e4m3fn"])
def test_atomics_that_metal_lacks(dtype):
    @T.prim_func
    def kernel(A: T.Tensor((4,), dtype)):
        with T.Kernel(1, threads=32):
            T.atomic_add(A[0], T.Cast(dtype, 1))

    with pytest.raises(
        TypeError, match=f"atomic_add: Metal has atomics on int32, .* of float16 and bfloat16; got {dtype}; use"
    ):
        lower(kernel)


def test_atomic_order():
    @T.prim_func
    def kernel(A: T.Tensor((4,), "int32")):
        with T.Kernel(1, threads=32):
            T.atomic_add(A[0], 1, memory_order="acq_rel")

    with pytest.raises(ValueError, match=r'atomic_add: Metal has relaxed atomics only; .*pass memory_order="relaxed"'):
        lower(kernel)


def test_scalar_of_a_narrow_type():
    @T.prim_func
    def kernel(
        A: T.Tensor((32,), "float32"),
        s: T.float8_e4m3fn,
    ):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                A[i] = s.astype("float32")

    with pytest.raises(Exception, match=r"s: a scalar argument on Metal|float8_e4m3fn|is_float"):
        lower(kernel)


@T.prim_func
def two_tiles(A: T.Tensor((16, 16), "uint8"), C: T.Tensor((16, 16), "uint8")):
    with T.Kernel(1, threads=32):
        first, second = T.alloc_shared((16, 16), "uint8"), T.alloc_shared((16, 16), "uint8")
        T.copy(A, first)
        for i, j in T.Parallel(16, 16):
            second[i, j] = first[j, i]
        T.copy(second, C)


def test_each_tile_is_an_array():
    """By default tiles are of dynamic shared memory, which upstream makes one array of; here it is no more than 32 KB."""
    source = lower(two_tiles).source
    assert "threadgroup uchar first[256];" in source
    assert "threadgroup uchar second[256];" in source
