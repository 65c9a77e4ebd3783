"""Several kernels as one variant: what is recorded from views, and what kernels demand of them."""

import pytest
import torch
from launch.fakes import FakeCuda, compile_without_nvcc
from launch.kernels import add_blocks, double

from tilelang_ext.launch.expression import evaluate, fact, recipe_of, shape, stride
from tilelang_ext.launch.record import Recorder, View


@pytest.fixture
def cuda(monkeypatch):
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    return cuda


def plan_of(cuda, recorder, sizes=(1, 100), **names):
    recipe = {
        "name": recorder.name,
        "arguments": [{"name": name, "type": type} for name, type in names.items()],
        "key": [],
        "size": recipe_of(shape("x", 0)),
    }
    plan = cuda.launcher.plan(recipe)
    plan.add(recorder.variant([], sizes), recorder.cubins, recorder.constants)
    return plan


def two_kernels(mask):
    recorder = Recorder("twice", "sm_90a")
    n = shape("x", 0)
    x = recorder.argument("x", "float32", (n, 64), (stride("x", 0), 1))
    out = recorder.argument("out", "float32", (n, 64))
    hidden = recorder.empty(n, 64, dtype="float32")
    recorder.compile(double, 64)(x, hidden)
    recorder.compile(add_blocks, 8)(hidden, recorder.constant(mask), out.view(-1, 8, 64))
    return recorder


def test_two_kernels(cuda):
    mask = torch.randn(64)
    plan = plan_of(cuda, two_kernels(mask), x="tensor", out="tensor")
    x, out = torch.randn(16, 128)[:, :64], torch.empty(16, 64)
    plan(x, out)
    first, second = cuda.launches()
    assert cuda.lines("allocate") == ["allocate 4096 cuda:0"]
    assert (first.grid, second.grid) == ((16, 1, 1), (2, 1, 1))
    hidden = next(value for value in first.parameters if value > 2**32 and value != x.data_ptr())
    assert sorted(first.parameters) == sorted([x.data_ptr(), hidden, 16, 128])
    assert sorted(second.parameters) == sorted([hidden, mask.data_ptr(), out.data_ptr(), 2])


def test_what_only_a_call_can_tell(cuda):
    """Ten rows are no whole blocks of eight: the plan refuses them, and launches nothing."""
    plan = plan_of(cuda, two_kernels(torch.randn(64)), x="tensor", out="tensor")
    with pytest.raises(ValueError, match="twice: x of add must have the extent of its kernel in dimension 0; got 10; check"):
        plan(torch.randn(10, 64), torch.empty(10, 64))
    with pytest.raises(ValueError, match=r"twice: out must have shape \(16, 64\) beside the other arguments; got \(8, 64\)"):
        plan(torch.randn(16, 64), torch.empty(8, 64))
    assert cuda.launches() == []


def test_a_kernel_is_compiled_once(cuda):
    recorder = two_kernels(torch.randn(64))
    assert len(recorder.cubins) == 2
    n = shape("x", 0)
    recorder.compile(double, 64)(View("x", "float32", (n, 64), (64, 1)), recorder.empty(n, 64, dtype="float32"))
    assert len(recorder.cubins) == 2
    assert [step["cubin"] for step in recorder.variant([], (1, 1))["steps"]] == [0, 1, 0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (("float32", (4, 65)), ("float32", (4, 64)), "x of double must have extent 64 in dimension 1; got 65; check the"),
        (("float32", (4, 64)), ("float32", (5, 64)), "y of double must have extent 4 in dimension 0; got 5; check the"),
        (("float16", (4, 64)), ("float32", (4, 64)), "x of double must be float32 with 2 dimensions; got float16"),
        (
            ("float32", (4, 8, 8)),
            ("float32", (4, 64)),
            r"x of double must be float32 with 2 dimensions; got float32 \(4, 8, 8\); reshape",
        ),
    ],
)
def test_what_is_known_is_checked_at_once(cuda, x, y, message):
    recorder = Recorder("once", "sm_90a")
    views = [recorder.empty(*shape, dtype=dtype) for dtype, shape in (x, y)]
    with pytest.raises(ValueError, match="once: " + message):
        recorder.compile(double, 64)(*views)


def test_strides_and_alignment_of_a_kernel(cuda):
    recorder = Recorder("once", "sm_90a")
    turned = View("x", "float32", (64, 64), (1, 64))
    with pytest.raises(ValueError, match="x of double must have stride 1 in dimension 1; got 64; check"):
        recorder.compile(double, 64)(turned, recorder.empty(64, 64, dtype="float32"))
    loose = recorder.argument("x", "float32", (64, 64), alignment=4)
    with pytest.raises(ValueError, match="x of double must start at a multiple of 16 bytes; got an argument of 4; demand it"):
        recorder.compile(double, 64)(loose, recorder.empty(64, 64, dtype="float32"))


def test_as_many_views_as_parameters(cuda):
    recorder = Recorder("once", "sm_90a")
    with pytest.raises(TypeError, match="double: must be launched with 2 tensors; got 1; pass x, y"):
        recorder.compile(double, 64)(recorder.empty(4, 64, dtype="float32"))


# --- views ----------------------------------------------------------------------------------------------------------

VIEWS = {
    "view": lambda x: x.view(-1, 12),
    "unflatten": lambda x: x.unflatten(1, (3, -1)),
    "unflatten of the last": lambda x: x.unflatten(2, (2, -1)),
    "flatten": lambda x: x.flatten(),
    "flatten of two": lambda x: x.flatten(0, 1),
    "flatten of the last two": lambda x: x.flatten(1),
}


@pytest.mark.parametrize("change", VIEWS.values(), ids=VIEWS)
def test_views_are_those_of_torch(change):
    real = change(torch.empty(5, 6, 4))
    view = change(View("x", "float32", (5, 6, 4), (24, 4, 1)))
    assert (view.shape, view.strides) == (tuple(real.shape), real.stride())
    rows = shape("x", 0)
    unknown = change(View("x", "float32", (rows, 6, 4), (24, 4, 1)))
    assert [evaluate(extent, lambda *fact: 5) for extent in unknown.shape] == list(real.shape)


def test_a_view_that_torch_would_copy():
    with pytest.raises(ValueError, match="x: must be contiguous in a plan; got strides"):
        View("x", "float32", (4, 4), (1, 4)).contiguous()
    view = View("x", "float32", (shape("x", 0), 4), (4, 1))
    assert view.contiguous() is view
    assert fact("rank", "x").recipe == ["rank", "x"]
