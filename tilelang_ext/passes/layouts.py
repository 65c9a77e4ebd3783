"""Upstream's layouts for fragments first, plain ones of ours where it has none, and one line where those do not do either.

f = alloc_fragment((24, 40), "float32"), 128 threads; f and a float16 fragment in one T.Parallel: 960 elements have no layout
that both types' vectors fit, "no available layout found"
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tvm import IRModule, tirx
from tvm.error import InternalError
from tvm.target import Target
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.fused_loops import FuseLoops
from tilelang_ext.passes.launched_blocks import launched_blocks
from tilelang_ext.passes.plain_layouts import LayOutPlainly
from tilelang_ext.passes.staged_operands import StageOperands

_NAMED = 4  # fragments that a message names

# Parts of what upstream's LayoutInference and LowerTileOp say where another layout can help.
_OF_LAYOUTS = (
    "no available layout found",
    "Layout infer conflict",
    "Inconsistent layouts",
    "XOR-butterfly AllReduce requires",
    "has errors: (",
    "Loop layout is not injective",
)


class UnevenGroupsError(NotImplementedError):
    """Threads that share a value of a reduction are no whole groups one after another; another layout may have them so."""


# Runs before LayoutInference, on a module whose threads have been materialised.
LayOut = Callable[[IRModule], IRModule]


def with_plain_layouts(lower: Callable[[IRModule, Target, LayOut], IRModule]) -> Callable[[IRModule, Target], IRModule]:
    """Decorate the function that lowers by upstream's layouts: where they do not do, it lowers again with plain ones.

    Where these do not do either, what was said first is raised, in our words if it is of layouts.
    """

    @functools.wraps(lower)
    def lowered(mod: IRModule, target: Target) -> IRModule:
        try:
            return lower(mod, target, lambda threaded: threaded)
        except (InternalError, UnevenGroupsError) as error:
            first = error
        if not (isinstance(first, UnevenGroupsError) or any(part in str(first) for part in _OF_LAYOUTS)):
            raise first
        fragments = ""

        def described(threaded: IRModule) -> IRModule:
            nonlocal fragments
            fragments = _fragments_of(threaded)
            return threaded

        for prepare in (FuseLoops, lambda threaded: StageOperands(FuseLoops(threaded))):
            try:
                return lower(mod, target, lambda threaded, prepare=prepare: LayOutPlainly(prepare(described(threaded))))
            except (InternalError, UnevenGroupsError):
                continue
        if isinstance(first, UnevenGroupsError):
            raise first
        if not fragments:
            raise first
        raise ValueError(
            "T.Parallel: fragments that one loop uses must have a layout that all of them share; "
            f"got {fragments}; take threads that divide the elements of each tile, or copy a fragment through shared memory"
        )

    return lowered


def _fragments_of(mod: IRModule) -> str:
    """Fragments by name and shape, and the threads of their blocks."""
    fragments: list[str] = []
    threads: list[str] = []
    for func in mod.functions.values():
        for block in launched_blocks(func.body) if isinstance(func, tirx.PrimFunc) else ():
            before = len(fragments)

            def visit(node):
                if isinstance(node, tirx.SBlock):
                    fragments.extend(
                        f"{buffer.name} ({', '.join(map(str, buffer.shape))}) of {buffer.dtype}"
                        for buffer in node.alloc_buffers
                        if buffer.scope() == "local.fragment"
                    )

            post_order_visit(block.body, visit)
            if len(fragments) > before and str(block.threads) not in threads:
                threads.append(str(block.threads))
    if not fragments:
        return ""
    more = f" and {len(fragments) - _NAMED} more" if len(fragments) > _NAMED else ""
    return f"{', '.join(fragments[:_NAMED])}{more} and {' or '.join(threads)} threads"
