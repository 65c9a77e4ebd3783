"""Calls that leave torch's dispatcher out: who would miss the operator, and calls that repeat one another."""

import pytest
import torch
from launch.fakes import FakeCuda, launch, tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilelang_ext.launch.expression import recipe_of, shape


class SeesDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class OfTheirOwn(torch.Tensor):
    pass


@pytest.fixture(params=[False, True], ids=["tensors read directly", "by the exchange"])
def cuda(request):
    return FakeCuda(by_exchange=request.param)


def doubles(cuda, **variant):
    """A plan (x, out) of one kernel, for rows of 8."""
    n = shape("x", 0)
    rules = [tensor("x", [None, 8], strides=[None, 1]), tensor("out", [n.recipe, 8], strides=[8, 1])]
    step = launch("double_kernel", [["pointer", "x", 0], ["pointer", "out", 0], ["int32", ["stride", "x", 0]]])
    variant = {"tensors": rules, "steps": [{**step, "grid": [n.recipe, 1, 1]}], "sizes": [1, 99], **variant}
    return cuda.plan("double", {"x": "tensor", "out": "tensor"}, variant, size=recipe_of(n))


def pair(rows=4):
    return torch.randn(rows, 8), torch.empty(rows, 8)


def test_plain_tensors_are_launched(cuda):
    plan, (x, out) = doubles(cuda), pair()
    assert plan.launch_directly(x, out) is True
    assert plan.launch_directly(torch.nn.Parameter(x, requires_grad=False), out) is True
    with torch.inference_mode():
        assert plan.launch_directly(*pair()) is True
    with torch.autocast("cpu"):
        assert plan.launch_directly(x, out) is True
    assert [done.parameters[2] for done in cuda.launches()] == [8] * 4


OBSERVERS = {
    "a dispatch mode": SeesDispatch,
    "fake tensors": FakeTensorMode,
    "a function mode": SeesFunctions,
    "a default device": lambda: torch.device("cpu"),
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_who_looks_at_operators_sees_them(cuda, observer):
    plan, given = doubles(cuda), pair()
    with observer():
        assert plan.launch_directly(*given) is False
    assert plan.launch_directly(*given) is True
    assert len(cuda.launches()) == 1


def test_transforms_and_traces_see_operators(cuda):
    plan, (x, out) = doubles(cuda), pair()
    answers = []

    def function(x):
        answers.append(plan.launch_directly(x, out))
        return x + 1

    torch.vmap(function)(torch.randn(2, 4, 8))
    torch.func.functionalize(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    make_fx(function)(x)
    torch.jit.trace(function, x, check_trace=False)
    assert answers == [False] * 5
    assert cuda.launches() == []


def test_gradients(cuda):
    plan, (x, out) = doubles(cuda), pair()
    wanted = x.clone().requires_grad_()
    assert plan.launch_directly(wanted, out) is False
    assert plan.launch_directly(x, out.requires_grad_()) is False
    with torch.no_grad():
        assert plan.launch_directly(wanted, out) is True


def test_what_the_operator_answers(cuda):
    """Other tensors and numbers of arguments, other sizes, memory that a rule refuses: nothing is launched, nothing raised."""
    plan, (x, out) = doubles(cuda), pair()
    wide = torch.randn(8, 8).t()
    for given in ((x.as_subclass(OfTheirOwn), out), (x,), (x, None), (x, 3), (wide[:4], out), pair(100), (x.half(), out)):
        assert plan.launch_directly(*given) is False
    assert cuda.launches() == []


def test_a_failed_launch_is_an_error(cuda):
    plan, given = doubles(cuda), pair()
    cuda.driver.fake_fail(b"cuLaunchKernelEx", 700)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx must succeed; got CUDA_ERROR_ILLEGAL_ADDRESS"):
        plan.launch_directly(*given)


def test_members_stand_for_integers(cuda):
    """An enum's member is told by identity, and nothing else is taken: an integer, or the member of another enum."""
    one, two = object(), object()
    recipe = {"name": "m", "arguments": [{"name": "x", "type": "tensor"}, {"name": "kind", "type": "int"}]}
    plan = cuda.launcher.plan({**recipe, "key": [["value", "kind"]], "size": 0}, {"kind": {one: 1, None: 2}})
    x = torch.randn(4)
    assert plan.key(x, one) == ([1], 0)
    assert plan.key(x, None) == ([2], 0)
    for other in (two, 1):
        with pytest.raises(TypeError, match="m: kind must be one of 2 objects; got another; see the operator's"):
            plan.launch(x, other)
        assert plan.launch_directly(x, other) is False


def test_keywords(cuda):
    with pytest.raises(TypeError, match="plan: must be called with positional arguments; got keywords; pass them in order"):
        doubles(cuda)(*pair(), fast=True)


# --- calls that repeat one another ----------------------------------------------------------------------------------


def test_repeated_calls_launch_the_same(cuda):
    plan, given = doubles(cuda), pair()
    for _ in range(3):
        plan(*given)
    assert len(set(map(str, cuda.launches()))) == 1
    assert len(cuda.launches()) == 3


def test_the_same_memory_in_other_ways(cuda):
    """Tensors at one address: what differs in shape, stride, dtype, device or stream is another call."""
    plan, (x, out) = doubles(cuda), pair(8)
    plan(x, out)
    plan(x[:4], out[:4])
    plan(x[::2], out[:4])
    cuda.driver.fake_stream(0x50)
    plan(x, out)
    cuda.driver.fake_device(1)
    plan(x, out)
    got = [(done.grid[0], done.parameters[2], done.stream, done.context) for done in cuda.launches()]
    assert got == [(8, 8, 0, 0), (4, 8, 0, 0), (4, 16, 0, 0), (8, 8, 0x50, 0), (8, 8, 0x50, 1)]
    with pytest.raises(TypeError, match="double: x must be float32; got int32; convert it"):
        plan(x.view(torch.int32), out)
    with pytest.raises(ValueError, match=r"double: out must have strides \(8, 1\) for shape \(4, 8\); got \(16, 1\)"):
        plan(x[:4], out[::2])


def test_tensors_that_change_in_place(cuda):
    plan, (x, out) = doubles(cuda), pair(8)
    plan(x, out)
    x.resize_(4, 8)
    with pytest.raises(ValueError, match=r"double: out must have shape \(4, 8\) beside the other arguments; got \(8, 8\)"):
        plan(x, out)
    x.set_(torch.randn(8, 8))
    plan(x, out)
    assert [done.parameters[0] == x.data_ptr() for done in cuda.launches()] == [False, True]


def test_a_variant_that_is_added_is_used(cuda):
    plan, given = doubles(cuda), pair()
    plan(*given)
    newer = launch("newer_kernel", [["pointer", "x", 0]])
    cuda.add(plan, {"tensors": [tensor("x", [None, 8]), tensor("out", [None, 8])], "steps": [newer], "sizes": [1, 99]})
    plan(*given)
    assert [done.kernel for done in cuda.launches()] == ["double_kernel", "newer_kernel"]


def test_more_calls_than_are_kept(cuda):
    plan, memory, out = doubles(cuda), torch.randn(3000, 8), torch.empty(1, 8)
    for row in (*range(0, 3000, 2), 0, 2):
        plan(memory[row : row + 1], out)
    assert [done.parameters[0] for done in cuda.launches()[-2:]] == [memory.data_ptr(), memory[2:].data_ptr()]


def test_tensors_without_memory(cuda):
    plan, (_, out) = doubles(cuda), pair()
    with pytest.raises((TypeError, ValueError), match=r"double: x must (have memory|be a torch.Tensor with memory); got"):
        plan(torch.empty(4, 8, device="meta"), out)
    assert cuda.launches() == []
