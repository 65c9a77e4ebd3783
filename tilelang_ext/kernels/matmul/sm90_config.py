"""Which tile, and how many splits of K, `sm90_persistent` takes for a matmul: the fastest by a small model of an H200.

    busy   = waves * (K blocks of a unit * both(MMAs, loads) + end of a unit)
    memory = bytes of a, b and out / rate
    time   = launch + both(busy, memory) + what the sum over splits takes

where both(x, y) is the greater and a part of the lesser, which does not overlap.

The constants were fitted to measured times of 135 sizes and layouts (docs/log/matmul.md). Only their order matters: the model
chooses, it does not promise.
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
    """A tile that a kernel can have."""

    block_M: int
    block_N: int
    num_consumers: int
    num_stages: int  # that fit in 226 KB beside the buffers of subtiles
    deferred: int
    cluster: int = 1
    thin: int = 0  # rows of A of a stage, where those are fewer than an MMA's

    @property
    def a_rows(self) -> int:
        return self.thin or self.block_M


TILES = (
    Tile(128, 256, 2, 4, 3),
    Tile(256, 128, 2, 4, 1),
    Tile(128, 192, 2, 4, 2),
    Tile(128, 128, 2, 6, 1),
    Tile(256, 64, 2, 4, 0),
    Tile(128, 64, 2, 8, 0),
    Tile(64, 256, 1, 4, 3),
    Tile(64, 128, 1, 8, 1),
    Tile(64, 192, 1, 6, 2),
    Tile(64, 64, 1, 12, 0),
    # For numbers of tiles that fill waves of SMs; b lies K-major
    Tile(128, 224, 2, 4, 4),
    Tile(128, 160, 2, 5, 3),
    Tile(128, 96, 2, 6, 2),
    Tile(64, 224, 1, 5, 4),
    Tile(64, 160, 1, 6, 3),
    Tile(64, 96, 1, 8, 2),
    Tile(64, 80, 1, 9, 0),
    Tile(64, 32, 1, 12, 0),
    # For loads that take longer than MMAs, as of rows that begin between multiples of 32 bytes: each block loads half of B
    Tile(128, 256, 2, 4, 3, cluster=2),
    Tile(256, 128, 2, 4, 1, cluster=2),
    Tile(128, 192, 2, 4, 2, cluster=2),
    Tile(128, 128, 2, 6, 1, cluster=2),
    Tile(128, 224, 2, 4, 4, cluster=2),
    Tile(128, 160, 2, 5, 3, cluster=2),
    Tile(128, 96, 2, 6, 2, cluster=2),
    Tile(64, 256, 1, 4, 3, cluster=2),
    Tile(64, 192, 1, 6, 2, cluster=2),
    Tile(64, 128, 1, 8, 1, cluster=2),
    Tile(64, 96, 1, 8, 2, cluster=2),
    # For few rows: TMA takes long to fill rows past the end with zeros, and more stages fit
    *(Tile(64, 256, 1, stages, 3, thin=thin) for thin, stages in ((16, 6), (32, 5))),
    *(Tile(64, 192, 1, stages, 2, thin=thin) for thin, stages in ((16, 7), (32, 6))),
    *(Tile(64, 160, 1, 8, 3, thin=thin) for thin in (16, 32)),
    *(Tile(64, 128, 1, stages, 1, thin=thin) for thin, stages in ((16, 10), (32, 9))),
    *(Tile(64, 96, 1, 12, 2, thin=thin) for thin in (16, 32)),
    *(Tile(64, 80, 1, 14, 0, thin=thin) for thin in (16, 32)),
    *(Tile(64, 64, 1, 16, 0, thin=thin) for thin in (16, 32)),
    *(Tile(64, 32, 1, 20, 0, thin=thin) for thin in (16, 32)),
)
_LAUNCH_US, _CLUSTER_US = 2.03, 1.36
_DOUBT = 1.01  # of a cluster, which must be the faster by more than the model errs between much the same tiles
_MEMORY = 3.69e6  # bytes per microsecond
_OVERLAP, _OVERLAP_LOADS = 0.22, 0.301
_SUM_US, _SUM = 1.54, 4.67e6  # of the second kernel, beside its bytes; bytes per microsecond of accumulators, out and in
_TURN_US = 2.2  # of the copy of `a` to another order
# MMAs of a K block: of each, and of an element of the tile; in a cluster a part longer
_MMA_US, _MMA_ELEMENT_US, _MMA_IN_CLUSTER = 0.0125, 1.658e-5, 1.022
_UNIT_US, _UNIT_ELEMENT_US = 0.075, 3.15e-6  # the end of a unit, and the stores of an element of the tile
# Of TMA, for a row of 128 bytes: one that begins at a multiple of 32 bytes, another, past the end, and with its last part there
_ROW_US, _SPLIT_ROW_US, _EMPTY_ROW_US, _CUT_ROW_US = 0.001255, 0.00207, 0.00161, 0.0012
_SHARED_ROW_US = 0.00821  # of those that all SMs load at the same time, since they are all that the operand has
_CACHE_ROW_US, _SPLIT_BYTES = 0.0014, 1.25  # of the L2 cache, where all SMs load; bytes of it beside those of a row
_SECTOR = 16  # elements of 32 bytes, the L2 cache's unit


def pick_config(problem: Problem) -> tuple[Config, int]:
    """Return the configuration and the number of splits with the least predicted time."""
    tile, splits = _pick(_rounded(problem))
    return config_of(tile, problem, splits), splits


def is_turned(problem: Problem) -> bool:
    """Return whether an M-major `a` is first copied to K-major order."""
    if problem.a_is_k_major or problem.M >= _ROWS or problem.K % TMA_ALIGNMENT:
        return False
    as_is, turned = (_rounded(replace(problem, a_is_k_major=is_k_major)) for is_k_major in (False, True))
    return _TURN_US + predicted_us(*_pick(turned), turned) < predicted_us(*_pick(as_is), as_is)


def rows_of_choice(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows, about those of the problem, that have its tile and its splits."""
    few = (0, *_few(problem))
    if few[-1] >= problem.M:
        at = next(i for i, rows in enumerate(few) if rows >= problem.M)
        return few[at - 1] + 1, few[at]
    first = last = _rounded(problem).M
    choice = _pick(replace(problem, M=first))
    for _ in range(_NEIGHBOURS):
        first -= _ROWS if first > _ROWS and _pick(replace(problem, M=first - _ROWS)) == choice else 0
        last += _ROWS if _pick(replace(problem, M=last + _ROWS)) == choice else 0
    return max(first - _ROWS, few[-1]) + 1, last


def _few(problem: Problem) -> tuple[int, ...]:
    """Return the most rows of each choice of few: of a thin tile, and of an M-major `a` that fills no panel."""
    return _THIN if problem.a_is_k_major else (*_THIN, _ROWS - TMA_ALIGNMENT)


def _rounded(problem: Problem) -> Problem:
    """Return the problem with the most rows that have its choice."""
    rows = next((rows for rows in _few(problem) if rows >= problem.M), _ceildiv(problem.M, _ROWS) * _ROWS)
    return replace(problem, M=rows)


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
    M, N, K, area = problem.M, problem.N, problem.K, tile.block_M * tile.block_N
    tile_rows, tile_columns = _ceildiv(M, tile.block_M * tile.cluster) * tile.cluster, _ceildiv(N, tile.block_N)
    units = tile_rows * tile_columns * splits
    waves, busy_sms = _ceildiv(units, problem.num_sms), min(1.0, units / problem.num_sms)
    k_blocks = _ceildiv(_ceildiv(K, BLOCK_K), splits)
    of_a = _load_us(tile.a_rows, M, _row_of_a(problem), problem.a_is_k_major, _ceildiv(M, tile.block_M), waves, busy_sms)
    of_b = _load_us(tile.block_N, N, problem.b_row, problem.b_is_k_major, tile_columns, waves, busy_sms)
    # What overlaps no better for being shared is as in one block.
    loads, alone = (max(one + other / blocks for one, other in zip(of_a, of_b, strict=True)) for blocks in (tile.cluster, 1))
    mma = (_MMA_US + _MMA_ELEMENT_US * area) * (_MMA_IN_CLUSTER if tile.cluster > 1 else 1.0)
    end = _UNIT_US + (_UNIT_ELEMENT_US * area if splits == 1 else 0.0)
    busy = waves * (k_blocks * (max(mma, loads) + _OVERLAP_LOADS * min(mma, alone)) + end)
    memory = (2 * (M * K + N * K) + _bytes_of(problem.out_dtype) * M * N) / _MEMORY
    add = _SUM_US + 8 * splits * M * N / _SUM if splits > 1 else 0.0
    us = _LAUNCH_US + _both(busy, memory, _OVERLAP) + add
    return (us + _CLUSTER_US) * _DOUBT if tile.cluster > 1 else us


def _ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _both(one: float, other: float, part: float) -> float:
    return max(one, other) + part * min(one, other)


def _row_of_a(problem: Problem) -> int:
    """Return the elements of a row of `a` in memory."""
    return problem.K if problem.a_is_k_major else problem.M


def _load_us(
    rows: int, extent: int, row: int, is_k_major: bool, tiles: int, waves: int, busy_sms: float
) -> tuple[float, float]:
    """Return the time of TMA and of the L2 cache for `rows` of an extent that is divided among `tiles`.

    Of the tile that takes longest where there is one wave, else of the mean.
    """
    inside = _SPLIT_ROW_US if row % _SECTOR else _ROW_US
    cache = busy_sms * _CACHE_ROW_US * (_SPLIT_BYTES if row % _SECTOR else 1.0)
    if is_k_major:
        missing = -extent % rows / waves if extent > rows else rows - extent
        return (rows - missing) * inside + missing * _EMPTY_ROW_US, (rows - missing) * cache
    # Panels of 64 rows, each of which is loaded by one row of 128 bytes for each k; the last one may be cut.
    cut = (1.0 if waves == 1 else 1 / tiles) if extent % BLOCK_K else 0.0
    whole = (_ceildiv(rows, BLOCK_K) - cut) * BLOCK_K
    us = whole * inside + cut * BLOCK_K * _CUT_ROW_US
    return us + (BLOCK_K * busy_sms * _SHARED_ROW_US if extent < BLOCK_K else 0.0), whole * cache


@functools.lru_cache(maxsize=4096)
def _pick(problem: Problem) -> tuple[Tile, int]:
    return min(choices(problem), key=lambda choice: predicted_us(*choice, problem))


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
