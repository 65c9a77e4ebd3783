"""One function that splits a tile among simdgroups, used by every `T.gemm` on Metal."""

from __future__ import annotations

from tilelang.tileop.base import GemmWarpPolicy

from tilelang_ext.metal.layout import LANES, Partition


def partition_tile(M: int, N: int, threads: int, policy: GemmWarpPolicy, block_m: int, block_n: int) -> Partition:
    """Return the grid of simdgroups over an M x N tile, each with a whole number of `block_m` x `block_n` blocks.

    FullRow splits M only and FullCol N only, as far as the tile allows; Square takes the grid that reads the fewest operand
    elements, which is the one with the smallest block height + width, and on a tie the one with more rows.
    """
    simdgroups = threads // LANES
    grids = [
        Partition(rows, simdgroups // rows)
        for rows in range(1, simdgroups + 1)
        if simdgroups % rows == 0 and M % (rows * block_m) == 0 and N % (simdgroups // rows * block_n) == 0
    ]
    if not grids:
        raise ValueError(
            f"T.gemm: the tile must split into {block_m}x{block_n} blocks over all simdgroups; "
            f"got a {M}x{N} tile and {simdgroups} simdgroups ({threads} threads); use fewer threads or a larger tile"
        )
    if policy.is_full_row():
        return max(grids, key=lambda grid: grid.rows)
    if policy.is_full_col():
        return max(grids, key=lambda grid: grid.cols)
    return min(grids, key=lambda grid: (M // grid.rows + N // grid.cols, -grid.rows))
