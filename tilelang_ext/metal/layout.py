"""Where a lane keeps its elements: the lane layouts of Metal's matrices and the tile layouts built on them.

Metal spreads a small matrix over the 32 lanes of a simdgroup in runs of neighbouring elements of one row. With
`q = lane >> 2` a lane's first run starts at

    row = (q & 4) | ((lane >> 1) & 3)        col = ((q & 2) | (lane & 1)) * run

`simdgroup_matrix<T, 8, 8>` has one run of two; a 16x16 block of a `mpp::tensor_ops` cooperative tensor has two runs of four,
the second 8 rows below. The same holds for A, B and C of every element type, so the result of one MMA can be an operand
of the next without conversion. (The layout is the one that MLX's matrix kernels rely on.)
"""

from __future__ import annotations

from dataclasses import dataclass

from tilelang.layout import Fragment, Layout
from tvm import DataType, tirx

LANES = 32
THREADGROUP_ROW_PAD_BYTES = 16


@dataclass(frozen=True)
class LaneLayout:
    """A `size` x `size` matrix over 32 lanes: runs of `run` neighbouring elements, the runs 8 rows apart."""

    size: int
    run: int

    @property
    def elements(self) -> int:
        """Elements of the matrix that one lane holds."""
        return self.size * self.size // LANES

    def lane(self, i, j):
        group = j // self.run
        return (i % 8) // 4 * 16 + group // 2 * 8 + i % 4 * 2 + group % 2

    def element(self, i, j):
        return i // 8 * self.run + j % self.run

    def row(self, lane, element):
        return lane // 16 * 4 + lane // 2 % 4 + element // self.run * 8

    def col(self, lane, element):
        return (lane // 8 % 2 * 2 + lane % 2) * self.run + element % self.run


SIMDGROUP_MATRIX = LaneLayout(size=8, run=2)
COOPERATIVE_TENSOR = LaneLayout(size=16, run=4)


@dataclass(frozen=True)
class Partition:
    """How the simdgroups of a threadgroup share an M x N tile: a grid of `rows` x `cols`, row index fastest."""

    rows: int
    cols: int

    def row(self, simdgroup):
        return simdgroup % self.rows

    def col(self, simdgroup):
        return simdgroup // self.rows


def accumulator_layout(shape, partition: Partition, matrix: LaneLayout) -> Fragment:
    """Return the layout of an M x N accumulator: each simdgroup owns one contiguous block of matrices, row by row."""
    block_rows, block_cols = int(shape[0]) // partition.rows, int(shape[1]) // partition.cols

    def forward(i, j):
        simdgroup = i // block_rows + partition.rows * (j // block_cols)
        return _place(simdgroup, i % block_rows, j % block_cols, block_cols, matrix)

    return Fragment(shape, forward_fn=forward)


def operand_layout(shape, partition: Partition, matrix: LaneLayout, operand: str, transposed: bool) -> Fragment:
    """Return the layout of a register operand, replicated over the simdgroups that share it.

    `operand` "A" is split along M over the partition's rows and replicated over its columns; "B" is split along N over
    the columns and replicated over the rows. `shape` is as stored: (M, K) or, transposed, (K, M); (K, N) or (N, K). The
    lanes follow the operand as it enters the MMA.
    """
    first, second = (int(extent) for extent in shape)
    height, width = (second, first) if transposed else (first, second)
    replicas = partition.cols if operand == "A" else partition.rows
    block_rows = height // partition.rows if operand == "A" else height
    block_cols = width // partition.cols if operand == "B" else width

    def forward(first_index, second_index, replica=0):
        i, j = (second_index, first_index) if transposed else (first_index, second_index)
        if operand == "A":
            simdgroup = i // block_rows + partition.rows * replica
        else:
            simdgroup = replica + partition.rows * (j // block_cols)
        return _place(simdgroup, i % block_rows, j % block_cols, block_cols, matrix)

    if replicas == 1:
        return Fragment(shape, forward_fn=lambda i, j: forward(i, j))
    return Fragment(shape, forward_fn=lambda i, j, replica: forward(i, j, replica.var), replicate=replicas)


def _place(simdgroup, i, j, block_cols: int, matrix: LaneLayout):
    size = matrix.size
    index = i // size * (block_cols // size) + j // size
    return simdgroup * LANES + matrix.lane(i % size, j % size), index * matrix.elements + matrix.element(i % size, j % size)


def padded_layout(buffer: tirx.Buffer) -> Layout:
    """Return a row-major layout with 16 bytes added to each row.

    Lanes read 8 rows at once; rows a multiple of 32 bytes apart would lie in the same banks. Leading dimensions (stages
    of a pipeline) are kept.
    """
    *lead, rows, cols = (int(extent) for extent in buffer.shape)
    bits = DataType(buffer.dtype).bits
    padded = cols + (THREADGROUP_ROW_PAD_BYTES * 8 // bits if cols * bits % 256 == 0 else 0)
    return Layout([*lead, rows, cols], lambda *index: [*index[:-2], index[-2] * padded + index[-1]])
