"""The plan of `matmul` on NVIDIA GPUs: which variant a call finds, and what a variant demands of the caller's tensors.

The arguments are those of the torch operator `matmul_out`. A variant is compiled for the sizes N and K, the dtypes, the orders
in memory and the epilogue, and serves the rows that have its kernels. On Hopper sizes are no constants of the kernels, so that
variants of other sizes share them.
"""

from __future__ import annotations

from types import ModuleType

from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Problem
from tilelang_ext.launch.cache import until_reload
from tilelang_ext.launch.expression import Expression, fact, recipe_of, select, shape, stride
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.record import Recorder, View

_TENSORS = ("a", "b", "row_scale", "column_scale", "bias", "residual", "out")
_ARGUMENTS = (*_TENSORS[:-1], "activation", "out")
_A_IS_K_MAJOR = stride("a", 1) == 1
_KEY = (
    fact("value", "activation"),
    fact("device", "a"),
    shape("b", 0),
    shape("b", 1),
    _A_IS_K_MAJOR,
    stride("b", 1) == 1,
    select(_A_IS_K_MAJOR, 0, shape("a", 0) % (2 * TMA_ALIGNMENT)),  # whether rows of a are whole sectors, and TMA takes them
    *(fact("dtype", name) for name in _TENSORS),
)
RECIPE = {
    "name": "matmul",
    "arguments": [{"name": name, "type": "int" if name == "activation" else "tensor"} for name in _ARGUMENTS],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(shape("a", 0)),
}


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE)


def add_variant(plan: Plan, arguments: tuple, problem: Problem, implementation: ModuleType) -> None:
    """Compile the kernels of one file for arguments that have been checked, and add them to the plan."""
    recorder = Recorder("matmul", problem.arch)
    M, N, K, epilogue = shape("a", 0), problem.N, problem.K, problem.epilogue
    a = _matrix(recorder, "a", problem.dtype, M, K, problem.a_is_k_major)
    b = _matrix(recorder, "b", problem.dtype, K, N, not problem.b_is_k_major)
    operands = (
        recorder.argument("row_scale", "float32", (M,)) if epilogue.row_scale else a,
        recorder.argument("column_scale", "float32", (N,)) if epilogue.column_scale else a,
        recorder.argument("bias", epilogue.bias_dtype, (N,)) if epilogue.bias_dtype else a,
        recorder.argument("residual", epilogue.residual_dtype, (M, N)) if epilogue.residual_dtype else a,
    )
    out = recorder.argument("out", problem.out_dtype, (M, N))
    implementation.compile_kernel(problem, recorder)(a, b, *operands, out)
    key, _ = plan.key(*arguments)
    plan.add(recorder.variant(key, implementation.sizes_served(problem)), recorder.cubins)


def _matrix(recorder: Recorder, name: str, dtype: str, rows: Expression | int, columns: int, is_row_major: bool) -> View:
    """Return an operand as it lies in memory: its rows, or its columns where those are contiguous."""
    if is_row_major:
        return recorder.argument(name, dtype, (rows, columns))
    recorder.argument(name, dtype, (rows, columns), (1, rows))
    return View(name, dtype, (columns, rows), (rows, 1))
