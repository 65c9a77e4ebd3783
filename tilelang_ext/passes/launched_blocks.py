"""The blocks that a tile program launches: a prim_func may hold several `T.Kernel`, each with threads of its own."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.stmt_functor import pre_order_visit


@dataclass(frozen=True)
class LaunchedBlock:
    """The threads of a block, the variables that number them, and what they run."""

    threads: int
    variables: tuple[tirx.Var, ...]
    body: tirx.Stmt


def launched_blocks(body: tirx.Stmt) -> list[LaunchedBlock]:
    """Return the blocks of a function whose threads have been materialised."""
    found = []

    def visit(node):
        if not _binds_thread(node):
            return True
        threads, variables = 1, []
        while _binds_thread(node):
            threads *= int(node.value)
            variables.append(node.node.var)
            node = node.body
        found.append(LaunchedBlock(threads, tuple(variables), node))
        return False

    pre_order_visit(body, visit)
    return found


def _binds_thread(node) -> bool:
    return isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent" and node.node.thread_tag.startswith("threadIdx")
