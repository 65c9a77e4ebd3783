"""Plans on a driver that writes down what it is told: what is launched, what is refused, memory, threads, capture."""

import ctypes
import gc
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch.fakes import FakeCuda, cubin, launch, tensor

from tilelang_ext.launch import expression
from tilelang_ext.launch import plan as plans
from tilelang_ext.launch.expression import OPERATORS, ceildiv, evaluate, fact, recipe_of, shape
from tilelang_ext.launch.plan import Launcher

NINE = [f"x{i}" for i in range(9)]


@pytest.fixture
def cuda():
    return FakeCuda()


def of_x(cuda, steps=(), **variant):
    """A plan of one tensor x, of one dimension."""
    return cuda.plan("x", {"x": "tensor"}, {"tensors": [tensor("x", [None])], "steps": list(steps), **variant})


def one_kernel(*parameters, **others):
    return launch("one_kernel", list(parameters), **others)


def recipe(*parts):
    return [recipe_of(part) for part in parts]


def nine_tensors(cuda):
    """A kernel of nine tensors (n, 64), a block for each 8 rows, and n."""
    n = shape("x0", 0)
    rules = [tensor(name, [None if name == "x0" else n.recipe, 64], strides=[64, 1]) for name in NINE]
    parameters = [*(["pointer", name, 0] for name in NINE), ["int32", n.recipe]]
    step = launch("add_kernel", parameters, recipe(ceildiv(n, 8), 2, 1), shared_bytes=4096)
    return cuda.plan("add", dict.fromkeys(NINE, "tensor"), {"tensors": rules, "steps": [step]})


def tensors(rows=20):
    return [torch.randn(rows, 64) for _ in NINE]


def addresses(given):
    return [x.data_ptr() for x in given]


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


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built_for", ["sm_90", "sm_80", "sm_100a"])
def test_binary_of_another_target(cuda, built_for):
    plan = nine_tensors(cuda)
    variant = {"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [], "steps": []}
    with pytest.raises(ValueError, match=f"add: binary must be for sm_90a; got one whose ELF says {built_for}; compile it for"):
        plan.add(variant, [cubin(built_for, {})])
    with pytest.raises(ValueError, match=r"add: binary must be a cubin whose ELF proves its arch.*; got one that is no ELF"):
        plan.add(variant, [b"// .target sm_90a"])


def test_plain_target_takes_no_specific_binary(cuda):
    with pytest.raises(ValueError, match="binary must be for sm_90; got one whose ELF says sm_90a"):
        nine_tensors(cuda).add(
            {"key": [], "sizes": [0, 0], "target": "sm_90", "tensors": [], "steps": []}, [cubin("sm_90a", {})]
        )


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [("sm_90a", 90, True), ("sm_90a", 100, False), ("sm_80", 89, True), ("sm_89", 80, False), ("sm_80", 90, False)],
)
def test_compute_capability(cuda, arch, capability, runs):
    cuda.driver.fake_capability(capability)
    variant = {"tensors": [tensor("x", [None])], "steps": [launch("one_kernel", [["pointer", "x", 0]])]}
    plan = cuda.plan("x", {"x": "tensor"}, variant, arch=arch)
    if runs:
        plan(torch.randn(4))
    else:
        with pytest.raises(RuntimeError, match=f"kernels for {arch} must run on compute capability"):
            plan(torch.randn(4))
    assert len(cuda.launches()) == runs


@pytest.mark.parametrize("sizes", [{"one_kernel": [8, 8]}, {"one_kernel": [4]}, {"two_kernel": [8]}])
def test_binary_of_another_kernel(cuda, sizes):
    plan, step = of_x(cuda), one_kernel(["pointer", "x", 0])
    variant = {"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [tensor("x", [None])], "steps": [step]}
    with pytest.raises(ValueError, match=r"binary must have kernel one_kernel with parameters of bytes \(8,\); got one"):
        plan.add(variant, [cubin("sm_90a", sizes)])


# --- TMA descriptors ------------------------------------------------------------------------------------------------


def with_descriptor(cuda):
    """A descriptor of x (n, 128) by tiles of 64 rows, and of its half of the columns from 64 on."""
    tensor_map = {
        "of": "x",
        "offset": 0,
        "dtype": 7,
        "extents": recipe(128, shape("x", 0)),
        "strides": recipe(shape("x", 1) * 4),
        "box": [32, 64],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 3,
        "l2_promotion": 2,
        "fill": 0,
    }
    parameters = [["tensor_map", tensor_map], ["int32", 1], ["tensor_map", {**tensor_map, "offset": 256}]]
    variant = {"tensors": [tensor("x", [None, 128], strides=[128, 1])], "steps": [launch("one_kernel", parameters)]}
    return cuda.plan("x", {"x": "tensor"}, variant)


def test_descriptors_are_encoded_once_an_address_and_shape(cuda):
    plan, x, y = with_descriptor(cuda), torch.randn(20, 128), torch.randn(20, 128)
    calls = (x, x, y, x[:10], x, y)
    for called in calls:
        plan(called)
    encoded = [(line.split()[4], line.split()[7]) for line in cuda.lines("encode")]
    starts = [(x, 20), (y, 20), (x, 10)]
    assert encoded == [(f"{a.data_ptr() + offset:x}", str(rows)) for a, rows in starts for offset in (0, 256)]
    for called, done in zip(calls, cuda.launches(), strict=True):
        first, one, second = done.parameters
        assert (first, one) == (called.data_ptr() | 128 << 64 | len(called) << 128, 1)
        assert second == (called.data_ptr() + 256) | 128 << 64 | len(called) << 128


def test_descriptor_as_it_is_encoded(cuda):
    x = torch.randn(20, 128)
    with_descriptor(cuda)(x)
    wanted = f"encode dtype 7 address {x.data_ptr():x} extents 128 20 strides 512 box 32 64"
    assert cuda.lines("encode")[0] == f"{wanted} swizzle 3 interleave 0 promotion 2 fill 0"


def test_descriptor_of_nothing(cuda):
    with pytest.raises(RuntimeError, match=r"extents above 0 .*; got address % 16 = 0, extents \(128, 0\), strides in bytes"):
        with_descriptor(cuda)(torch.randn(0, 128))
    assert cuda.launches() == []


# --- workspace ------------------------------------------------------------------------------------------------------


def with_workspace(cuda, name="x", scale=1):
    """Two kernels, with x's bytes and 100 bytes between them."""
    slots = [{"name": "hidden", "bytes": recipe_of(shape("x", 0) * 4 * scale)}, {"name": "count", "bytes": 100}]
    steps = [
        launch("one_kernel", [["pointer", "x", 0], ["pointer", "hidden", 0], ["pointer", "count", 0]]),
        launch("two_kernel", [["pointer", "hidden", 8], ["pointer", "count", 0]]),
    ]
    return cuda.plan(name, {"x": "tensor"}, {"tensors": [tensor("x", [None])], "workspace": slots, "steps": steps})


def test_workspace_is_allocated_once_a_stream(cuda):
    plan, other = with_workspace(cuda), with_workspace(cuda, "y")
    small, large = torch.randn(64), torch.randn(640)
    for x in (large, small, large):
        plan(x)
    other(large)
    plan.bind(large)()
    assert cuda.lines("allocate") == ["allocate 2816 cuda:0"]  # 2560 and 100, each whole 256s
    one, two = cuda.launches()[:2]
    assert one.parameters == [large.data_ptr(), base := one.parameters[1], base + 2560]
    assert two.parameters == [base + 8, base + 2560]
    assert {done.parameters[1] for done in cuda.launches() if done.kernel == "one_kernel"} == {base}
    cuda.driver.fake_stream(0x50)
    plan(small)
    plan.bind(large)()  # which grows it
    assert cuda.lines("allocate")[1:] == ["allocate 512 cuda:0", "allocate 2816 cuda:0"]
    cuda.launcher.free_workspaces()
    plan(small)
    assert cuda.lines("allocate")[3:] == ["allocate 512 cuda:0"]


def test_bound_follows_the_stream(cuda):
    x = torch.randn(640)
    bound = with_workspace(cuda).bind(x)
    bases = []
    for stream in (0, 0x50, 0, 0x50):
        cuda.driver.fake_stream(stream)
        bound()
        one, two = cuda.launches()[-2:]
        assert one.stream == two.stream == stream
        assert two.parameters[0] == one.parameters[1] + 8
        bases.append(one.parameters[1])
    assert bases[0] == bases[2] != bases[1] == bases[3]
    assert len(cuda.lines("allocate")) == 2


def test_captured_calls_have_memory_of_their_own(cuda):
    plan, x = with_workspace(cuda), torch.randn(640)
    bound = plan.bind(x)
    cuda.driver.fake_stream(0x50)
    plan(x)
    eager = cuda.launches()[0].parameters[1]
    cuda.driver.fake_capture(0x50)
    plan(x)
    bound()
    assert len(cuda.lines("allocate")) == 3
    assert eager not in {done.parameters[1] for done in cuda.launches()[2::2]}
    cuda.driver.fake_capture(None)
    bound()
    plan(x)
    assert len(cuda.lines("allocate")) == 3
    assert [done.parameters[1] for done in cuda.launches()[6::2]] == [eager, eager]


def test_a_module_is_loaded_while_a_stream_is_captured(cuda):
    """Its thread may do what a capture forbids only while it loads."""
    assert cuda.driver.fake_capture_mode() == 0
    cuda.driver.fake_capture(0x50)
    with_workspace(cuda)(torch.randn(640))
    assert cuda.launches()
    assert cuda.driver.fake_capture_mode() == 0
    cuda.driver.fake_capture(None)


def test_memory_that_torch_has_not(cuda):
    plan = with_workspace(cuda)
    cuda.driver.fake_fail(b"allocate", 1)
    with pytest.raises(RuntimeError, match=r"x: needs 512 bytes of workspace on cuda:0; got OutOfMemoryError: CUDA"):
        plan(torch.randn(64))
    cuda.driver.fake_fail(b"", 0)
    plan(torch.randn(64))
    assert len(cuda.launches()) == 2


def test_threads_do_not_mix_their_kernels(cuda):
    """Calls of several threads on one stream share its workspace: all kernels of a call are enqueued before another's."""
    plan, failures = with_workspace(cuda), []

    def work(seed):
        try:
            drawn = random.Random(seed)
            for _ in range(200):
                plan(torch.randn(drawn.choice((64, 640))))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    done = cuda.launches()
    assert [launched.kernel for launched in done] == ["one_kernel", "two_kernel"] * 800
    assert all(two.parameters[0] == one.parameters[1] + 8 for one, two in zip(done[::2], done[1::2], strict=True))


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


# --- without tilelang -----------------------------------------------------------------------------------------------

ALONE = """
import importlib.util, sys
sys.modules.update(dict.fromkeys(("tilelang", "tvm", "tilelang_ext")))  # importing one fails
spec = importlib.util.spec_from_file_location("plan", sys.argv[1])
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)
import torch
arguments = [{"name": "x", "type": "tensor"}]
made = plan.Launcher("libcuda_of_no_machine.so").plan({"name": "add", "arguments": arguments, "key": [], "size": 0})
rule = {"name": "x", "dtype": "float32", "shape": [None], "strides": None}
made.add({"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [rule]}, [])
try:
    made(torch.zeros(4))
except ValueError as error:
    print(error)
"""


def test_torch_and_tvm_ffi_are_enough(tmp_path):
    """A folder with this file and the library, as an export has it, loads where there is no tilelang and no GPU."""
    for path, folder in ((Path(plans.__file__), "launch"), (plans.find_library(), "lib")):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "launch" / "plan.py"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "add: x must be on an NVIDIA GPU; got a tensor on cpu; move it\n"


# --- recipes and expressions ----------------------------------------------------------------------------------------


def test_recipes_are_json(cuda):
    """What is exported is what is read back."""
    given = torch.randn(20, 128)
    plan = with_descriptor(cuda)
    assert json.loads(json.dumps(plan.recipe)) == plan.recipe
    plan(given)


FACTS = {"a": 5, "b": -3, "c": 0}
leaves = st.integers(-(2**20), 2**20) | st.sampled_from([["value", name] for name in FACTS])


def operations(operands):
    by_count = {count: sorted(name for name in OPERATORS if OPERATORS_TAKE[name] == count) for count in (1, 2, 3)}
    return st.one_of(*(st.tuples(st.sampled_from(names), *[operands] * count).map(list) for count, names in by_count.items()))


OPERATORS_TAKE = {name: 3 if name == "select" else 1 if name in ("not", "power_of_two") else 2 for name in OPERATORS}


@settings(max_examples=300)
@given(st.recursive(leaves, operations, max_leaves=12), st.integers(-(2**20), 2**20))
def test_expressions_mean_the_same_natively(written, b):
    facts = {**FACTS, "b": b}
    cuda = FakeCuda()
    arguments = {"x": "tensor", **dict.fromkeys(FACTS, "int")}
    variant = {"tensors": [tensor("x", [None])], "steps": [launch("one_kernel", [["int64", written]])]}
    plan = cuda.plan("x", arguments, variant)
    try:
        wanted = evaluate(written, lambda kind, name: facts[name])
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="a divisor must not be 0"):
            plan(torch.randn(1), *facts.values())
        return
    if not -(2**62) < wanted < 2**62:
        return
    plan(torch.randn(1), *facts.values())
    assert ctypes.c_int64(cuda.launches()[0].parameters[0]).value == wanted


def test_expressions_fold():
    n = shape("x", 0)
    assert ceildiv(100, 8) == 13
    assert (n * 1 + 0).recipe == ["shape", "x", 0]
    assert (2 * (n - 1)).recipe == ["*", ["-", ["shape", "x", 0], 1], 2]
    assert expression.substitute(ceildiv(n, 8), lambda fact: 100) == 13
    with pytest.raises(TypeError, match="must not be a condition of Python's"):
        bool(n == 3)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["~", 1], "must be an operator with its operands"),
        (["+", 1], "got . of 1"),
        (["shape", "z", 0], "must name an argument; got z"),
    ],
)
def test_expressions_that_are_none(cuda, written, message):
    with pytest.raises(ValueError, match=message):
        of_x(cuda, [one_kernel(["int64", written])])
