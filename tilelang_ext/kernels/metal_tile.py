"""Which tile a GEMM gets on Metal: the cheapest by a small model of threadgroup memory, registers, bytes and barriers.

No Mac has timed any of this. The model orders tiles by counts that the simulator can check; what a count costs is assumed:

    cycles of a simdgroup per 8x8x8 MMA = max(16 + threadgroup bytes / 32 + operations of decoding, device bytes / 2)
                                          + 30 per barrier

16 cycles are 512 multiplications by 32 lanes; 32 and 2 bytes per cycle are a quarter of what a core may get from threadgroup
memory and from its caches. Loads hide behind MMAs if the kernel loads the next step meanwhile, or if a second threadgroup fits
into threadgroup memory; if not, the two are added. A GPU of 10 cores runs 40 simdgroups at once: a problem that has fewer takes
as long as one that has 40.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

THREADGROUP_MEMORY = 32768  # bytes; the Metal Feature Set Tables have it for every Mac
SMALL_TILES = 2048  # bytes of it for scales, biases and indices of rows
ROW_PAD = 16  # bytes that T.gemm adds to a row of an operand in threadgroup memory
REGISTERS = 104  # 32-bit ones per thread for tiles, of 128 (dougallj/applegpu); the rest is for addresses
MMA = 8  # rows, columns and depth
LANES = 32
SHARE = 512  # least elements of C of a simdgroup: MLX's 16x16 read 128 bytes of threadgroup memory per MMA, 16x32 read 96
SIMDGROUPS = 40  # that run at once on the smallest GPU worth tuning for: 10 cores of 4
MXFP4_OPERATIONS, FP8_OPERATIONS = 20, 4  # that decode one element, as the text has them
BLOCKS_M, BLOCKS_N, THREADS = (8, 16, 32, 64, 128), (32, 64, 128), (64, 128, 256)

_MMA_CYCLES, _BARRIER_CYCLES = 16, 30
_THREADGROUP_BYTES_PER_CYCLE, _DEVICE_BYTES_PER_CYCLE = 32, 2


@dataclass(frozen=True)
class Gemm:
    """C (M, N) = A (M, K) B (K, N), `batch` times; bytes and operations are those of an element."""

    M: int
    N: int
    a_bytes: float = 2  # in threadgroup memory
    b_bytes: float = 2
    a_device_bytes: float = 2  # in device memory, with scales
    b_device_bytes: float = 2
    a_decoding: float = 0  # operations that decode an element on its way to threadgroup memory
    b_decoding: float = 0
    operand_decoding: float = 0  # the same on its way from there to the matrix unit
    b_group: int = 0  # elements of K of a row of B that share a scale, which one thread holds; 0 without scales
    is_prefetched: bool = False  # whether the tiles of the next step lie in registers while this one is multiplied
    products: int = 1  # tiles of B that one tile of A is multiplied with, each with its own C
    sums: int = 1  # float32 accumulators per element of C
    batch: int = 1


@dataclass(frozen=True)
class Tile:
    """Tile of a threadgroup, and its threads."""

    block_M: int
    block_N: int
    block_K: int
    threads: int

    @property
    def simdgroup(self) -> tuple[int, int]:
        """Rows and columns of C of one simdgroup, as `T.gemm` has it: of the smallest sum, with more rows of simdgroups."""
        simdgroups = self.threads // LANES
        shares = [
            (self.block_M // rows, self.block_N // (simdgroups // rows))
            for rows in range(simdgroups, 0, -1)
            if simdgroups % rows == 0 and self.block_M % (rows * MMA) == 0 and self.block_N % (simdgroups // rows * MMA) == 0
        ]
        return min(shares, key=sum, default=(0, 0))

    def memory(self, gemm: Gemm) -> float:
        """Bytes of threadgroup memory for the tiles of A and B."""
        rows = self.block_M * (self.block_K * gemm.a_bytes + ROW_PAD)
        return rows + gemm.products * self.block_N * (self.block_K * gemm.b_bytes + ROW_PAD)

    def registers(self, gemm: Gemm) -> float:
        """32-bit registers per thread for accumulators, the operands of one step of the matrix unit, and prefetched tiles."""
        rows, columns = self.simdgroup
        operands = (rows + columns) * MMA * 2 / LANES / 4  # products are of 16 bits
        bytes_of_row = self.block_M * gemm.a_device_bytes + gemm.products * self.block_N * gemm.b_device_bytes
        fetched = bytes_of_row * self.block_K / self.threads / 4 if gemm.is_prefetched else 0
        return rows * columns / LANES * gemm.products * gemm.sums + operands + fetched

    def device_bytes(self, gemm: Gemm) -> float:
        """Device bytes read per MMA: each threadgroup reads its rows of A and its columns of B once."""
        return MMA**3 * (gemm.a_device_bytes / (self.block_N * gemm.products) + gemm.b_device_bytes / self.block_M)

    def threadgroup_bytes_read(self, gemm: Gemm) -> float:
        """Threadgroup bytes read per MMA: a simdgroup reads a matrix of A once for its columns, one of B once for its rows."""
        rows, columns = self.simdgroup
        return MMA**3 * (gemm.a_bytes / columns + gemm.b_bytes / rows)

    def threadgroup_bytes_written(self, gemm: Gemm) -> float:
        """Threadgroup bytes written per MMA."""
        return MMA**3 * (gemm.a_bytes / (self.block_N * gemm.products) + gemm.b_bytes / self.block_M)

    def decoding(self, gemm: Gemm) -> float:
        """Operations of decoding per MMA, of 32 lanes each."""
        rows, columns = self.simdgroup
        to_memory = gemm.a_decoding / (self.block_N * gemm.products) + gemm.b_decoding / self.block_M
        return MMA**3 / LANES * (to_memory + gemm.operand_decoding * (1 / rows + 1 / columns))

    def barriers(self, gemm: Gemm) -> float:
        """Barriers per MMA of a threadgroup: two for each step along K."""
        return 2 * MMA**3 / (self.block_M * self.block_N * self.block_K * gemm.products)

    def fits(self, gemm: Gemm) -> bool:
        """Whether the tile can be split over its simdgroups in shares that are not too small, and has memory and registers."""
        rows, columns = self.simdgroup
        # With fewer groups than threads several threads would load the scale of each.
        has_groups = not gemm.b_group or self.block_N * self.block_K // gemm.b_group >= self.threads
        memory = self.memory(gemm) + SMALL_TILES
        return rows * columns >= SHARE and has_groups and memory <= THREADGROUP_MEMORY and self.registers(gemm) <= REGISTERS

    def cycles(self, gemm: Gemm) -> float:
        """Cycles of the GEMM per element of K, by the model: for comparing tiles."""
        threadgroups = gemm.batch * -(-gemm.M // self.block_M) * -(-gemm.N // self.block_N)
        simdgroups = self.threads // LANES
        mmas = self.block_M * self.block_N * gemm.products / MMA**3 / simdgroups  # of a simdgroup
        threadgroup_bytes = self.threadgroup_bytes_read(gemm) + self.threadgroup_bytes_written(gemm)
        compute = _MMA_CYCLES + threadgroup_bytes / _THREADGROUP_BYTES_PER_CYCLE + self.decoding(gemm)
        load = self.device_bytes(gemm) / _DEVICE_BYTES_PER_CYCLE
        hidden = gemm.is_prefetched or 2 * self.memory(gemm) <= THREADGROUP_MEMORY
        per_mma = (max(compute, load) if hidden else compute + load) + self.barriers(gemm) * simdgroups * _BARRIER_CYCLES
        return max(threadgroups * simdgroups, SIMDGROUPS) * mmas * per_mma


@functools.lru_cache(maxsize=4096)
def pick_tile(gemms: tuple[Gemm, ...], blocks_K: tuple[int, ...], blocks_M: tuple[int, ...] = BLOCKS_M) -> Tile:
    """Return the cheapest tile for all of these GEMMs together; on a tie the one with fewer threads.

    No tile is taller than the matrices need: the model has idle simdgroups multiply padding at no cost.
    """
    rows = max(gemm.M for gemm in gemms)
    tiles = [
        Tile(block_M, block_N, block_K, threads)
        for threads in THREADS
        for block_K in blocks_K
        for i, block_M in enumerate(blocks_M)
        if i == 0 or blocks_M[i - 1] < rows
        for block_N in BLOCKS_N
    ]
    fitting = [tile for tile in tiles if all(map(tile.fits, gemms))]
    return min(fitting, key=lambda tile: sum(map(tile.cycles, gemms)))
