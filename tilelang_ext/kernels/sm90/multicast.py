"""TMA loads of a matrix that two blocks of a cluster share: each loads one half, and both receive both.

A row of a matrix that begins between multiples of 128 bytes takes TMA two requests to the L2 cache for 128 bytes, so that loads
would take longer than the MMAs; shared, they take half the requests.
"""

import math

from tilelang import tvm
from tvm import tirx

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.roles import WARP

BLOCKS = 2
_ROW = 64  # elements of 16 bits: the bytes of a swizzled row
_DATA_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTION_L2_128B, _FILL_ZERO = 0, 3, 2, 0  # CUtensorMap...
_EVICT_NORMAL = 0


def descriptor(matrix, box: tuple, axes: tuple | None = None):
    """Return a TMA descriptor of a contiguous tensor of 16-bit elements, for boxes whose rows are 128 bytes, swizzled by them.

    `axes` are the dimensions in the order of the coordinates, the last one first, as without them.
    """
    rank = len(box)
    axes = tuple(reversed(range(rank))) if axes is None else axes
    strides = [2] * rank
    for axis in reversed(range(rank - 1)):
        strides[axis] = matrix.shape[axis + 1] * strides[axis + 1]
    return T.create_tma_descriptor(
        _DATA_TYPES[str(matrix.dtype)],
        rank,
        matrix.data,
        *(matrix.shape[axis] for axis in axes),
        *(strides[axis] for axis in axes),
        *(box[axis] for axis in axes),
        *(1,) * rank,
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _PROMOTION_L2_128B,
        _FILL_ZERO,
    )


def load(descriptor, barrier, to, coordinates: tuple, blocks=(1 << BLOCKS) - 1):
    """Return the load of the box at `coordinates` to the same place `to` of both blocks, by one thread of one of them.

    `blocks` has a bit for the rank of each.
    """
    arguments = (descriptor, barrier, to, blocks, *coordinates)
    return tirx.call_intrin("handle", tvm.ir.Op.get("tl.tma_load_multicast"), *arguments, _EVICT_NORMAL)


def multicast(matrix, shared, stage, barrier, origin: tuple, is_k_major: bool, half, blocks=(1 << BLOCKS) - 1) -> None:
    """Load this block's half of a tile into a stage of both `blocks`; every thread of the producer warp calls it.

    `matrix` is (N, K) or, if it is not K-major, (K, N), of 16-bit elements; `shared` (stages, block_N, 64) or
    (stages, 64, block_N), which may be (stages, block_N / 64, 64, 64), swizzled by 128 bytes; `origin` the first k and the
    first row n of the tile; `half` is the number of this block's, 0 or 1. The barrier of the stage then expects the bytes of
    the whole tile.
    """
    _, *panels_of_shape, rows, columns = map(int, shared.shape)
    columns *= math.prod(panels_of_shape)
    size = rows * columns
    # What this block loads: rows of a K-major tile, or rows of every panel of 64 columns of the other.
    panels, box = columns // _ROW, rows // BLOCKS
    box_descriptor = descriptor(matrix, (box, _ROW))
    k, n = origin
    first_row, first_column = (n, k) if is_k_major else (k, n)

    def load_panel(panel: int):
        offset = stage * size + panel * rows * _ROW + half * (box * _ROW)
        to = shared.access_ptr(2, "handle", 1, offset, box * _ROW)
        return load(box_descriptor, barrier, to, (first_column + panel * _ROW, first_row + half * box), blocks)

    @T.macro
    def emit():
        if T.shuffle_elect(WARP):
            T.mbarrier_expect_tx(barrier, size * 2)
            for panel in T.unroll(panels):
                T.evaluate(load_panel(panel))

    emit()
