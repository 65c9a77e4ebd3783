"""What a kernel of `scaled_mm` is compiled for, and what each one promises.

A kernel is a file with `takes(problem) -> bool` and `compile_kernel(problem, compile)`, which returns
`compile(make, *arguments, pass_configs)`: the host compiles the prim_func make(*arguments) once, and equal arguments share it.
`operator.KERNELS` lists the files; the first that takes a problem serves it. The prim_func has the parameters
(a, scale_a, b, scale_b, bias, out), without bias where the problem has none, and need not check these promises:

| argument | shape | memory |
| --- | --- | --- |
| a | (M, K), 0 < M <= max_M | contiguous, first byte at a multiple of 16 |
| b | (N, K) | the same |
| scale_a, scale_b | (row blocks, groups of K), see `Problem.scale` | with groups of K on CUDA any strides, else contiguous |
| bias | (N,) | contiguous |
| out | (M, N) | contiguous |

It writes out = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j], rounded once, on the current
stream, and serves every M up to `max_M` (beyond VECMAT_MAX_M), so that a new batch size compiles nothing. A file whose kernel
depends on less than the problem passes only that to `compile` (see `tiled`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.formats import BlockScaledLayout

VECMAT_MAX_M = 4  # rows up to which matrix instructions are the wrong tool


@dataclass(frozen=True)
class Problem:
    """Everything that a kernel may depend on; dtypes by TileLang's names."""

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal, whose kernels do not ask
    max_M: int  # rows; on AMD and Metal exactly M up to VECMAT_MAX_M, else a power of two; see `bucket_of`
    N: int
    K: int
    a_dtype: str
    b_dtype: str
    layout_a: BlockScaledLayout
    layout_b: BlockScaledLayout
    bias_dtype: str | None
    out_dtype: str
    fast_accum: bool = False  # whether all of K may stay in the tensor core's accumulator

    def scale(self, layout: BlockScaledLayout, rows, name: str, K=None):
        """Return the type of a scale parameter: (1, 1), (rows, 1), (rows, K/128), (rows/128, K/128) or (rows, K/32), rounded
        up; on CUDA with a symbol for each stride. `K`, an expression of the kernel, stands for a K that is no constant.
        """
        K = self.K if K is None else K
        dtype = "float32" if layout.scale_format is None else "uint8"
        row_blocks = 1 if layout.rows is None else T.ceildiv(rows, layout.rows)
        shape = (row_blocks, 1 if layout.k is None else -(-K // layout.k) if isinstance(K, int) else T.ceildiv(K, layout.k))
        if self.target_kind != "cuda":
            return T.Tensor(shape, dtype)
        return T.StridedTensor(shape, (T.dynamic(f"{name}_stride_0"), T.dynamic(f"{name}_stride_1")), dtype)


def bucket_of(M: int) -> int:
    """Return the `max_M` of a batch of M rows: M itself up to VECMAT_MAX_M, else the power of two from 16 that holds it."""
    return M if M <= VECMAT_MAX_M else max(16, 1 << (M - 1).bit_length())
