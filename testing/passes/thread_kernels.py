"""Kernels of what is each thread's own, and of indices, rounding modes and constants, for any target."""

import math

import torch

from tilelang_ext import language as T

THREADS = (40, 4)
COUNT = THREADS[0] * THREADS[1]


@T.prim_func
def lanes(C: T.Tensor((5, COUNT), "int32")):
    """Rows of C: lane and warp of 20 threads, lane and warp group of a size that is computed, of two dimensions of threads."""
    with T.Kernel(1, threads=THREADS):
        tx, ty = T.get_thread_binding(0), T.get_thread_binding(1)
        t = ty * THREADS[0] + tx
        C[0, t] = T.get_lane_idx(20)
        C[1, t] = T.get_warp_idx(20)
        C[2, t] = T.get_warp_idx_sync(64)
        C[3, t] = T.get_warp_group_idx(20, 3)
        C[4, t] = T.get_warp_group_idx(16)


def lanes_case():
    t = torch.arange(COUNT, dtype=torch.int32)
    return torch.stack([t % 20, t // 20, t // 64, t // 60, t // 64])


@T.prim_func
def atomics(
    A: T.Tensor((128,), "float32"),
    total: T.Tensor((1,), "float32"),
    largest: T.Tensor((1, 1), "float32"),
    own: T.Tensor((1,), "float32"),
    once: T.Tensor((1,), "float32"),
    tile: T.Tensor((4,), "float32"),
):
    """Buffers of one element take each thread's value; a number is added once, and once to each element of a tile."""
    with T.Kernel(1, threads=128):
        tx = T.get_thread_binding()
        x = T.alloc_local((1,), "float32")
        x[0] = A[tx]
        T.atomic_add(total, A[tx])
        T.atomic_max(largest, A[tx])
        T.atomic_add(own, x[0])
        T.atomic_add(once, 2.0)
        T.atomic_add(tile, 3.0)


def atomics_case():
    A = torch.randint(-9, 9, (128,)).float()
    outputs = torch.zeros(1), torch.full((1, 1), -99.0), torch.zeros(1), torch.zeros(1), torch.zeros(4)
    wants = A.sum().view(1), A.max().view(1, 1), A.sum().view(1), torch.tensor([2.0]), torch.full((4,), 3.0)
    return (A, *outputs), outputs, wants


def values_of_threads_for_a_tile():
    @T.prim_func
    def kernel(A: T.Tensor((128,), "float32"), tile: T.Tensor((4,), "float32")):
        with T.Kernel(1, threads=128):
            T.atomic_add(tile, A[T.get_thread_binding()])

    return kernel


def ieee(mode="rn", name="ieee_add"):
    """C = `name` of A and B, rounded by `mode`."""

    @T.prim_func
    def kernel(A: T.Tensor((64,), "float32"), B: T.Tensor((64,), "float32"), C: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding()
            if name in ("ieee_frcp", "ieee_fsqrt"):
                C[tx] = getattr(T, name)(A[tx], mode)
            elif name == "ieee_fmaf":
                C[tx] = T.ieee_fmaf(A[tx], B[tx], B[tx], mode)
            else:
                C[tx] = getattr(T, name)(A[tx], B[tx], mode)

    return kernel


IEEE = ("ieee_add", "ieee_sub", "ieee_mul", "ieee_fdiv", "ieee_fmaf", "ieee_frcp", "ieee_fsqrt")


@T.prim_func
def powers(A: T.Tensor((64,), "float16"), C: T.Tensor((64,), "float16"), D: T.Tensor((8, 64), "float32")):
    """C = A to the power of a half; rows of D: `T.ieee_*` to nearest, of A + 1 and 3."""
    with T.Kernel(1, threads=64):
        tx = T.get_thread_binding()
        C[tx] = T.pow(A[tx], T.float16(0.5))
        a = T.cast(A[tx], "float32") + 1.0
        D[0, tx] = T.ieee_add(a, 3.0)
        D[1, tx] = T.ieee_sub(a, 3.0)
        D[2, tx] = T.ieee_mul(a, 3.0)
        D[3, tx] = T.ieee_fdiv(a, 3.0)
        D[4, tx] = T.ieee_fmaf(a, 3.0, 0.1)
        D[5, tx] = T.ieee_frcp(a)
        D[6, tx] = T.ieee_fsqrt(a)
        D[7, tx] = T.ieee_frsqrt(a)


def powers_case():
    A = torch.rand(64).half()
    a = A.float() + 1
    root = a.double().sqrt().float()
    rows = a + 3, a - 3, a * 3, a / 3, (a.double() * 3 + torch.tensor(0.1).double()).float(), 1 / a, root, 1 / root
    outputs = torch.zeros(64).half(), torch.zeros(8, 64)
    return (A, *outputs), outputs, (A.float().sqrt().half(), torch.stack(rows))


def infinities(dtype):
    @T.prim_func
    def kernel(C: T.Tensor((64,), dtype), D: T.Tensor((64,), dtype)):
        with T.Kernel(1, threads=32):
            c = T.alloc_fragment((64,), dtype)
            T.fill(c, T.infinity(dtype))
            T.copy(c, C)
            for i in T.Parallel(64):
                D[i] = T.cast(-math.inf, dtype)

    return kernel


def far_elements():
    """Elements of a tensor of 2.8e9: a load, a copy, a store and an atomic, at constant indices and past them."""

    @T.prim_func
    def kernel(A: T.Tensor((70000, 40000), "float32"), C: T.Tensor((4, 64), "float32")):
        with T.Kernel(1, threads=64) as bx:
            tx = T.get_thread_binding()
            tile = T.alloc_shared((64,), "float32")
            C[0, tx] = A[69999, 39900 + tx]
            T.copy(A[69998, 39936:40000], tile)
            C[1, tx] = tile[tx]
            A[bx + 69997, tx] = C[2, tx]
            T.atomic_add(A[69996, tx], C[3, tx])

    return kernel


FAR = [69999 * 40000 + 39900, 69998 * 40000 + 39936, 69997 * 40000, 69996 * 40000]
