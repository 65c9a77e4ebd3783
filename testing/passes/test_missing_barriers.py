"""Barriers that ThreadSync leaves out: each program needs as many as it says, by hand."""

import pytest
from passes.device import barriers, lines, place
from tvm.ir import Op
from tvm.ir.transform import PassContext
from tvm.script import tirx as T

ATOMIC_ADD = Op.get("tl.atomic_add_elem_op")
# ruff: noqa: B007  the parser of the programs takes no underscores


@T.prim_func(private=True)
def empty_loop(n: T.int32, A: T.handle("float32", "global")):
    """The barrier of the loop is none for what stands before and behind it."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    for k in range(n):
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx + 128] = T.float32(0)
    X[tx] = s[127 - tx]


@T.prim_func(private=True)
def loop_of_four(A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    for k in range(4):
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx + 128] = T.float32(0)
    X[tx] = s[127 - tx]


@T.prim_func(private=True)
def untaken_branch(n: T.int32, A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    if n > 3:
        T.evaluate(T.tvm_storage_sync("shared"))
    X[tx] = s[127 - tx]


@T.prim_func(private=True)
def both_branches(n: T.int32, A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    if n > 3:
        T.evaluate(T.tvm_storage_sync("shared"))
    else:
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = T.float32(1)
    X[tx] = s[127 - tx]


@T.prim_func(private=True)
def back_edge_of_while(n: T.int32, A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    step = T.alloc_buffer((1,), "int32", scope="local")
    step[0] = 0
    while step[0] < n:
        s[tx] = X[tx]
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = s[127 - tx]
        step[0] = step[0] + 1


@T.prim_func(private=True)
def condition_of_while(A: T.handle("float32", "global")):
    """The condition reads what thread 0 writes: one barrier before the loop, one at the end of its body, one for the write."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((1,), scope="shared")
    if tx == 0:
        s[0] = X[0]
    while s[0] > T.float32(0):
        if tx == 0:
            s[0] = s[0] - T.float32(1)


@T.prim_func(private=True)
def two_rounds_apart(A: T.handle("float32", "global")):
    """Each round writes where the one before the last read."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((512,), scope="shared")
    for k in range(8):
        X[tx] = s[k % 4 * 128 + 127 - tx]
        s[(k + 2) % 4 * 128 + tx] = X[tx]


@T.prim_func(private=True)
def across_an_inner_loop(A: T.handle("float32", "global")):
    """A round writes what the round before read, and an inner loop lies between the two."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((512,), scope="shared")
    for k in range(3):
        X[tx] = s[(k + 1) * 128 + 127 - tx]
        for j in range(2):
            X[tx + 128] = T.float32(0)
        s[k * 128 + tx] = X[tx]


@T.prim_func(private=True)
def double_buffer(n: T.int32, A: T.handle("float32", "global")):
    """The barrier of a round also parts it from the next but one."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((256,), scope="shared")
    for k in range(n):
        s[k % 2 * 128 + tx] = X[tx]
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = s[k % 2 * 128 + 127 - tx]


@T.prim_func(private=True)
def written_the_other_way_round(A: T.handle("float32", "global")):
    """No thread writes one place twice, but two threads do."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    s[127 - tx] = X[tx]


@T.prim_func(private=True)
def left_early(n: T.int32, A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    s[tx] = X[tx]
    for k in range(4):
        if k + n > 2:
            T.evaluate(T.break_loop())
        T.evaluate(T.tvm_storage_sync("shared"))
    X[tx] = s[127 - tx]


@T.prim_func(private=True)
def skipped_rest(n: T.int32, A: T.handle("float32", "global")):
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((128,), scope="shared")
    for k in range(4):
        s[tx] = X[tx + k * 128]
        if k + n > 2:
            T.evaluate(T.continue_loop())
        T.evaluate(T.tvm_storage_sync("shared"))
        X[tx] = s[127 - tx]


@T.prim_func(private=True)
def one_value_each_round(n: T.int32, A: T.handle("float32", "global")):
    """All threads write one place, and read it before they write the next value."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((1,), scope="shared")
    for k in range(n):
        s[0] = X[k]
        X[tx + 128] = s[0]


@T.prim_func(private=True)
def own_elements(n: T.int32, A: T.handle("float32", "global")):
    """A swizzle: each thread meets itself alone."""
    X = T.decl_buffer((4096,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((1024,), scope="shared")
    for k in range(n):
        for i in range(8):
            s[i * 128 + tx // 8 * 8 + T.bitwise_xor(tx % 8, tx // 8 % 8)] = X[tx]
        for j in range(8):
            X[j * 128 + tx] = s[j * 128 + tx // 8 * 8 + T.bitwise_xor(tx % 8, tx // 8 % 8)]


@T.prim_func(private=True)
def vectors(A: T.handle("float32", "global")):
    """Four elements a thread, read as two: another thread's."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 64)
    s = T.alloc_buffer((256,), scope="shared")
    s[T.Ramp(tx * 4, 1, 4)] = X[T.Ramp(tx * 4, 1, 4)]
    X[T.Ramp(tx * 2, 1, 2)] = s[T.Ramp(tx * 2, 1, 2)]


@T.prim_func(private=True)
def parts_of_one_array(A: T.handle("float32", "global")):
    """Arrays of other types within one: the second half of `whole` is `half`."""
    X = T.decl_buffer((512,), data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    whole = T.alloc_buffer((1024,), "uint8", scope="shared.dyn")
    half: T.handle("float16", "shared.dyn") = T.handle_add_byte_offset(whole.data, 512)
    h = T.decl_buffer((256,), "float16", data=half, scope="shared.dyn")
    f = T.decl_buffer((256,), "float32", data=whole.data, scope="shared.dyn")
    f[tx] = X[tx]
    h[tx] = T.float16(1)
    X[tx] = f[255 - tx]


@T.prim_func(private=True)
def count(A: T.handle("int32", "global")):
    X = T.decl_buffer((512,), "int32", data=A)
    tx = T.launch_thread("threadIdx.x", 128)
    s = T.alloc_buffer((4,), "int32", scope="shared")
    if tx < 4:
        s[tx] = 0
    T.call_intrin("handle", ATOMIC_ADD, T.address_of(s[tx % 4]), 1, 0)
    T.call_intrin("handle", ATOMIC_ADD, T.address_of(s[tx % 3]), 1, 0)
    X[tx] = s[tx % 4]


WANTED = {
    "empty_loop": 2,
    "loop_of_four": 1,
    "untaken_branch": 2,
    "both_branches": 2,
    "back_edge_of_while": 2,
    "condition_of_while": 3,
    "two_rounds_apart": 1,
    "across_an_inner_loop": 1,
    "double_buffer": 1,
    "written_the_other_way_round": 1,
    "left_early": 2,
    "skipped_rest": 2,
    "one_value_each_round": 1,
    "own_elements": 0,
    "vectors": 1,
    "parts_of_one_array": 1,
}


@pytest.mark.parametrize("name", WANTED)
def test_as_many_as_are_needed(name):
    placed = place(globals()[name])
    assert barriers(placed) == WANTED[name], placed.script()
    assert barriers(place(placed)) == WANTED[name], "and no more the second time"


def test_where_it_stands():
    *_, before, after = lines(place(empty_loop))
    assert before == 'T.tvm_storage_sync("shared")'
    assert after.endswith("[tx] = s[127 - tx]")


def test_an_atomic_meets_stores_and_no_atomics():
    assert barriers(place(count)) == 2


def test_whoever_switches_thread_sync_off_places_all():
    with PassContext(config={"tl.disable_thread_storage_sync": True}):
        assert barriers(place(back_edge_of_while)) == 1
