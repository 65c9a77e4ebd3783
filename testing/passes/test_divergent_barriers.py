"""Barriers inside what only some threads run: each is met by all, and each thread does what it did."""

import pytest
from passes.device import barriers, lines, part
from tvm import tirx
from tvm.ir import Op
from tvm.script import tirx as T

# What ThreadSync makes of a barrier of 64 threads.
PARTIAL = tirx.Call(
    "int32", Op.get("tirx.tvm_storage_sync"), [tirx.StringImm("shared"), tirx.IntImm("int32", 3), tirx.IntImm("int32", 64)]
)


@T.prim_func(private=True)
def half_of_the_threads(A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    if tx < 64:
        s[tx] = X[tx]
        T.evaluate(PARTIAL)
        X[tx] = s[63 - tx]
    else:
        X[tx] = T.float32(1)


@T.prim_func(private=True)
def in_a_loop(n: T.int32, A: T.handle("float32", "global")):
    """The loop has as many rounds for every thread; what its first statement binds is used behind the barrier."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    if tx < 64:
        for k in range(n):
            x: T.float32 = X[tx + k]
            s[tx] = x
            T.evaluate(PARTIAL)
            if n > 4:
                X[tx] = s[63 - tx] + x
                T.evaluate(PARTIAL)


@T.prim_func(private=True)
def condition_that_changes(A: T.handle("float32", "global")):
    """The condition is read once, before the body writes what it reads."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    if X[tx] > T.float32(0):
        X[tx] = T.float32(-1)
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx + 128] = s[tx]


@T.prim_func(private=True)
def one_for_the_block(n: T.int32, A: T.handle("float32", "global")):
    """Memory read at one place, and what a thread's own array holds of it, part no threads."""
    X = T.decl_buffer((512,), data=A)
    bx = T.launch_thread("blockIdx.x", 4)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    own = T.alloc_buffer((1,), scope="local")
    own[0] = X[bx]
    while own[0] > T.float32(0):
        s[tx] = X[tx]
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = s[127 - tx]
        own[0] = own[0] - T.float32(1)
    if X[bx] > T.float32(0) and bx < n:
        T.evaluate(T.tvm_storage_sync("shared"))


@T.prim_func(private=True)
def rounds_that_differ(A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    for k in range(tx):
        s[tx] = X[k]
        T.evaluate(T.tvm_storage_sync("shared"))


@T.prim_func(private=True)
def while_that_differs(A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    step = T.alloc_buffer((1,), "int32", scope="local")
    step[0] = tx
    while step[0] > 0:
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = T.float32(1)
        step[0] = step[0] - 1


def test_conditions_move_beside_the_barrier():
    *_, a, b, c, d, e, f, g = lines(part(half_of_the_threads))
    assert [a, c, d, f] == ["if tx < 64:", 'T.tvm_storage_sync("shared")', "if tx < 64:", "if not tx < 64:"]
    assert b.startswith("s[tx] = ")
    assert e.endswith("= s[63 - tx]")
    assert g.endswith("= T.float32(1.0)")


def test_loops_stay_and_bindings_reach_what_is_behind_the_barrier():
    text = part(in_a_loop).script()
    assert 'T.tvm_storage_sync("shared", ' not in text
    assert text.index("for k in range(n)") < text.index("T.if_then_else(tx < 64, ") < text.index("if tx < 64:")
    assert text.count("if tx < 64:") == 2
    assert text.count("if n > 4:") == 1


def test_a_condition_is_read_once():
    text = part(condition_that_changes).script()
    assert text.count("> T.float32(0.0)") == 1
    assert text.count("if taken:") == 2


def test_what_parts_no_threads_stays():
    assert part(one_for_the_block).script() == one_for_the_block.script()
    assert barriers(one_for_the_block) == 2


@pytest.mark.parametrize(("func", "loop"), [(rounds_that_differ, "for k in range"), (while_that_differs, "while step")])
def test_loops_that_threads_leave_at_different_times(func, loop):
    with pytest.raises(NotImplementedError, match=f"barrier: every thread of a block must reach it; got one inside `{loop}"):
        part(func)
