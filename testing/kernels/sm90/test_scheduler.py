"""The persistent walk over tiles: every tile once, in the order that is documented; by running CUDA text on the CPU."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from kernels.hopper import execute

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler


def walk(num_blocks: int, group_rows: int, tile_columns: int):
    """The prim_func: rows (R,) -> visits (R, tile_columns, 2), which block takes a tile and in which of its waves."""
    R = T.dynamic("R")

    @T.prim_func
    def walk(visits: T.Tensor((R, tile_columns, 2), "int32")):
        with T.Kernel(num_blocks, threads=32) as block:
            row, column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
            tiles = GroupedTiles(group_rows, tile_columns, R)
            scheduler = PersistentScheduler(num_blocks, block, tiles.num_tiles)
            for wave in T.serial(scheduler.num_waves):
                tiles.tile_coord(scheduler.tile(wave), row, column)
                if T.get_thread_binding() == 0:
                    visits[row[0], column[0], 0] += block + 1
                    visits[row[0], column[0], 1] += wave + 1

    return walk


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "num_blocks", "group_rows"), [(11, 3, 5, 8), (8, 2, 3, 4), (2, 1, 4, 8)])
def test_grouped_tiles(rows, columns, num_blocks, group_rows):
    """The last group has fewer rows, or is full; there are more tiles than blocks, or fewer."""
    visits = torch.zeros(rows, columns, 2, dtype=torch.int32)
    text = lower(walk(num_blocks, group_rows, columns), "sm_90a")
    execute(text, (num_blocks, 1), {"visits": visits}, {}, {"R": rows})
    order = [
        (row, column)
        for first in range(0, rows, group_rows)
        for column in range(columns)
        for row in range(first, min(first + group_rows, rows))
    ]
    expected = torch.zeros_like(visits)
    for tile, (row, column) in enumerate(order):
        expected[row, column] = torch.tensor([tile % num_blocks + 1, tile // num_blocks + 1])
    assert torch.equal(visits, expected)
