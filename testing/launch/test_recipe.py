"""How a prim_func is launched, as data: read from what tilelang lowers, and launched on the fake driver."""

import ctypes
import shutil

import pytest
import tilelang.language as T
import torch
from launch.fakes import FakeCuda, cubin
from launch.kernels import matmul, nine_tensors, two_kernels

from tilelang_ext.launch.plan import arch_of
from tilelang_ext.launch.recipe import assemble, lower

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler, on PATH")
ARCH = "sm_90a"


@pytest.fixture(scope="module")
def lowered():
    return {make.__name__: lower(make(), ARCH) for make in (nine_tensors, matmul, two_kernels)}


def planned(cuda, recipe):
    """The plan of a recipe on the fake driver, of a cubin made for it."""
    return cuda.plan(recipe.name, {argument["name"]: argument["type"] for argument in recipe.arguments}, recipe.variant)


def test_nine_tensors(lowered):
    cuda = FakeCuda()
    plan = planned(cuda, lowered["nine_tensors"])
    xs = [torch.randn(10, 512)[:, :256], *(torch.randn(10, 256) for _ in range(8))]
    plan(*xs[:8], 0.5, xs[8])
    [done] = cuda.launches()
    assert (done.kernel, done.grid, done.block, done.attributes) == ("add_kernel", (3, 1, 1), (128, 1, 1), {})
    assert done.parameters == [xs[8].data_ptr(), *(x.data_ptr() for x in xs[:8]), 0x3F000000, 10, 512]
    xs[3] = torch.randn(11, 256)
    with pytest.raises(ValueError, match=r"add: x3 must have shape \(10, 256\) beside the other arguments; got \(11, 256\)"):
        plan(*xs[:8], 0.5, xs[8])
    xs[3] = torch.randn(10, 512)[:, ::2]
    with pytest.raises(ValueError, match=r"add: x3 must have strides \(256, 1\) for shape \(10, 256\); got \(512, 2\)"):
        plan(*xs[:8], 0.5, xs[8])
    assert len(cuda.launches()) == 1


def test_descriptors(lowered):
    cuda = FakeCuda()
    plan = planned(cuda, lowered["matmul"])
    a, b, out = torch.zeros(100, 256, dtype=torch.bfloat16), torch.zeros(512, 256, dtype=torch.bfloat16), torch.zeros(100, 512)
    plan(a, b, out)
    [done] = cuda.launches()
    assert (done.grid, done.shared > 0) == ((4, 2, 1), True)
    encoded = {line.split("swizzle")[0] for line in cuda.lines("encode")}
    assert f"encode dtype 9 address {a.data_ptr():x} extents 256 100 strides 512 box 64 64 " in encoded
    assert f"encode dtype 9 address {b.data_ptr():x} extents 256 512 strides 512 box 64 128 " in encoded
    plan(a, b, out)
    assert len(cuda.lines("encode")) == len(encoded)


def test_clusters_pdl_and_extents_that_are_products(lowered):
    cuda = FakeCuda()
    plan = planned(cuda, lowered["two_kernels"])
    x, ids, out = torch.zeros(384), torch.zeros(3, dtype=torch.int32), torch.zeros(300)
    plan(x, ids, out)
    one, two = cuda.launches()
    assert (one.grid, {id: values[:3] for id, values in one.attributes.items()}) == ((2, 3, 1), {4: (2, 1, 1)})
    assert (two.grid, two.attributes[4][:2], two.attributes[6][0]) == ((3, 1, 1), (2, 1), 1)
    with pytest.raises(ValueError, match=r"twice: x must have shape \(384,\) beside the other arguments; got \(256,\)"):
        plan(x[:256], ids, out)


def test_alignment():
    cuda = FakeCuda()
    x = torch.zeros(2561)[1:].view(10, 256)
    rest = [torch.zeros(10, 256) for _ in range(8)]
    for alignment, names in ((16, "x0"), ({"x0": 4}, "x1")):
        plan = planned(cuda, lower(nine_tensors(), ARCH, alignment=alignment))
        if names == "x1":
            plan(x, *rest[:7], 0.5, rest[7])
            rest[0] = x
        with pytest.raises(
            ValueError, match=f"add: {names} must start at a multiple of 16 bytes; got one 4 past it; clone the"
        ):
            plan(x, *rest[:7], 0.5, rest[7])


@needs_nvcc
def test_cubin_of_nvcc(lowered):
    recipe = lowered["nine_tensors"]
    binary = assemble(recipe.source, ARCH)
    assert arch_of(binary) == ARCH
    cuda = FakeCuda()
    sizes = [8] * 9 + [4] * 3
    cuda.driver.fake_kernel(b"add_kernel", len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    plan = recipe.plan(binary, cuda.launcher)
    plan(*(torch.randn(10, 256) for _ in range(8)), 0.5, torch.empty(10, 256))
    assert len(cuda.launches()) == 1
    for other in ("sm_90", "sm_100a"):
        with pytest.raises(ValueError, match=f"add: binary must be for sm_90a; got one whose ELF says {other}; compile it for"):
            recipe.plan(assemble(recipe.source, other), cuda.launcher)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_symbols_that_no_tensor_gives():
    n = T.dynamic("n")

    @T.prim_func
    def odd(x: T.Tensor((n * 2 + 1,), "float32")):
        with T.Kernel(n, threads=32) as bx:
            x[bx * 2] = 0

    message = "odd: every symbol must be a parameter, a stride, or an extent up to a factor; got n; give a tensor that extent"
    with pytest.raises(NotImplementedError, match=message):
        lower(odd, ARCH)


def test_symbols_that_are_extents_up_to_a_factor():
    groups = T.dynamic("groups")

    @T.prim_func
    def clear(x: T.Tensor((groups * 32,), "float32")):
        with T.Kernel(groups, threads=32) as bx:
            for i in T.Parallel(32):
                x[bx * 32 + i] = 0

    cuda = FakeCuda()
    plan = planned(cuda, lower(clear, ARCH))
    plan(torch.zeros(96))
    assert cuda.launches()[0].grid == (3, 1, 1)
    with pytest.raises(ValueError, match=r"clear: x must have shape \(96,\) beside the other arguments; got \(100,\)"):
        plan(torch.zeros(100))


def test_loops_of_the_host():
    @T.prim_func
    def steps(x: T.Tensor((64,), "float32")):
        for i in range(4):
            with T.Kernel(2, threads=32) as bx:
                x[bx + i] = 0

    with pytest.raises(NotImplementedError, match="steps: launches must not depend on the host; got a For; take it out"):
        lower(steps, ARCH)


def test_elements_of_half_a_byte():
    @T.prim_func
    def copy(x: T.Tensor((64,), "float4_e2m1fn"), out: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                out[i] = T.cast(x[i], "float32")

    with pytest.raises(
        NotImplementedError, match="copy: tensors must have elements of whole bytes; got x float4_e2m1fn; pass uint8"
    ):
        lower(copy, ARCH)


def test_binary_must_fit_the_recipe(lowered):
    recipe = lowered["nine_tensors"]
    with pytest.raises(
        ValueError, match=r"binary must have kernel add_kernel with parameters of bytes \(8, .*4\); got one with \(8,\)"
    ):
        recipe.plan(cubin(ARCH, {"add_kernel": [8]}), FakeCuda().launcher)
