"""Kernels whose threads meet in shared memory where ThreadSync sees no way to it, for any target, with what they compute."""

import torch

from tilelang_ext import language as T

THREADS = 128


def gemm_of_any_k(num_stages, block_K=32):
    """C = A B with a symbolic K: the pipelined loop may run fewer rounds than it has stages, or none."""
    K = T.dynamic("K")

    @T.prim_func
    def kernel(A: T.Tensor((64, K), "float16"), B: T.Tensor((K, 64), "float16"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=THREADS):
            A_s = T.alloc_shared((64, block_K), "float16")
            B_s = T.alloc_shared((block_K, 64), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=num_stages):
                T.copy(A[0, k * block_K], A_s)
                T.copy(B[k * block_K, 0], B_s)
                T.gemm(A_s, B_s, C_f)
            T.copy(C_f, C)

    return kernel


def gemm_case(K):
    A, B = (torch.randn(64, K).half() for _ in range(2))
    B = B.T.contiguous()
    return (A, B, torch.full((64, 64), float("nan"))), (A.float() @ B.float())


@T.prim_func
def rounds_of_while(n: T.int32, A: T.Tensor((4, THREADS), "float32"), C: T.Tensor((4, THREADS), "float32")):
    """C[:n] = A[:n] with each row backwards, one row per round."""
    with T.Kernel(1, threads=THREADS):
        row = T.alloc_shared((THREADS,), "float32")
        step = T.alloc_local((1,), "int32")
        tx = T.get_thread_binding()
        step[0] = 0
        while step[0] < n:
            row[tx] = A[step[0], tx]
            C[step[0], tx] = row[THREADS - 1 - tx]
            step[0] = step[0] + 1


def part_of_the_threads(count):
    """The first threads turn their elements around, by a barrier that stands where the others do not come."""

    @T.prim_func
    def kernel(A: T.Tensor((THREADS,), "float32"), C: T.Tensor((THREADS,), "float32")):
        with T.Kernel(1, threads=THREADS):
            tile = T.alloc_shared((THREADS,), "float32")
            tx = T.get_thread_binding()
            if tx < count:
                tile[tx] = A[tx]
                T.sync_threads()
                C[tx] = tile[count - 1 - tx]
            else:
                C[tx] = -A[tx]

    return kernel


def part_case(count):
    A = torch.randn(THREADS)
    return (A, torch.full((THREADS,), float("nan"))), torch.cat([A[:count].flip(0), -A[count:]])


def normalized_row(first, sharers=64, dtype="float32"):
    """C = A / sum(A), A spread over `sharers` threads from thread `first` on."""
    N = sharers * 4

    @T.prim_func
    def kernel(A: T.Tensor((N,), dtype), C: T.Tensor((N,), dtype)):
        with T.Kernel(1, threads=THREADS):
            row = T.alloc_fragment((1, N), dtype)
            total = T.alloc_fragment((1,), dtype)
            T.annotate_layout(
                {
                    row: T.Fragment((1, N), forward_fn=lambda i, j: (first + j // 4, j % 4)),
                    total: T.Fragment((1,), forward_fn=lambda i, rep: (first + rep, i), replicate=sharers),
                }
            )
            for i, j in T.Parallel(1, N):
                row[i, j] = A[j]
            T.reduce_sum(row, total, dim=1)
            for i, j in T.Parallel(1, N):
                C[j] = row[i, j] / total[i]

    return kernel
