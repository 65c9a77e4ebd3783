"""Atomics beside stores to a fragment that several threads hold: each is done once, and in the order of the statements."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from cuda.kernels import lower as lower_for_cuda
from passes.run import run

from tilelang_ext import language as T
from tilelang_ext import metal

N = 8


@T.prim_func
def routing(
    A: T.Tensor((N, 64), "float32"),
    total: T.Tensor((N,), "float32"),
    doubled: T.Tensor((N,), "float32"),
    taken: T.Tensor((2,), "int32"),
    places: T.Tensor((N,), "int32"),
    kept: T.Tensor((N,), "int32"),
):
    """16 threads hold a row's sum: one of them adds it, and all read the sum back."""
    with T.Kernel(1, threads=128):
        a, row = T.alloc_fragment((N, 64), "float32"), T.alloc_fragment((N,), "float32")
        place, keep = T.alloc_fragment((N,), "int32"), T.alloc_fragment((N,), "int32")
        T.copy(A, a)
        T.reduce_sum(a, row, dim=1)
        for i in T.Parallel(N):
            T.atomic_add(total[i], row[i])
            row[i] = total[i] * 2.0
        T.copy(row, doubled)
        for i in T.Parallel(N):
            factor = i + 1
            slot = T.atomic_add(taken[0], 1, return_prev=True)
            place[i] = slot
            if i % 2 == 0:
                T.atomic_add(taken[1], slot * factor)
                keep[i] = slot * factor
            else:
                keep[i] = T.atomic_max(taken[0], 0, return_prev=True)
        T.copy(place, places)
        T.copy(keep, kept)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"])
def test_values(target):
    A = torch.arange(N * 64).reshape(N, 64).float()
    total, doubled = torch.ones(N), torch.full((N,), torch.nan)
    taken, places, kept = torch.zeros(2, dtype=torch.int32), torch.full((N,), -1).int(), torch.full((N,), -1).int()
    run(routing, A, total, doubled, taken, places, kept, target=target)
    assert torch.equal(total, 1 + A.sum(1))
    assert torch.equal(doubled, 2 * total)
    assert sorted(places.tolist()) == list(range(N))
    assert taken[0] == N
    weighted = (places * torch.arange(1, N + 1)).int()
    assert torch.equal(kept, torch.where(torch.arange(N) % 2 == 0, weighted, N).int())
    assert taken[1] == weighted[::2].sum()


@T.prim_func
def rows(
    A: T.Tensor((128, 32), "float32"),
    total: T.Tensor((128,), "float32"),
    sums: T.Tensor((128,), "float32"),
    counts: T.Tensor((128,), "int32"),
    before: T.Tensor((128,), "int32"),
):
    """More rows than threads, and still 8 threads to a row; an update of memory, held in a fragment, beside an atomic."""
    with T.Kernel(1, threads=32):
        a, row = T.alloc_fragment((128, 32), "float32"), T.alloc_fragment((128,), "float32")
        count, s = T.alloc_fragment((128,), "int32"), T.alloc_shared((128,), "float32")
        T.copy(A, a)
        T.reduce_sum(a, row, dim=1)
        T.clear(count)
        T.clear(s)
        for i in T.Parallel(128):
            s[i] = s[i] + row[i]
            T.atomic_add(total[i], row[i])
        for i in T.Parallel(128):
            if i % 3 == 0:
                row[i] = row[i] - 1.0
            else:
                count[i] = count[i] + i
            count[i] = count[i] + T.atomic_add(counts[i], 2, return_prev=True)
        for i in T.Parallel(128):
            total[i] = total[i] + row[i]
        T.copy(s, sums)
        T.copy(count, before)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx950"])
def test_rows_that_several_threads_hold(target):
    A, total, sums = torch.arange(128 * 32).reshape(128, 32).float(), torch.zeros(128), torch.full((128,), torch.nan)
    counts, before, i = torch.ones(128).int(), torch.full((128,), -1).int(), torch.arange(128)
    run(rows, A, total, sums, counts, before, target=target)
    assert torch.equal(sums, A.sum(1))
    assert torch.equal(total, 2 * A.sum(1) - (i % 3 == 0).float())
    assert torch.equal(counts, torch.full((128,), 3).int())
    assert torch.equal(before, torch.where(i % 3 == 0, 1, i + 1).int())


def test_one_thread_of_those_that_hold_a_row_adds_on_cuda():
    text = lower_for_cuda(routing, "sm_90")
    body = text[text.rindex("__global__") :]
    guard = body.rindex("if (", 0, body.index("AtomicAdd(")), body.index("AtomicAdd(")
    assert "threadIdx.x) % 16) == 0" in body[slice(*guard)]
    assert body.count("AtomicAdd") == 3


def beside(body):
    @T.prim_func
    def kernel(C: T.Tensor((N,), "int32"), P: T.Tensor((N,), "int32")):
        with T.Kernel(1, threads=128):
            x = T.alloc_fragment((N,), "int32")
            T.clear(x)
            for i in T.Parallel(N):
                body(i, x, C)
            T.copy(x, P)

    return kernel


@T.macro
def in_an_inner_loop(i, x, C):
    for k in T.serial(3):
        T.atomic_add(C[i], k)
        x[i] = x[i] + 1


@T.macro
def under_what_it_changes(i, x, C):
    if x[i] == 0:
        T.atomic_add(C[i], 1)
        x[i] = 1


@T.macro
def a_value_of_what_it_changes(i, x, C):
    before = x[i]
    x[i] = before + i
    T.atomic_add(C[i], before + x[i])


@T.macro
def a_binding_under_a_condition(i, x, C):
    if i < 3:
        slot = T.atomic_add(C[i], 1, return_prev=True)
        x[i] = slot


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
@pytest.mark.parametrize(
    ("body", "counts", "values"),
    [
        (under_what_it_changes, [1] * N, [1] * N),
        (a_value_of_what_it_changes, list(range(N)), list(range(N))),
    ],
)
def test_conditions_and_values_are_those_of_before(body, counts, values, target):
    C, P = torch.zeros(N, dtype=torch.int32), torch.full((N,), -1).int()
    run(beside(body), C, P, target=target)
    assert (C.tolist(), P.tolist()) == (counts, values)


@T.macro
def a_variable(i, x, C):
    slot = T.alloc_var("int32")
    slot = i + 1
    T.atomic_add(C[i], slot)
    x[i] = slot


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (in_an_inner_loop, "a loop that has both"),
        (a_binding_under_a_condition, "a binding under a condition"),
        (a_variable, "slot, a variable that the loop sets"),
    ],
)
def test_what_cannot_be_parted_is_refused(body, got):
    with pytest.raises(NotImplementedError, match=f"T.Parallel: an atomic beside a store .*; got {got}; put the atomic into"):
        metal.lower(beside(body))
