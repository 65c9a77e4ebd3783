"""What the kernels of decode on Hopper share: the keys of a thread block, and the producer that loads them."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import DecodeOperands, DecodeProblem
from tilelang_ext.kernels.sm90.roles import WARP

MAX_COLUMNS = 512
_MIN_BOX = 8  # rows of a swizzle's pattern


@dataclass(frozen=True, eq=False)
class Range:
    """The keys of a block, as `Softmax` asks for them: row r is token (row + r) // group of the sequence."""

    problem: DecodeProblem
    length: Any
    tokens: Any
    group: Any
    row: Any  # first row of the block
    first_block: Any  # of keys
    num_blocks: Any

    def position(self, row):
        return self.length - self.tokens + T.truncdiv(self.row + row, self.group)

    def first_key(self, row):
        return T.max(self.position(row) - self.problem.window + 1, 0) if self.problem.window else T.int32(0)

    def end_key(self, row):
        return T.min(self.length, self.position(row) + 1)

    def has_hidden(self, key, rows: tuple, block_N: int):
        """Return whether a row may not see a key of the block that begins at `key`."""
        past = key + block_N > self.end_key(rows[0])
        return past | (key < self.first_key(rows[1])) if self.problem.window else past


@T.macro
def produce(traits, operands, block):
    """One warp fills the pipeline: others, whom nothing keeps up with it, could miss a phase."""
    traits.roles.begin_producer()
    if block.thread < WARP:
        for step in T.serial(block.keys.num_blocks):
            _load(traits, operands, block, step)
            T.sync_warp()


def _load(traits: Any, operands: DecodeOperands, block: Any, step) -> None:
    """Fill the stage of a step with its block of keys and values, box by box; TMA clips what lies past the end."""
    pipeline, stage = block.pipeline, block.pipeline.stage(step)
    key = (block.keys.first_block + step) * traits.config.block_N
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for first in range(0, traits.config.block_N, traits.box):
        _load_box(traits, operands, block, stage, key + first, first)
    pipeline.commit_once(stage)


def _load_box(traits: Any, operands: DecodeOperands, block: Any, stage, key, first: int) -> None:
    page_size, box, barrier = traits.problem.page_size, traits.box, block.pipeline.full[stage]

    def load_panels(page, row):
        for cache, shared in ((operands.cache_k, block.k_s), (operands.cache_v, block.v_s)):
            count, _, width = (int(extent) for extent in shared.shape[1:])
            for i in range(count):
                source = cache[page, row : row + box, block.kv_head, i * width : (i + 1) * width]
                T.evaluate(T.tma_copy(source, shared[stage, i, first : first + box, :], barrier=barrier))

    @T.macro
    def emit():
        page = T.alloc_var("int32", block.batch)
        row = T.alloc_var("int32", key)
        if page_size:
            page = block.page_table[block.batch, T.min(T.truncdiv(key, page_size), block.page_table.shape[1] - 1)]
            row = T.truncmod(key, page_size)
        load_panels(page, row)

    emit()


def takes_pages(page_size: int, block_N: int) -> bool:
    """Return whether TMA boxes that are whole patterns of the swizzle lie in one page each, or there are no pages."""
    return page_size % block_N == 0 or (block_N % page_size == 0 and page_size % _MIN_BOX == 0)
