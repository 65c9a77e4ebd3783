"""Which lane and register of a block hold an element of an operand or accumulator: tile layouts from `instructions.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tilelang.layout import Fragment

from tilelang_ext.rocm.instructions import TILE, MatrixInstruction


@dataclass(frozen=True)
class Partition:
    """How the waves of a block share an M x N tile: a grid of `rows` x `cols`, row index fastest, as in tilelang."""

    rows: int
    cols: int


def accumulator_layout(shape, partition: Partition, instruction: MatrixInstruction) -> Fragment:
    """Return the layout of an M x N accumulator: each wave owns one block of 16x16 tiles, in row-major order."""
    block_rows, block_cols = int(shape[0]) // partition.rows, int(shape[1]) // partition.cols
    place = instruction.accumulator

    def forward(i, j):
        wave = i // block_rows + partition.rows * (j // block_cols)
        tile = i % block_rows // TILE * (block_cols // TILE) + j % block_cols // TILE
        lane = place.lane(i % TILE, j % TILE)
        return wave * place.wave + lane, tile * place.elements + place.element(i % TILE, j % TILE)

    return Fragment(shape, forward_fn=forward)


def operand_layout(
    shape, partition: Partition, instruction: MatrixInstruction, run: int, operand: str, k_is_first: bool
) -> Fragment:
    """Return the layout of operand "A" or "B" in registers, repeated in the waves that share its rows or columns.

    `shape` is as stored, with K first if `k_is_first`. Lanes past the instruction's groups repeat the first ones.
    """
    extent = int(shape[1] if k_is_first else shape[0])
    waves, sharers = (partition.rows, partition.cols) if operand == "A" else (partition.cols, partition.rows)
    block = extent // waves
    groups, wave_size = instruction.groups, instruction.accumulator.wave
    copies = wave_size // (TILE * groups)

    def forward(first, second, replica=0):
        i, k = (second, first) if k_is_first else (first, second)
        sharer, copy = replica // copies, replica % copies
        wave = i // block + partition.rows * sharer if operand == "A" else sharer + partition.rows * (i // block)
        lane = (copy * groups + k // run % groups) * TILE + i % TILE
        register = (k // (groups * run) * (block // TILE) + i % block // TILE) * run + k % run
        return wave * wave_size + lane, register

    if sharers * copies == 1:
        return Fragment(shape, forward_fn=lambda first, second: forward(first, second))
    return Fragment(
        shape, forward_fn=lambda first, second, replica: forward(first, second, replica.var), replicate=sharers * copies
    )
