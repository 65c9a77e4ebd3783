"""What a kernel of `matmul` is compiled for, and what each one promises.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

A kernel is a file with `takes(problem) -> bool` and `compile_kernel(problem, device)`, which returns a function of tensors that
launches: `device.compile(make, *arguments, pass_configs)` compiles the prim_func make(*arguments) once, and equal arguments
share it; `device.empty(*shape, dtype)` allocates memory between kernels. `operator.KERNELS` lists the files; the first that
takes a problem serves it. The function and the prim_funcs take (a, b, row_scale, column_scale, bias, residual, out), with `a`
once more in place of what the problem lacks, and need not check these promises:

| argument | shape | memory |
| --- | --- | --- |
| a | (M, K), or (K, M) if it is M-major | contiguous, first byte at a multiple of 16 |
| b | (N, K), or (K, N) if it is N-major | the same |
| row_scale, column_scale | (M,), (N,), float32 | contiguous |
| bias | (N,) | contiguous |
| residual, out | (M, N) | contiguous |

Accumulators and the epilogue are float32; out is rounded once. M, N and K are at least 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tilelang_ext import language as T

TMA_ALIGNMENT = 8  # elements of 16 bits: 16 bytes


@dataclass(frozen=True)
class Epilogue:
    """What follows the product of an element; None and False for what is left out. Dtypes by TileLang's names."""

    row_scale: bool = False
    column_scale: bool = False
    bias_dtype: str | None = None
    activation: str | None = None  # a key of epilogue.ACTIVATIONS
    residual_dtype: str | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that a kernel may depend on. 0 stands for a size that is not constant in a kernel."""

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal
    M: int
    N: int
    K: int
    dtype: str  # of a and b
    out_dtype: str
    a_is_k_major: bool = True
    b_is_k_major: bool = True
    epilogue: Epilogue = Epilogue()

    @property
    def a_row(self) -> int:
        """Elements of a row of a in memory."""
        return self.K if self.a_is_k_major else self.M

    @property
    def b_row(self) -> int:
        """Elements of a row of b in memory."""
        return self.K if self.b_is_k_major else self.N

    def swapped(self) -> Problem:
        """Return the problem of the transposed product, b^T a^T, whose operands lie in memory as those of this one."""
        return replace(self, M=self.N, N=self.M, a_is_k_major=self.b_is_k_major, b_is_k_major=self.a_is_k_major)

    def without_sizes(self, *sizes: str) -> Problem:
        """Return the problem of a kernel for all of these sizes."""
        return replace(self, **dict.fromkeys(sizes, 0))

    def types(self, M, N, K) -> tuple:
        """Return the types of a prim_func's parameters."""
        return self.types_of(M, N, (M, K) if self.a_is_k_major else (K, M), (N, K) if self.b_is_k_major else (K, N))

    def types_of(self, M, N, a_shape: tuple, b_shape: tuple) -> tuple:
        """Return the types of a prim_func's parameters, whose operands have these shapes in memory."""
        a, b = (a_shape, self.dtype), (b_shape, self.dtype)
        return tuple(T.Tensor(shape, dtype) for shape, dtype in (a, b, *self.types_of_epilogue(M, (N,), a)))

    def types_of_epilogue(self, M, columns: tuple, absent: tuple) -> tuple:
        """Return shapes and dtypes from row_scale to out; columns may be several dimensions. `absent` is of what lacks."""
        epilogue = self.epilogue
        return (
            ((M,), "float32") if epilogue.row_scale else absent,
            (columns, "float32") if epilogue.column_scale else absent,
            (columns, epilogue.bias_dtype) if epilogue.bias_dtype else absent,
            ((M, *columns), epilogue.residual_dtype) if epilogue.residual_dtype else absent,
            ((M, *columns), self.out_dtype),
        )


@dataclass(frozen=True, eq=False)
class Operands:
    """The parameters of a prim_func, in order."""

    a: Any
    b: Any
    row_scale: Any
    column_scale: Any
    bias: Any
    residual: Any
    out: Any
    split: Any = None  # SplitTiles, through which blocks give accumulators to others
