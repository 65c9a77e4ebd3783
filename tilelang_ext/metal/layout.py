"""Where a lane keeps its elements: the lane layout of a simdgroup matrix and the tile layouts built on it.

A `simdgroup_matrix<T, 8, 8>` gives each of the 32 lanes two neighbouring elements of one row. With `q = lane >> 2`

    row = (q & 4) | ((lane >> 1) & 3)        col = (q & 2) * 2 + (lane & 1) * 2        elements (row, col), (row, col + 1)

for A, B and C of every element type, so the result of one product can be an operand of the next as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilelang.layout import Fragment, Layout
from tvm import DataType, tirx

TILE = 8  # rows and columns of a simdgroup matrix
LANES = 32
ELEMENTS = 2  # elements of one simdgroup matrix a lane holds
THREADGROUP_ROW_PAD_BYTES = 16


def lane_of(row, col):
    """Return the lane that holds element (row, col) of an 8x8 simdgroup matrix; inverse of `row_of` and `col_of`."""
    return (row // 4) * 16 + (col // 4) * 8 + (row % 4) * 2 + (col % 4) // 2


def row_of(lane):
    """Return the row, 0 to 7, of the two elements that `lane` holds."""
    return (lane // 16) * 4 + (lane // 2) % 4


def col_of(lane):
    """Return the even column, 0 to 6, of the first of the two elements that `lane` holds."""
    return (lane // 8) % 2 * 4 + lane % 2 * 2


@dataclass(frozen=True)
class Partition:
    """How the simdgroups of a threadgroup share an M x N tile: a grid of `rows` x `cols`, row index fastest."""

    rows: int
    cols: int

    def row_of(self, simdgroup):
        return simdgroup % self.rows

    def col_of(self, simdgroup):
        return simdgroup // self.rows


def accumulator_layout(shape, partition: Partition) -> Fragment:
    """Return the layout of an M x N accumulator: each simdgroup owns one contiguous block of 8x8 matrices."""
    block_rows, block_cols = int(shape[0]) // partition.rows, int(shape[1]) // partition.cols

    def forward(i, j):
        simdgroup = i // block_rows + partition.rows * (j // block_cols)
        matrix = (i % block_rows) // TILE * (block_cols // TILE) + (j % block_cols) // TILE
        return simdgroup * LANES + lane_of(i % TILE, j % TILE), matrix * ELEMENTS + j % ELEMENTS

    return Fragment(shape, forward_fn=forward)


def operand_layout(shape, partition: Partition, operand: str, transposed: bool) -> Fragment:
    """Return the layout of a register operand, replicated over the simdgroups that share it.

    `operand` "A" is split along M over the partition's rows and replicated over its columns; "B" is split along N over
    the columns and replicated over the rows. `shape` is as stored: (M, K) or, transposed, (K, M); (K, N) or (N, K).
    """
    first, second = (int(extent) for extent in shape)
    height, width = (second, first) if transposed else (first, second)  # the operand as it enters the product
    replicas = partition.cols if operand == "A" else partition.rows
    block_rows = height // partition.rows if operand == "A" else height
    block_cols = width // partition.cols if operand == "B" else width

    def forward(first_index, second_index, replica=0):
        i, j = (second_index, first_index) if transposed else (first_index, second_index)
        if operand == "A":
            simdgroup = i // block_rows + partition.rows * replica
        else:
            simdgroup = replica + partition.rows * (j // block_cols)
        matrix = (i % block_rows) // TILE * (block_cols // TILE) + (j % block_cols) // TILE
        return simdgroup * LANES + lane_of(i % TILE, j % TILE), matrix * ELEMENTS + j % ELEMENTS

    if replicas == 1:
        return Fragment(shape, forward_fn=lambda i, j: forward(i, j))
    return Fragment(shape, forward_fn=lambda i, j, replica: forward(i, j, replica.var), replicate=replicas)


def padded_layout(buffer: tirx.Buffer) -> Layout:
    """Return a row-major layout with 16 bytes added to each row.

    Lanes read 8 rows at once; rows a multiple of 32 bytes apart would meet in the same banks. Leading dimensions (stages
    of a pipeline) are kept.
    """
    *lead, rows, cols = (int(extent) for extent in buffer.shape)
    bits = DataType(buffer.dtype).bits
    padded = cols + (THREADGROUP_ROW_PAD_BYTES * 8 // bits if cols * bits % 256 == 0 else 0)
    return Layout([*lead, rows, cols], lambda *index: [*index[:-2], index[-2] * padded + index[-1]])
