"""The persistent walk over tiles: every tile once, in the order that is documented; by running CUDA text on the CPU."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from kernels.hopper import execute

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler, start_stream_k


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


def divide(num_blocks: int):
    """The prim_func: visits (rows, columns, iterations), 1 + which block takes an iteration of a tile; ends (rows, columns, 2),
    1 + which block finishes a tile, and the last of those that it has accumulators from, or itself.
    """
    rows, columns, iterations = T.dynamic("rows"), T.dynamic("columns"), T.dynamic("iterations")

    @T.prim_func
    def divide(visits: T.Tensor((rows, columns, iterations), "int32"), ends: T.Tensor((rows, columns, 2), "int32")):
        with T.Kernel(num_blocks, threads=32) as block:
            row, column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
            tiles = GroupedTiles(8, columns, rows)
            work = start_stream_k(num_blocks, block, columns, rows, iterations)
            for i in T.serial(work.num_segments):
                work.take(i)
                tiles.tile_coord(work.tile, row, column)
                if T.get_thread_binding() == 0:
                    for k in T.serial(work.last - work.first):
                        visits[row[0], column[0], work.first + k] += block + 1
                    if not work.is_given:
                        ends[row[0], column[0], 0] += block + 1
                        ends[row[0], column[0], 1] = block
                        if work.first > 0:
                            ends[row[0], column[0], 1] = work.giver(work.givers - 1)

    return divide


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "columns", "iterations", "num_blocks"),
    # Whole tiles ahead of divided ones; several blocks for a tile; a tile begins with a part that begins between two
    # iterations, rounded down; parts that end with tiles; full waves; rows of tiles, for which a block is left over, or none
    [(1, 15, 5, 4), (1, 2, 9, 7), (1, 3, 5, 7), (1, 6, 4, 4), (1, 8, 3, 4), (3, 2, 9, 22), (2, 7, 5, 8), (4, 3, 4, 9)],
)
def test_divided_tiles(rows, columns, iterations, num_blocks):
    """Every iteration once; a tile's iterations go to neighbours of its row, the last of which finishes it."""
    visits = torch.zeros(rows, columns, iterations, dtype=torch.int32)
    ends = torch.zeros(rows, columns, 2, dtype=torch.int32)
    text = lower(divide(num_blocks), "sm_90a")
    sizes = {"rows": rows, "columns": columns, "iterations": iterations}
    execute(text, (num_blocks, 1), {"visits": visits, "ends": ends}, {}, sizes)
    blocks, row_blocks = visits - 1, num_blocks // rows
    assert (blocks >= 0).all()
    assert (blocks < row_blocks * rows).all(), "an iteration was taken twice"
    numbers = blocks // rows
    for row in range(rows):
        assert (blocks[row] % rows == row).all(), "blocks of its row"
        assert torch.equal(numbers[row], numbers[0]), "in step"
    assert ((numbers[..., 1:] - numbers[..., :-1]).unique().tolist()) in ([0], [0, 1], [1], []), "neighbours, in order"
    assert torch.equal(ends[..., 0] - 1, blocks[..., -1])
    assert torch.equal(ends[..., 1], blocks[..., 0])
    numbers = numbers[0]
    whole = columns if columns % row_blocks == 0 else max(columns // row_blocks - 1, 0) * row_blocks
    assert torch.equal(numbers[:whole, 0], torch.arange(whole, dtype=torch.int32) % row_blocks)
    assert (numbers[:whole] == numbers[:whole, :1]).all()
    parts = torch.bincount(numbers[whole:].flatten())
    taken = parts[parts > 0]
    assert not len(taken) or taken.max() - taken.min() <= 1, "equal parts"
    givers = [number for tile in numbers[whole:] for number in tile.unique().tolist() if number != tile[-1]]
    assert len(givers) == len(set(givers)), "a block has memory for one tile's accumulators"
