"""Rewriting of statements node by node."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.stmt_functor import ir_transform


def rewritten(stmt: tirx.Stmt, rewrite: Callable, kinds: list[str]) -> tirx.Stmt:
    """Return `stmt` with `rewrite(node)` in place of each node of `kinds`, children first; None leaves a node as it is.

    What `rewrite` raises is raised here: through TVM it would come with the whole way it took, dozens of lines of C++.
    """
    errors: list[Exception] = []

    def guarded(node):
        if errors:
            return None
        try:
            return rewrite(node)
        except Exception as error:
            errors.append(error)
            return None

    stmt = ir_transform(stmt, None, guarded, kinds)
    if errors:
        raise errors[0]
    return stmt


def with_buffers(stmt: tirx.Stmt, buffers: list[tirx.Buffer]) -> tirx.Stmt:
    """Return `stmt` whose innermost first block allocates `buffers` too."""
    held = list(buffers)

    def allocate(block):
        if not held:
            return None
        allocated = [*block.alloc_buffers, *held]
        held.clear()
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, allocated, block.match_buffers,
            block.annotations,
        )  # fmt: skip

    return ir_transform(stmt, None, allocate, ["tirx.SBlock"])
