"""Workspace of plans, threads and capture, on a driver that writes down what it is told; and plans without tilelang."""

import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from launch.fakes import launch, tensor

from tilelang_ext.launch import plan as plans
from tilelang_ext.launch.expression import recipe_of, shape

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
