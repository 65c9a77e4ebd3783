"""Which kernel a product has on Hopper: the one that a table of measured choices names, else the one that the model picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from tilelang_ext.kernels.scaled_mm import sm90_config
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem
from tilelang_ext.kernels.scaled_mm.sm90_config import Choice, kind_of, next_rounded, previous_rounded, rounded
from tilelang_ext.launch import tables
from tilelang_ext.launch.cache import until_reload

# The files that decide how fast a choice is: tables count for these alone.
KERNELS = (
    *("scaled_mm/vecmat", "scaled_mm/sm90_persistent", "scaled_mm/sm90_split_k"),
    *("scaled_mm/sm90_block", "scaled_mm/sm90_load", "scaled_mm/sm90_multiply", "scaled_mm/sm90_store"),
    *("sm90/epilogue", "sm90/pipeline", "sm90/roles", "sm90/scheduler", "sm90/split_tiles"),
)
_NEIGHBOURS = 16  # numbers of rows that are tried on each side


def takes(problem: Problem) -> bool:
    """Whether there is a choice: on Hopper, for what TMA can load."""
    return sm90_config.takes(problem)


def compile_kernel(problem: Problem, compile: Callable) -> Callable:
    """Return the compiled kernel."""
    return sm90_config.compile_choice(problem, pick(problem), compile)


def memory_of(problem: Problem) -> tuple:
    """Return shapes and dtypes of the memory that the kernel has beside its tensors, before `out`."""
    return sm90_config.memory_of(pick(problem))


def sizes_served(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows, about those of the problem, that have its kernel and configuration."""
    first = last = rounded(problem.max_M)
    if last <= VECMAT_MAX_M:
        return first, last
    choice = _pick(replace(problem, max_M=last))
    for _ in range(_NEIGHBOURS):
        before, after = previous_rounded(first), next_rounded(last)
        first = before if before > VECMAT_MAX_M and _pick(replace(problem, max_M=before)) == choice else first
        last = after if _pick(replace(problem, max_M=after)) == choice else last
    return previous_rounded(first) + 1, last


def pick(problem: Problem) -> Choice:
    """Return the choice for a problem."""
    return _pick(replace(problem, max_M=rounded(problem.max_M)))


@until_reload
def _pick(problem: Problem) -> Choice:
    measured = tables.choices_of("scaled_mm", KERNELS).get(key_of(problem))
    if measured is not None:
        for choice in sm90_config.choices(problem):
            if as_data(choice) == measured:
                return choice
    return sm90_config.pick(problem)


def key_of(problem: Problem) -> str:
    """Return the key of a problem of a rounded number of rows in a table."""
    bytes_of_result = 4 if problem.out_dtype == "float32" else 2
    return f"{kind_of(problem)} {problem.max_M}x{problem.N}x{problem.K} {bytes_of_result} bytes, {problem.num_sms} SMs"


def as_data(choice: Choice) -> dict:
    """Return a choice as JSON holds it."""
    return {"kernel": choice.kernel, "config": asdict(choice.config)}
