"""program: what a kernel is called with follows from its user's arguments, by identity, on every target that has programs."""

import pytest
import tilelang
import torch
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.rocm import program as rocm

TARGETS = ["metal", "hip -mcpu=gfx942"]


def lower(kernel, target):
    return metal.lower(kernel) if target == "metal" else rocm.lower(kernel, target)


@pytest.mark.parametrize("target", TARGETS)
def test_extents_of_one_name(target):
    """Two symbolic extents may share a name; each has its own value, in the kernel and in its grid."""
    n, m = T.dynamic("n"), T.dynamic("n")

    @T.prim_func
    def kernel(A: T.Tensor((n,), "float32"), B: T.Tensor((m,), "float32"), out: T.Tensor((2,), "int32")):
        with T.Kernel(m, threads=32) as block:
            if T.get_thread_binding() == 0 and block == m - 1:
                out[0] = n
                out[1] = m

    out = torch.zeros(2, dtype=torch.int32)
    assert not simulate(kernel, torch.zeros(5), torch.zeros(9), out, target=target).findings
    assert out.tolist() == [5, 9]
    (launch,) = lower(kernel, target).bind((torch.zeros(5), torch.zeros(9), out), device="cpu")
    assert launch.grid == (9, 1, 1)
    assert sorted(launch.numbers) == [5, 9]


@pytest.mark.parametrize("target", TARGETS)
def test_an_extent_and_a_scalar_of_one_name(target):
    n = T.dynamic("n")

    @T.prim_func
    def kernel(A: T.Tensor((n,), "float32"), n: T.int32, out: T.Tensor((2,), "int32")):
        with T.Kernel(1, threads=32) as _:
            if T.get_thread_binding() == 0:
                out[0] = A.shape[0]
                out[1] = n

    out = torch.zeros(2, dtype=torch.int32)
    assert not simulate(kernel, torch.zeros(5), 9, out, target=target).findings
    assert out.tolist() == [5, 9]


@pytest.mark.parametrize("target", TARGETS)
def test_scalars_that_tracing_gives_one_name(target):
    """A macro renames what it is given."""

    @T.macro
    def put(out, place, value):
        out[place] = value

    @T.prim_func
    def kernel(first: T.float32, second: T.float32, out: T.Tensor((2,), "float32")):
        with T.Kernel(1, threads=32) as _:
            if T.get_thread_binding() == 0:
                put(out, 0, first)
                put(out, 1, second)

    out = torch.zeros(2)
    assert not simulate(kernel, 2.0, 3.0, out, target=target).findings
    assert out.tolist() == [2, 3]


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_and_numbers_come_in_the_kernels_order(target):
    rows = T.dynamic("rows")

    @T.prim_func
    def kernel(z: T.Tensor((rows, 4), "float32"), shift: T.float32, a: T.Tensor((rows, 4), "float32"), k: T.int32):
        with T.Kernel(rows, threads=32) as row:
            for j in T.Parallel(4):
                a[row, j] = z[row, j] + shift + T.cast(k, "float32") + a[row, j]

    z, a = torch.randn(3, 4), torch.randn(3, 4)
    program = lower(kernel, target)
    assert program.written == {2}
    assert program.read_and_written == {2}
    (launch,) = program.bind((z, 0.5, a, 7), device="cpu")
    given = {"z": z, "a": a, "shift": 0.5, "k": 7, "rows": 3}
    for binding, argument in zip(program.kernels[0].bindings, launch.arguments, strict=True):
        assert argument is given[binding.var.name] or argument == given[binding.var.name]
    assert [id(tensor) for tensor in launch.tensors] == [id(a), id(z)] if target != "metal" else [id(z), id(a)]
    assert (launch.grid, launch.threads) == ((3, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("target", TARGETS)
def test_the_callers_pass_options_stay(target):
    """Lowering happens under the options of the caller's pass context, such as one that refuses to vectorise loops."""

    @T.prim_func
    def kernel(A: T.Tensor((128,), "float32"), B: T.Tensor((128,), "float32")):
        with T.Kernel(1, threads=32) as _:
            T.copy(A, B)

    def text(options):
        with tvm.transform.PassContext(config=options):
            return lower(kernel, target).source

    assert "float4" in text({})
    assert "float4" not in text({tilelang.PassConfigKey.TIR_DISABLE_VECTORIZE: True})


def test_errors_of_a_call_are_the_same_for_every_target():
    n = T.dynamic("n")

    @T.prim_func
    def kernel(A: T.Tensor((n,), "float32"), B: T.Tensor((n,), "float32"), scale: T.float32):
        with T.Kernel(1, threads=32) as _:
            if T.get_thread_binding() == 0:
                B[0] = A[0] * scale

    bad = [
        (torch.zeros(4), torch.zeros(5), 1.0),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(4), 1e39),
        (torch.zeros(4), torch.zeros(4, dtype=torch.float16), 1.0),
    ]
    programs = [lower(kernel, target) for target in TARGETS]
    for arguments in bad:
        messages = []
        for program in programs:
            with pytest.raises((TypeError, ValueError)) as raised:
                program.bind(arguments, device="cpu")
            messages.append(f"{raised.type.__name__}: {raised.value}")
        assert messages[0] == messages[1]
