"""One function that splits a tile among simdgroups, used by every matrix product on Metal."""

from __future__ import annotations

from tilelang.tileop.base import GemmWarpPolicy

from tilelang_ext.metal.layout import TILE, Partition


def partition_tile(M: int, N: int, simdgroups: int, policy: GemmWarpPolicy, tile_m: int = TILE, tile_n: int = TILE) -> Partition:
    """Return the grid of simdgroups over an M x N tile whose blocks are multiples of `tile_m` x `tile_n`.

    FullRow splits M only and FullCol N only, as far as the tile allows; Square takes the grid that reads the fewest operand
    elements, that is the smallest block height + width, and on a tie the one with more rows.
    """
    grids = [
        Partition(rows, simdgroups // rows)
        for rows in range(1, simdgroups + 1)
        if simdgroups % rows == 0 and M % (rows * tile_m) == 0 and N % (simdgroups // rows * tile_n) == 0
    ]
    if not grids:
        raise ValueError(
            f"T.gemm: the tile must split into {tile_m}x{tile_n} blocks over all simdgroups; "
            f"got a {M}x{N} tile and {simdgroups} simdgroups ({simdgroups * 32} threads); use fewer threads or a larger tile"
        )
    if policy.is_full_row():
        return max(grids, key=lambda grid: grid.rows)
    if policy.is_full_col():
        return max(grids, key=lambda grid: grid.cols)
    return min(grids, key=lambda grid: (M // grid.rows + N // grid.cols, -grid.rows))
