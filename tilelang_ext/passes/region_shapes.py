"""A copy or an atomic between tiles whose axes do not match is one error, not a check that fails inside of the compiler.

    atomicadd(region(s (64,)), region(D (4, 64)))    "Check failed: loop_vars.size() <= op.src_range.size()"

Axes of extent 1 apart, both tiles need equally many axes: elements of the one are those of the other in order. An atomic takes
each element of its value once, so its extents must be equal too. A copy reads as much as its destination has, so its source
may be said to be smaller, but not larger.
Runs on tile programs. What is refused while a program is traced is in `language/tile_pairs.py`.
"""

from __future__ import annotations

from tvm import IRModule, arith, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

_PAIRS = {
    "tl.tileop.copy": "copy",
    "tl.tileop.atomicadd": "atomic_add",
    "tl.tileop.atomicmax": "atomic_max",
    "tl.tileop.atomicmin": "atomic_min",
}


def refuse_unlike_regions(mod: IRModule) -> IRModule:
    """Return `mod`; ValueError for the first copy or atomic in it between tiles that do not match."""
    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            for call in _calls(func):
                _check(_PAIRS[call.op.name], *call.args[:2])
    return mod


def _calls(func: tirx.PrimFunc) -> list[tirx.Call]:
    calls = []

    def visit(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name in _PAIRS:
            calls.append(node)

    post_order_visit(func.body, visit)
    return calls


def _check(name: str, source, destination) -> None:
    if not (is_region(source) and is_region(destination)):
        return  # a number, which every element takes
    wanted, got = (_axes(region) for region in (destination, source))
    analyzer = arith.Analyzer()
    unlike = len(wanted) != len(got)
    if not unlike:
        differ = tirx.LT if name == "copy" else tirx.NE
        unlike = any(analyzer.can_prove(differ(a, b)) for a, b in zip(wanted, got, strict=True))
    if unlike:
        raise ValueError(
            f"T.{name}: both tiles must have the same extents, but for axes of 1; got {_text(source)} for "
            f"{_text(destination)}; index or slice the larger one, or take a T.Parallel over its elements"
        )


def is_region(node) -> bool:
    """Whether an argument of a tile operator is a tile, not a number."""
    return isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == "tl.region"


def _axes(region: tirx.Call) -> list:
    return [extent for extent in region.args[2:] if not (isinstance(extent, tirx.IntImm) and int(extent) == 1)]


def _text(region: tirx.Call) -> str:
    return f"{region.args[0].buffer.name} ({', '.join(map(str, region.args[2:]))})"
