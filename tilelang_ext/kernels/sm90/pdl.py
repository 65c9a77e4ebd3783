"""Programmatic dependent launch: a kernel begins while the one before it on the stream still runs.

`wait` and `trigger` are both needed in every kernel of a chain. Before `wait`, a kernel may only read what no kernel before it
writes, weights for one. After `trigger`, the next kernel of the stream may begin; it may then take SMs that this one needs for
blocks that have not begun, so a persistent kernel, all blocks of which run, triggers first thing.
"""

from tilelang_ext import language as T


def wait() -> None:
    """Wait until the kernels before this one on the stream have ended and their writes can be seen."""
    T.evaluate(T.pdl_sync())


def trigger() -> None:
    """Let the next kernel of the stream begin, once every block of this one has come here or ended."""
    T.evaluate(T.pdl_trigger())
