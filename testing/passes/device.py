"""Flat device functions written by hand, as the passes meet them, and what they look like afterwards."""

import tilelang  # noqa: F401  its TVM is found once it is imported
from tvm import IRModule, tirx
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.divergent_barriers import PartDivergentBarriers
from tilelang_ext.passes.missing_barriers import PlaceMissingBarriers, is_barrier


def place(func: tirx.PrimFunc) -> tirx.PrimFunc:
    return PlaceMissingBarriers(IRModule({"main": func}))["main"]


def part(func: tirx.PrimFunc, with_participants=None) -> tirx.PrimFunc:
    return PartDivergentBarriers(IRModule({"main": func}), with_participants)["main"]


def barriers(func: tirx.PrimFunc) -> int:
    found = []
    post_order_visit(func.body, lambda node: found.append(isinstance(node, tirx.Evaluate) and is_barrier(node)))
    return sum(found)


def lines(func: tirx.PrimFunc) -> list[str]:
    """Return the lines of a function's script from the first store on, without their indentation."""
    return [line.strip() for line in func.script().splitlines() if line.strip()]
