"""Which tile, and how many splits of K, `sm90_persistent` takes for a matmul: the fastest by a small model of an H200.

    busy   = waves * (K blocks of a unit * both(MMAs, TMA requests) + end of a unit)
    memory = bytes of a, b and out / rate
    time   = launch + both(busy, memory) + what the sum over splits takes

where both(x, y) is the greater and a part of the lesser, which does not overlap.

The constants were fitted to measured times of 60 sizes (docs/log/matmul.md). Only their order matters: the model chooses, it
does not promise.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Epilogue, Problem

CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14
BLOCK_K = 64  # elements of a swizzled row of 128 bytes of shared memory
_SUBTILE_BYTES = 128  # of a row of a subtile
_MAX_DEFERRED = 3  # subtiles of float32
_MAX_SPLITS = 16
_ROWS = 64  # of an MMA: numbers of rows between its multiples have the same choice, above those of thin tiles
_THIN = (16, 32)
_NEIGHBOURS = 16  # multiples that are tried on each side
_MIN_K_BLOCKS = 4  # of a split


@dataclass(frozen=True)
class Config:
    """Tile of a block, its consumer warpgroups, stages of the pipeline, columns and deferred ones of its subtiles, whether K is
    split, blocks of the grid, and rows of tiles that are walked together.
    """

    block_M: int
    block_N: int
    num_consumers: int
    num_stages: int
    subtile_N: int
    deferred: int
    is_split: bool
    num_blocks: int
    a_rows: int  # rows of A of a stage: those of the tile, or fewer
    cluster: int = 1  # blocks below each other, which share the loads of B
    group_rows: int = 8


@dataclass(frozen=True)
class Tile:
    """A tile that a kernel can have, and the time of its MMAs."""

    block_M: int
    block_N: int
    num_consumers: int
    num_stages: int  # that fit in 226 KB beside the buffers of subtiles
    deferred: int
    k_block_us: float  # of the MMAs of one K block
    cluster: int = 1
    thin: int = 0  # rows of A of a stage, where those are fewer than an MMA's

    @property
    def a_rows(self) -> int:
        return self.thin or self.block_M


TILES = (
    Tile(128, 256, 2, 4, 3, 0.717),
    Tile(256, 128, 2, 4, 1, 0.767),
    Tile(128, 192, 2, 4, 2, 0.555),
    Tile(128, 128, 2, 6, 1, 0.379),
    Tile(256, 64, 2, 4, 0, 0.454),
    Tile(128, 64, 2, 8, 0, 0.154),
    Tile(64, 256, 1, 4, 3, 0.395),
    Tile(64, 128, 1, 8, 1, 0.179),
    Tile(64, 64, 1, 12, 0, 0.101),
    # For numbers of tiles that fill waves of SMs; b lies K-major
    Tile(128, 224, 2, 4, 4, 0.680),
    Tile(128, 160, 2, 5, 3, 0.490),
    Tile(128, 96, 2, 6, 2, 0.320),
    # For rows that begin between multiples of 128 bytes, of which TMA loads half as many a microsecond
    Tile(128, 256, 2, 4, 3, 0.727, cluster=2),
    Tile(256, 128, 2, 4, 1, 0.778, cluster=2),
    Tile(128, 192, 2, 4, 2, 0.563, cluster=2),
    Tile(128, 128, 2, 6, 1, 0.384, cluster=2),
    Tile(128, 224, 2, 4, 4, 0.690, cluster=2),
    Tile(128, 160, 2, 5, 3, 0.497, cluster=2),
    Tile(128, 96, 2, 6, 2, 0.324, cluster=2),
    # For few rows: TMA takes long to fill rows past the end with zeros, and more stages fit
    *(Tile(64, 256, 1, stages, 3, 0.395, thin=thin) for thin, stages in ((16, 6), (32, 5))),
    *(Tile(64, 128, 1, stages, 1, 0.179, thin=thin) for thin, stages in ((16, 10), (32, 9))),
    *(Tile(64, 64, 1, 16, 0, 0.101, thin=thin) for thin in (16, 32)),
)
_LAUNCH_US, _UNIT_US = 1.83, 0.062
_MEMORY = 4.76e6  # bytes per microsecond
_OVERLAP, _OVERLAP_LOADS = 0.369, 0.041
_SUM_US, _SUM = 1.17, 4.24e6  # of the second kernel, beside its bytes; bytes per microsecond of accumulators, out and in
_TURN_US = 2.2  # of the copy of `a` to another order
# Of TMA, for a row of 128 bytes: in one line of memory, in two, past the end, and with its last part past the end
_ROW_US, _SPLIT_ROW_US, _EMPTY_ROW_US, _CUT_ROW_US = 0.0011, 0.00214, 0.00272, 0.005


def pick_config(problem: Problem) -> tuple[Config, int]:
    """Return the configuration and the number of splits with the least predicted time."""
    tile, splits = _pick(replace(problem, M=_rounded(problem.M)))
    return config_of(tile, problem, splits), splits


def is_turned(problem: Problem) -> bool:
    """Return whether an M-major `a` is first copied to K-major order."""
    if problem.a_is_k_major or _rounded(problem.M) not in _THIN or problem.K % TMA_ALIGNMENT:
        return False
    rounded = replace(problem, M=_rounded(problem.M))
    turned = replace(rounded, a_is_k_major=True)
    return _TURN_US + predicted_us(*_pick(turned), turned) < predicted_us(*_pick(rounded), rounded)


def rows_of_choice(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows, about those of the problem, that have its tile and its splits."""
    first = last = _rounded(problem.M)
    if first in _THIN:
        return ((0, *_THIN)[_THIN.index(first)] + 1, first)
    choice = _pick(replace(problem, M=first))
    for _ in range(_NEIGHBOURS):
        first -= _ROWS if first > _ROWS and _pick(replace(problem, M=first - _ROWS)) == choice else 0
        last += _ROWS if _pick(replace(problem, M=last + _ROWS)) == choice else 0
    return max(first - _ROWS, _THIN[-1]) + 1, last


def _rounded(M: int) -> int:
    return next((thin for thin in _THIN if thin >= M), _ceildiv(M, _ROWS) * _ROWS)


def config_of(tile: Tile, problem: Problem, splits: int = 1) -> Config:
    """Return the configuration of a tile: no subtile is deferred where the next unit has too few K blocks to store it in."""
    k_blocks = _ceildiv(problem.K, BLOCK_K)
    subtile_N = math.gcd(tile.block_N, _SUBTILE_BYTES // _bytes_of(problem.out_dtype))
    # Registers hold as many bytes of deferred subtiles for each dtype; the next unit must have the K blocks to store them in.
    count = tile.deferred if problem.out_dtype != "float32" else min(tile.deferred, _MAX_DEFERRED)
    deferred = count if k_blocks > 2 * count else 0
    if splits > 1:
        subtile_N = deferred = 0
    return Config(
        tile.block_M,
        tile.block_N,
        tile.num_consumers,
        tile.num_stages,
        subtile_N,
        deferred,
        splits > 1,
        problem.num_sms // tile.cluster * tile.cluster,
        tile.a_rows,
        tile.cluster,
    )


def choices(problem: Problem) -> Iterator[tuple[Tile, int]]:
    """Yield tiles and numbers of splits to try: splits that fill at most two waves of SMs, none of which has no K block."""
    for tile in TILES:
        M, k_blocks = problem.M, _ceildiv(problem.K, BLOCK_K)
        if tile.thin and (tile.thin < M or not problem.a_is_k_major):
            continue
        if tile.cluster > 1 and (tile.block_M >= M or not CLUSTERS):
            continue
        if tile.block_N % BLOCK_K and not problem.b_is_k_major:
            continue
        if tile.block_M > 128 and problem.epilogue != Epilogue():  # would spill: its accumulators are finished one by one
            continue
        units = _ceildiv(M, tile.block_M * tile.cluster) * tile.cluster * _ceildiv(problem.N, tile.block_N)
        for splits in range(1, max(1, min(_MAX_SPLITS, k_blocks // _MIN_K_BLOCKS)) + 1):
            is_whole = (splits - 1) * _ceildiv(k_blocks, splits) < k_blocks
            if splits == 1 or (is_whole and units * splits <= 2 * problem.num_sms):
                yield tile, splits


def predicted_us(tile: Tile, splits: int, problem: Problem) -> float:
    """Return the time that the model predicts."""
    M, N, K = problem.M, problem.N, problem.K
    tile_rows = _ceildiv(M, tile.block_M * tile.cluster) * tile.cluster
    waves = _ceildiv(tile_rows * _ceildiv(N, tile.block_N) * splits, problem.num_sms)
    k_blocks = _ceildiv(_ceildiv(K, BLOCK_K), splits)
    loads = _load_us(tile.a_rows, M, K if problem.a_is_k_major else M, problem.a_is_k_major, waves)
    loads += _load_us(tile.block_N, N, problem.b_row, problem.b_is_k_major, waves) / tile.cluster
    busy = waves * (k_blocks * _both(tile.k_block_us, loads, _OVERLAP_LOADS) + _UNIT_US)
    memory = (2 * (M * K + N * K) + _bytes_of(problem.out_dtype) * M * N) / _MEMORY
    add = _SUM_US + 8 * splits * M * N / _SUM if splits > 1 else 0.0
    return _LAUNCH_US + _both(busy, memory, _OVERLAP) + add


def _ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _both(one: float, other: float, part: float) -> float:
    return max(one, other) + part * min(one, other)


def _load_us(rows: int, extent: int, row: int, is_k_major: bool, waves: int) -> float:
    """Return the time of TMA for a tile of `rows` of `extent`, by the tile that takes longest where there is one wave."""
    inside = _SPLIT_ROW_US if row % BLOCK_K else _ROW_US
    if not is_k_major:  # rows of 64 of the extent, one for each k
        return rows * (_CUT_ROW_US if extent < BLOCK_K else inside)
    missing = -extent % rows / waves if extent > rows else rows - extent
    return (rows - missing) * inside + missing * _EMPTY_ROW_US


@functools.lru_cache(maxsize=4096)
def _pick(problem: Problem) -> tuple[Tile, int]:
    return min(choices(problem), key=lambda choice: predicted_us(*choice, problem))


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
