"""What calls of `scaled_mm` on an NVIDIA GPU compile, and such calls, told from their sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tilelang_ext.kernels.scaled_mm.arguments import MX, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, Options
from tilelang_ext.kernels.scaled_mm.launch import add_variant, sizes_of_bucket
from tilelang_ext.kernels.scaled_mm.operator import implementation_of, problem_for
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.launch.device import Target

RECIPES = {"tensor": (TENSOR, TENSOR), "row": (ROW, ROW), "block": (ROW_BLOCK, SQUARE_BLOCK), "mx": (MX, MX)}
_DTYPE = torch.float8_e4m3fn


def calls(N: int, K: int, target: Target, max_rows: int, recipes: Sequence[str]) -> Iterator[tuple[Problem, tuple]]:
    """Yield problems with arguments of `scaled_mm_out` whose tensors are empty, on the CPU: E4M3 to bfloat16, no bias.

    One call for each range of rows that share a kernel, recipe of `RECIPES` and form of its scales.
    """
    b = torch.empty(N, K, dtype=_DTYPE).t()
    for name in recipes:
        recipe_a, recipe_b = RECIPES[name]
        options, last = Options(recipe_a, 0, recipe_b, 0, False).pack(), 0
        while last < max_rows:
            key = torch.device("cpu"), last + 1, N, K, _DTYPE, _DTYPE, recipe_a, recipe_b, None, torch.bfloat16
            problem = problem_for(target, key, False)
            rows, last = last + 1, _sizes_served(problem)[1]
            a, out = torch.empty(rows, K, dtype=_DTYPE), torch.empty(rows, N, dtype=torch.bfloat16)
            for scale_a, scale_b in _scales(name, rows, N, K):
                yield problem, (a, b, scale_a, scale_b, None, options, out)


def _scales(name: str, rows: int, N: int, K: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales in the forms that torch takes and callers have."""
    if name == "tensor":
        yield torch.empty(()), torch.empty(())
        yield torch.empty(1, 1), torch.empty(1, 1)
    elif name == "row":
        yield torch.empty(rows, 1), torch.empty(1, N)
        yield torch.empty(rows, 1), torch.empty(N, 1)
    elif name == "mx":
        yield torch.empty(rows, K // 32, dtype=torch.float8_e8m0fnu), torch.empty(N, K // 32, dtype=torch.float8_e8m0fnu)
    else:
        groups = -(-K // 128)
        for padded in {groups, -(-groups // 4) * 4}:
            yield torch.empty(rows, groups), torch.empty(padded, -(-N // 128))


def _sizes_served(problem: Problem) -> tuple[int, int]:
    return getattr(implementation_of(problem), "sizes_served", sizes_of_bucket)(problem)


def compile_call(problem: Problem, compile: Callable) -> None:
    """Call compile(make, *arguments, pass_configs) for each kernel of the problem."""
    implementation_of(problem).compile_kernel(problem, compile)


def add_call(plan, problem: Problem, arguments: tuple) -> None:
    """Add the variant of such a call to a plan."""
    add_variant(plan, arguments, problem, implementation_of(problem))
