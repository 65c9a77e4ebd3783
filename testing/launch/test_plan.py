"""Plans on a driver that writes down what it is told: what is launched, what is refused, which variant a call has."""

import gc
import re
import weakref

import pytest
import torch
from launch.fakes import cubin, launch, tensor
from launch.plan_parts import addresses, nine_tensors, of_x, one_kernel, recipe, tensors

from tilelang_ext.launch.expression import fact, recipe_of, shape
from tilelang_ext.launch.plan import Launcher

# --- launches -------------------------------------------------------------------------------------------------------


def test_one_launch(cuda):
    given = tensors()
    assert nine_tensors(cuda)(*given) is None
    [done] = cuda.launches()
    assert done.kernel == "add_kernel"
    assert (done.grid, done.block, done.shared, done.attributes) == ((3, 2, 1), (128, 1, 1), 4096, {})
    assert done.parameters == [*addresses(given), 20]
    assert (done.stream, done.context) == (0, 0)


def test_module_is_loaded_once(cuda):
    plan = nine_tensors(cuda)
    for rows in (8, 9, 8):
        plan(*tensors(rows))
    assert [done.grid[0] for done in cuda.launches()] == [1, 2, 1]
    assert len(cuda.lines("load")) == 1
    assert cuda.lines("attribute") == ["attribute add_kernel 8 4096"]


def test_slices_start_where_they_start(cuda):
    given = tensors()
    given[3] = torch.randn(24, 64)[4:]
    nine_tensors(cuda)(*given)
    assert cuda.launches()[0].parameters[3] == given[3].data_ptr()


def test_current_stream(cuda):
    plan, given = nine_tensors(cuda), tensors()
    cuda.driver.fake_stream(0xABC0)
    plan(*given)
    assert cuda.launches()[0].stream == 0xABC0


def test_another_device_and_the_current_one_stays(cuda):
    plan, given = nine_tensors(cuda), tensors()
    cuda.driver.fake_device(2)
    plan(*given)
    plan.bind(*given)()
    assert [done.context for done in cuda.launches()] == [2, 2]
    assert cuda.driver.fake_current() == -1  # the fake's stack is one deep; each push had its pop
    assert len(cuda.lines("push")) == len(cuda.lines("pop")) == 2


def test_empty_grid_is_no_launch(cuda):
    plan = nine_tensors(cuda)
    plan(*tensors(0))
    assert cuda.launches() == []


def test_cluster_and_pdl(cuda):
    second = launch("two_kernel", [["pointer", "x", 64]], pdl=1)
    plan = of_x(cuda, [one_kernel(["pointer", "x", 0], cluster=[2, 1, 1], pdl=1), second])
    x = torch.randn(64)
    plan(x)
    one, two = cuda.launches()
    assert one.attributes == {4: (2, 1, 1), 6: (1, 0, 0)}
    assert {id: values[0] for id, values in two.attributes.items()} == {6: 1}
    assert two.parameters == [x.data_ptr() + 64]


def test_clusters_past_the_portable_size(cuda):
    of_x(cuda, [one_kernel(cluster=[16, 1, 1])])(torch.randn(4))
    assert cuda.lines("attribute") == ["attribute one_kernel 14 1"]


def test_scalars(cuda):
    n, f = ["value", "n"], ["value", "f"]
    step = one_kernel(["int32", n], ["int64", n], ["float32", f], ["float64", f])
    arguments = {"x": "tensor", "n": "int", "f": "float"}
    plan = cuda.plan("x", arguments, {"tensors": [tensor("x", [None])], "steps": [step]})
    x = torch.randn(4)
    plan(x, -2, 1.5)
    assert cuda.launches()[0].parameters == [2**32 - 2, 2**64 - 2, 0x3FC00000, 0x3FF8000000000000]
    with pytest.raises(ValueError, match=r"sizes must fit the kernel's integers of 4 bytes; got 4294967296 for parameter 0"):
        plan(x, 2**32, 1.5)
    with pytest.raises(TypeError, match="x: n must be an integer below 2"):
        plan(x, "3", 1.5)
    with pytest.raises(TypeError, match="x: f must be a number; got something else; convert it"):
        plan(x, 3, None)
    assert len(cuda.launches()) == 1


def test_fill(cuda):
    plan = of_x(cuda, [{"fill": "x", "bytes": recipe_of(shape("x", 0) * 4), "byte": 0}])
    x = torch.randn(12)
    plan(x)
    assert cuda.lines("fill") == [f"fill {x.data_ptr():x} 0 48 stream 0"]


def test_constants_are_kept(cuda):
    mask = torch.ones(4, dtype=torch.int32)
    address = mask.data_ptr()
    variant = {"tensors": [tensor("x", [None])], "constants": ["mask"], "steps": [one_kernel(["pointer", "mask", 0])]}
    plan = cuda.plan("x", {"x": "tensor"}, variant, constants=[mask])
    del mask
    gc.collect()
    others = [torch.ones(4, dtype=torch.int32) for _ in range(100)]  # one would take the memory, were it free
    plan(torch.randn(4))
    assert cuda.launches()[0].parameters == [address]
    assert address not in addresses(others)


# --- rules ----------------------------------------------------------------------------------------------------------


def changed(index, x):
    given = tensors()
    given[index] = x
    return given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            tensors()[:8],
            TypeError,
            r"add: must be called with 9 arguments \(x0, .*, x8\); got 8; pass each of",
        ),
        (changed(2, None), TypeError, "add: x2 must be a torch.Tensor; got None; pass one"),
        (changed(2, [1.0]), TypeError, "add: x2 must be a torch.Tensor with memory; got something else; pass one"),
        (changed(1, torch.zeros(20, 64, dtype=torch.float16)), TypeError, "add: x1 must be float32; got float16; convert it"),
        (changed(1, torch.zeros(20, 8, 8)), ValueError, r"add: x1 must have 2 dimensions; got shape \(20, 8, 8\); reshape it"),
        (changed(0, torch.zeros(20, 65)), ValueError, r"add: x0 must have shape \(20, 64\) beside the other.*; got \(20, 65\)"),
        (changed(7, torch.zeros(21, 64)), ValueError, r"add: x7 must have shape \(20, 64\) beside .*; got \(21, 64\); check"),
        (
            changed(7, torch.zeros(64, 20).t()),
            ValueError,
            r"add: x7 must have strides \(64, 1\) for shape .*; got \(1, 20\)",
        ),
        (
            changed(5, torch.zeros(2000)[1:1281].view(20, 64)),
            ValueError,
            "add: x5 must start at a multiple of 16 bytes; got",
        ),
    ],
)
def test_rules(cuda, given, error, message):
    plan = nine_tensors(cuda)
    for call in (lambda: plan(*given), lambda: plan.bind(*given)):
        with pytest.raises(error, match=message):
            call()
    assert cuda.launches() == []


def test_tensors_of_the_cpu_are_refused(cuda):
    cuda.driver.fake_device(-1)
    with pytest.raises(ValueError, match="add: x0 must be on an NVIDIA GPU; got a tensor on cpu; move it"):
        nine_tensors(cuda)(*tensors())


def test_one_device(cuda):
    plan, given = nine_tensors(cuda), tensors()
    cuda.driver.fake_elsewhere(given[4].data_ptr(), 1)
    with pytest.raises(ValueError, match="add: x4 must be on cuda:0 as x0 is; got cuda:1; move it"):
        plan(*given)
    assert cuda.launches() == []


def test_stride_of_one_element_is_free(cuda):
    given = tensors(1)
    given[3] = torch.randn(2, 128)[:1, :64]
    nine_tensors(cuda)(*given)
    assert len(cuda.launches()) == 1


def test_requirements(cuda):
    rows = shape("x", 0)
    even = {"that": recipe_of(rows % 2 == 0), "got": recipe_of(rows), "rule": "rows must be even", "hint": "pad x"}
    plan = of_x(cuda, requirements=[even])
    plan(torch.randn(4))
    with pytest.raises(ValueError, match="x: rows must be even; got 3; pad x"):
        plan(torch.randn(3))


def test_tensors_without_a_rule_must_be_none(cuda):
    plan = cuda.plan("x", {"x": "tensor", "bias": "tensor"}, {"tensors": [tensor("x", [None])], "steps": []})
    plan(torch.randn(4), None)
    with pytest.raises(ValueError, match="must be called with the 1 tensors that it was prepared for; got 2; pass None"):
        plan(torch.randn(4), torch.randn(4))


# --- bind -----------------------------------------------------------------------------------------------------------


def test_bound_launches_the_same(cuda):
    plan, given = nine_tensors(cuda), tensors()
    bound = plan.bind(*given)
    assert cuda.launches() == []
    plan(*given)
    assert bound() is None
    first, second = cuda.launches()
    assert first == second


def test_bound_keeps_its_tensors(cuda):
    given = tensors()
    wanted, storages = addresses(given), [weakref.ref(x.untyped_storage()) for x in given]
    bound = nine_tensors(cuda).bind(*given)
    del given
    gc.collect()
    again = tensors()  # would take the memory, were it free
    bound()
    assert cuda.launches()[0].parameters[:9] == wanted
    assert not set(wanted) & set(addresses(again))
    del bound, storages


# --- variants -------------------------------------------------------------------------------------------------------


def test_variants_by_key_and_size(cuda):
    rows = shape("x", 0)
    key = recipe(rows % 2, fact("present", "bias"), fact("value", "fast"))

    def variant(first, last, *key):
        rules = [tensor("x", [None]), *([tensor("bias", [1])] if key[1] else [])]
        step = launch("_".join(map(str, ("kernel", first, *key))), [["pointer", "x", 0]])
        return {"key": list(key), "sizes": [first, last], "tensors": rules, "steps": [step]}

    arguments = {"x": "tensor", "bias": "tensor", "fast": "int"}
    plan = cuda.plan("x", arguments, variant(4, 8, 0, 0, 0), key=key, size=recipe_of(rows))
    cuda.add(plan, variant(9, 99, 0, 0, 0))
    cuda.add(plan, variant(1, 99, 1, 1, 1))
    plan(torch.randn(4), None, False)
    plan(torch.randn(10), None, False)
    plan(torch.randn(9), torch.randn(1), True)
    plan(torch.randn(8), None, 0)
    assert [done.kernel for done in cuda.launches()] == ["kernel_4_0_0_0", "kernel_9_0_0_0", "kernel_1_1_1_1", "kernel_4_0_0_0"]
    for missing, wanted in (((torch.randn(2), None, 0), "[0, 0, 0] and size 2"), ((torch.randn(100), None, 1), "[0, 0, 1]")):
        assert plan.launch(*missing) is False
        with pytest.raises(LookupError, match="a plan must have a variant for .*; got none for key " + re.escape(wanted)):
            plan(*missing)
        with pytest.raises(LookupError, match="a plan must have a variant for .*; got none for key " + re.escape(wanted)):
            plan.bind(*missing)
    assert plan.key(torch.randn(7), torch.randn(1), True) == ([1, 1, 1], 7)
    with pytest.raises(ValueError, match="the key of a variant must have 3 values; got 2"):
        cuda.add(plan, {**variant(4, 8, 0, 0, 0), "key": [4, 0]})


def test_texts_and_floats_in_keys(cuda):
    arguments = {"kind": "str", "alpha": "float", "x": "tensor"}
    key = recipe(fact("value", "kind"), fact("value", "alpha"))
    plan = cuda.plan("x", arguments, {"key": [0, 0], "tensors": [], "steps": []}, key=key)
    x, calls = torch.randn(4), (("fp8", 1.0), ("fp8", 1.5), ("mxfp8", 1.0), ("", 1.0))
    keys = [tuple(plan.key(kind, alpha, x)[0]) for kind, alpha in calls]
    assert len(set(keys)) == 4
    assert tuple(plan.key("f" + "p8", 1, x)[0]) == keys[0]


def test_a_variant_replaces_those_that_it_covers(cuda):
    rules, size = [tensor("x", [None])], recipe_of(shape("x", 0))
    plan = cuda.plan("x", {"x": "tensor"}, {"sizes": [1, 8], "tensors": rules, "steps": [launch("old_kernel", [])]}, size=size)
    for name, sizes in (("large_kernel", [5, 100]), ("new_kernel", [1, 8])):
        cuda.add(plan, {"sizes": sizes, "tensors": rules, "steps": [launch(name, [])]})
    for rows in (4, 6, 9):
        plan(torch.randn(rows))
    assert [done.kernel for done in cuda.launches()] == ["new_kernel", "new_kernel", "large_kernel"]


# --- errors of the driver -------------------------------------------------------------------------------------------


def test_without_a_driver(cuda):
    plan = Launcher("libcuda_of_no_machine.so", *cuda.torch).plan(
        {"name": "add", "arguments": [{"name": "x", "type": "tensor"}], "key": [], "size": 0}
    )
    plan.add(
        {"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [tensor("x", [None])], "steps": []}, [cubin("sm_90a", {})]
    )
    with pytest.raises(RuntimeError, match=r"add: needs the NVIDIA driver; got libcuda_of_no_machine.so: .*; run it on"):
        plan(torch.randn(4))


def test_failed_launch(cuda):
    plan = nine_tensors(cuda)
    cuda.driver.fake_fail(b"cuLaunchKernelEx", 700)
    message = (
        r"add: add_kernel of grid \(3, 2, 1\), block \(128, 1, 1\), 4096 bytes of shared memory: cuLaunchKernelEx must "
        r"succeed; got CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"
    )
    with pytest.raises(RuntimeError, match=message):
        plan(*tensors())


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuModuleLoadData"])
def test_failed_preparation_is_tried_again(cuda, call):
    plan = nine_tensors(cuda)
    cuda.driver.fake_fail(call.encode(), 2)
    with pytest.raises(RuntimeError, match=rf"add: {call} must succeed; got an unknown error \(2\)"):
        plan(*tensors())
    cuda.driver.fake_fail(b"", 0)
    plan(*tensors())
    assert len(cuda.launches()) == 1


def test_a_device_that_is_not_there(cuda):
    cuda.driver.fake_device(9)
    with pytest.raises(RuntimeError, match=r"add: cuDeviceGet must succeed; got an unknown error \(101\)"):
        nine_tensors(cuda)(*tensors())
