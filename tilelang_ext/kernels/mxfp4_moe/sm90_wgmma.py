"""The two products of a mixture of experts on Hopper by products of a warpgroup: bfloat16 or E4M3 activations, MXFP4 weights.

Weights are the left operand, so that decoded codes go into the matrix unit from registers, and tokens the columns. Blocks stay
for all of the product and take every so many tiles of it, rows of weights by tokens of one expert. A loading warpgroup
keeps a ring of stages filled by bulk copies, and does not stop between tiles: the tokens, 128 bytes of each at a time, and the
weights as they lie. Two computing warpgroups decode what the next step takes while the matrix unit multiplies this one's; they
do not wait for each other, so that one stores while the other multiplies. Tokens are in sorted order, since a bulk copy cannot
pick rows.

E4M3 sums of tokens are multiplied by the scale of the token and by the power of two of the row.

A product reads 128 bytes of its tokens a step and 34 (bfloat16) or 68 (E4M3) of its rows: few tokens an expert take many rows a
block, which reads tokens less often; many take 128 rows by up to 256 tokens, which decodes weights less often. What was
measured is in docs/design/performance.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, Problem
from tilelang_ext.kernels.mxfp4_moe.routing import TOKEN_BITS
from tilelang_ext.kernels.mxfp4_moe.sm90_decode import BFLOAT16, TILE, TILE_FORMATS, TileFormat, decode

PARTIAL_DTYPE, USES_PDL = "bfloat16", True

# Barriers order everything here, and one that upstream adds would be met by the elected thread alone.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_WARPGROUP = 128  # threads
_COMPUTING = 2  # warpgroups
_COMPUTING_THREADS = _COMPUTING * _WARPGROUP
_THREADS = _COMPUTING_THREADS + _WARPGROUP
_LOADER_REGISTERS, _COMPUTER_REGISTERS = 40, 232
_PART = 64  # columns that a warpgroup stores at a time
_TOKENS_OF_PART = 72  # likewise, at most
_READY = 4  # times eight tokens whose results a thread has before it stores the first: loads are not moved across a store
_PAD = 8  # elements, against bank conflicts
_LEFT_WORDS = 16  # registers of the left operand for a tile
_PRODUCTS = 4  # of a step and tile, 32 bytes of K each
_TOKEN = (1 << TOKEN_BITS) - 1
_SWIZZLE_128B = 1  # of a shared memory descriptor; its rows of eight lie 1024 bytes apart
_DESCRIPTOR = 16  # bytes that descriptors count in


@dataclass(frozen=True)
class Config:
    """Tokens of a tile; bands of 64 rows of a computing warpgroup; stages of the ring."""

    block_M: int
    tiles: int
    num_stages: int

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return _COMPUTING * self.tiles * TILE

    @property
    def part_M(self) -> int:
        """Tokens that a warpgroup stores at a time: as many as divide the tile."""
        return next(part for part in range(_TOKENS_OF_PART, 0, -8) if self.block_M % part == 0)

    @property
    def ready(self) -> int:
        """Eights of tokens of a part whose results are ready before the first is stored."""
        return next(eights for eights in range(_READY, 0, -1) if self.part_M // 8 % eights == 0)


# By the rows that an expert has when all experts are equally busy; each is the fastest of some on an H200 at the sizes of
# docs/design/performance.md. The bounds between them were not searched.
_TABLES = {
    "bfloat16": (
        # (rows per expert up to, config)
        (12, Config(16, 4, 10)),  # tokens are read for 512 rows of weights
        (18, Config(24, 4, 9)),
        (40, Config(48, 2, 13)),
        (80, Config(80, 2, 9)),
        (400, Config(128, 2, 7)),
        (None, Config(256, 1, 5)),
    ),
    "fp8": (
        (6, Config(8, 2, 11)),
        (12, Config(16, 4, 5)),
        (18, Config(32, 2, 9)),
        (40, Config(48, 2, 8)),
        (80, Config(80, 2, 7)),
        (400, Config(144, 1, 7)),  # two tiles for 256 +- 16 rows
        (None, Config(256, 1, 4)),  # a tile of weights is decoded for twice the tokens
    ),
}
# Instead of tiles of 512 rows of weights, where those leave more SMs without work in the last wave.
_OF_256_ROWS = {
    "bfloat16": {Config(16, 4, 10): Config(16, 2, 18), Config(24, 4, 9): Config(24, 2, 17)},
    "fp8": {Config(16, 4, 5): Config(16, 2, 11)},
}


def pick_config(problem: Problem) -> Config:
    """Return the tile for a problem, by the rows that an expert has when all experts are equally busy."""
    table = _TABLES[problem.a_format]
    return next(config for most, config in table if most is None or problem.rows_per_expert <= most)


def fitted(config: Config, problem: Problem, rows: int) -> Config:
    """Return `config` for weights of `rows` per expert, or one of half the rows per tile if that takes a tenth less time.

    Time is taken to be the rows that an SM computes in all waves.
    """
    smaller = _OF_256_ROWS[problem.a_format].get(config, config)

    def rows_of_sm(one: Config) -> int:
        tiles = problem.num_local_experts * -(-rows // one.rows)
        return -(-tiles // problem.num_sms) * one.rows

    return smaller if rows_of_sm(smaller) < 0.9 * rows_of_sm(config) else config


def _product(config: Config, num_blocks: int, operand: TileFormat, fetch, epilogue):
    """Return the macro of a product.

    `epilogue(sinks, acc, buffer, row0, row_tile, warpgroup, thread)` takes the sums of a tile, for each thread of a warpgroup.
    Those of tile m lie at m * block_M / 2: of columns 8 n + 2 t and the next, two of row g, then two of row g + 8. What it
    needs beside them, `fetch(sinks, buffer, full, stage, expert, row0, row_tile)` has begun to copy, by one thread, under the
    barrier full[stage]: there are two buffers, of tiles in turn.
    """
    block_M, tiles, num_stages = config.block_M, config.tiles, config.num_stages
    sums, lane_words, tile_words = block_M // 2, operand.lane_words, operand.tile_words
    tiles_of_block = _COMPUTING * tiles
    scale_words = operand.K // MX_GROUP // 2  # of a lane, for rows g and g + 8
    row_bytes = 128  # of a token in a stage

    @T.macro
    def advance(ring):
        """Go on to the next stage. Where it is a count of steps instead, the ring has to be a power of two not to be slow."""
        ring[0] = ring[0] + 1
        if ring[0] == num_stages:
            ring[0] = 0
            ring[1] = ring[1] ^ 1

    @T.macro
    def load_weights(w, W_s, full, expert, row_tile, row_tiles, step, stage):
        # Not T.tma_copy, which takes one dimension only where it can prove that it stays inside, and an expert is read.
        if T.shuffle_elect(_WARPGROUP):
            T.mbarrier_expect_tx(full[stage], tiles_of_block * tile_words * 4)
            for i in T.unroll(tiles_of_block):
                tile = T.min(row_tile + i, row_tiles - 1)
                T.tma_load(
                    T.address_of(W_s[stage, i, 0]), T.address_of(w[expert, tile, step, 0]), full[stage], tile_words * 4, 0
                )

    @T.macro
    def load(x, w, expert_ids, X_s, W_s, full, empty, taken, sinks, block, items, columns, row_tiles, steps):
        """Fill the ring for every tile of the block."""
        T.dec_max_nreg(_LOADER_REGISTERS)
        ring = T.alloc_local((2,), "int32")  # stage and phase
        ring[0], ring[1] = 0, 1
        T.pdl_sync()
        T.pdl_trigger()
        for turn in T.serial(T.ceildiv(items - block, num_blocks)):
            by = T.alloc_var("int32", T.truncdiv(turn * num_blocks + block, columns))
            row_tile = T.alloc_var("int32", (turn * num_blocks + block - by * columns) * tiles_of_block)
            expert = T.alloc_var("int32", expert_ids[by])
            for step in T.serial(steps):
                stage = ring[0]
                T.barrier_wait(empty[stage], ring[1])
                T.tma_copy(
                    x[by * block_M : (by + 1) * block_M, step * operand.K : (step + 1) * operand.K],
                    X_s[stage, :, :],
                    barrier=full[stage],
                )
                load_weights(w, W_s, full, expert, row_tile, row_tiles, step, stage)
                if step == 0:
                    T.barrier_wait(taken[turn % 2], (turn // 2 & 1) ^ 1)
                    if T.shuffle_elect(_WARPGROUP):
                        fetch(sinks, turn % 2, full, stage, expert, by * block_M, row_tile)
                T.barrier_arrive(full[stage])
                advance(ring)

    def decode_tiles(W_s, own, A_r, stage, warpgroup, warp, lane, buffer: int):
        for m in range(tiles):

            @T.macro
            def emit():
                codes, scales = own
                for part in T.unroll(lane_words // 4):
                    for v in T.vectorized(4):
                        codes[part * 4 + v] = W_s[
                            stage, warpgroup * tiles + m, ((warp * (lane_words // 4) + part) * 32 + lane) * 4 + v
                        ]
                for v in T.vectorized(scale_words):
                    scales[v] = W_s[stage, warpgroup * tiles + m, 128 * lane_words + (warp * 8 + lane // 4) * scale_words + v]
                decode(operand, codes, scales, A_r, (buffer * tiles + m) * _LEFT_WORDS)

            emit()

    def multiply(descriptor, A_r, acc, stage, buffer: int):
        @T.macro
        def emit():
            # The same number, but the compiler can see that all threads have it, and keeps descriptors in uniform registers.
            own = T.alloc_var("int32", T.call_pure_extern("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), stage, 0))
            for k in T.unroll(_PRODUCTS):
                for m in T.unroll(tiles):
                    T.ptx_wgmma_rs(
                        "float32", f"m64n{block_M}k{operand.K // _PRODUCTS}", True, operand.ptx, operand.ptx, "fp32",
                        A_r.data, (buffer * tiles + m) * _LEFT_WORDS + 4 * k,
                        descriptor.data, (own * block_M * row_bytes + k * 32) // _DESCRIPTOR,
                        acc.data, m * sums, T.bool(True), 1, 1,
                    )  # fmt: skip

        emit()

    @T.macro
    def release(empty, stage, lane):
        if lane == 0:
            T.mbarrier_arrive(empty[stage])

    def step_of_turn(W_s, own, full, empty, A_r, acc, descriptor, ring, step, steps, warpgroup, warp, lane, buffer: int):
        """Multiply what has been decoded, and decode the next step's tiles while that runs."""

        @T.macro
        def emit():
            T.warpgroup_arrive()
            multiply(descriptor, A_r, acc, ring[0], buffer)
            T.warpgroup_commit_batch()
            if step > 0:
                T.wait_wgmma(1)
                release(empty, T.if_then_else(ring[0] == 0, num_stages, ring[0]) - 1, lane)
            if step + 1 < steps:
                advance(ring)
                T.barrier_wait(full[ring[0]], ring[1])
                decode_tiles(W_s, own, A_r, ring[0], warpgroup, warp, lane, 1 - buffer)

        emit()

    @T.macro
    def compute(X_s, W_s, full, empty, taken, sinks, block, items, columns, steps, thread):
        T.inc_max_nreg(_COMPUTER_REGISTERS)
        A_r = T.alloc_local((2 * tiles * _LEFT_WORDS,), "uint32")
        acc = T.alloc_local((tiles * sums,), "float32")
        # Of a tile. Allocated here: the compiler's passes take long over buffers in inner scopes.
        own = [T.alloc_local((words,), "uint32") for words in (lane_words, scale_words)]
        ring = T.alloc_local((2,), "int32")  # stage and phase
        descriptor = T.alloc_wgmma_desc()
        warpgroup, warp, lane = thread // _WARPGROUP, thread % _WARPGROUP // 32, thread % 32
        T.initialize_wgmma_descriptor(descriptor, X_s.access_ptr("r"), _SWIZZLE_128B, 1, 1024 // _DESCRIPTOR)
        ring[0], ring[1] = 0, 0
        T.pdl_sync()
        for turn in T.serial(T.ceildiv(items - block, num_blocks)):
            by = T.alloc_var("int32", T.truncdiv(turn * num_blocks + block, columns))
            row_tile = T.alloc_var("int32", (turn * num_blocks + block - by * columns) * tiles_of_block + warpgroup * tiles)
            for i in T.unroll(tiles * sums):
                acc[i] = T.float32(0)
            T.barrier_wait(full[ring[0]], ring[1])
            decode_tiles(W_s, own, A_r, ring[0], warpgroup, warp, lane, 0)
            for pair in T.serial(T.ceildiv(steps, 2)):
                step_of_turn(W_s, own, full, empty, A_r, acc, descriptor, ring, 2 * pair, steps, warpgroup, warp, lane, 0)
                if 2 * pair + 1 < steps:
                    step_of_turn(
                        W_s, own, full, empty, A_r, acc, descriptor, ring, 2 * pair + 1, steps, warpgroup, warp, lane, 1
                    )
            T.wait_wgmma(0)
            release(empty, ring[0], lane)
            advance(ring)
            epilogue(sinks, acc, turn % 2, by * block_M, row_tile, warpgroup, thread % _WARPGROUP)
            release(taken, turn % 2, lane)

    @T.macro
    def product(x, w, expert_ids, num_valid, sinks, block, columns, row_tiles, steps):
        X_s = T.alloc_shared((num_stages, block_M, operand.K), operand.dtype)
        W_s = T.alloc_shared((num_stages, tiles_of_block, tile_words), "uint32")
        T.annotate_layout({X_s: make_swizzled_layout(X_s)})
        full = T.alloc_barrier([_WARPGROUP] * num_stages)
        empty = T.alloc_barrier([_COMPUTING_THREADS // 32] * num_stages)  # a warp each
        taken = T.alloc_barrier([_COMPUTING_THREADS // 32] * 2)
        tx = T.get_thread_binding()
        items = num_valid[0] // block_M * columns
        # The last threads load: a warpgroup's four warps begin at a multiple of four.
        if tx < _COMPUTING_THREADS:
            compute(X_s, W_s, full, empty, taken, sinks, block, items, columns, steps, tx)
        else:
            load(x, w, expert_ids, X_s, W_s, full, empty, taken, sinks, block, items, columns, row_tiles, steps)

    return product


@T.macro
def _meet(warpgroup):
    """Wait for the other threads of the warpgroup. A barrier that is no constant would reserve all sixteen."""
    if warpgroup == 0:
        T.sync_threads(barrier_id=1, arrive_count=_WARPGROUP)
    else:
        T.sync_threads(barrier_id=2, arrive_count=_WARPGROUP)


def _put_rows(part_M: int, width: int, put):
    """The macro that stores what a warpgroup has in sinks.out_s (warpgroups, part_M, columns), and frees that.

    `put(sinks, buffer, warpgroup, row0, part, row, first_tile, column)` stores eight elements of a row of the part.
    """
    pieces = width // 8

    @T.macro
    def put_rows(sinks, buffer, warpgroup, thread, row0, part, first_tile):
        _meet(warpgroup)
        for turn in T.serial(-(-part_M * pieces // _WARPGROUP)):
            place = turn * _WARPGROUP + thread
            row, column = place // pieces, place % pieces * 8
            if row < part_M:
                put(sinks, buffer, warpgroup, row0, part, row, first_tile, column)
        _meet(warpgroup)

    return put_rows


def _fetch(config: Config, operand: TileFormat):
    """The macros that begin to copy bias and power of a tile's rows, and a vector's elements for its tokens; and the one that
    takes what rows g and g + 8 need from the first.
    """
    tiles, block_M = _COMPUTING * config.tiles, config.block_M

    @T.macro
    def fetch_rows(sinks, buffer, full, stage, expert, row_tile):
        T.mbarrier_expect_tx(full[stage], tiles * TILE * 4 * (1 if operand is BFLOAT16 else 2))
        for i in T.unroll(tiles):
            row = T.min(row_tile + i, sinks.row_tiles - 1) * TILE
            bias_s, power_s = T.address_of(sinks.bias_s[buffer, i * TILE]), T.address_of(sinks.power_s[buffer, i * TILE])
            T.tma_load(bias_s, T.address_of(sinks.bias[expert, row]), full[stage], TILE * 4, 0)
            if operand is not BFLOAT16:
                T.tma_load(power_s, T.address_of(sinks.power[expert, row]), full[stage], TILE * 4, 0)

    @T.macro
    def fetch_tokens(vector, vector_s, buffer, full, stage, row0):
        T.mbarrier_expect_tx(full[stage], block_M * 4)
        T.tma_load(T.address_of(vector_s[buffer, 0]), T.address_of(vector[row0]), full[stage], block_M * 4, 0)

    @T.macro
    def take_rows(sinks, buffer, row):
        for v in T.unroll(2):
            sinks.rows_bias[v] = sinks.bias_s[buffer, row + v * 8]
            sinks.rows_power[v] = T.float32(1) if operand is BFLOAT16 else sinks.power_s[buffer, row + v * 8]

    return fetch_rows, fetch_tokens, take_rows


def _take_tokens(config: Config, vector_s, own, buffer, first, t):
    """Load what a thread of t needs of a vector for config.ready eights of tokens from `first` on."""

    @T.macro
    def emit():
        for n in T.unroll(config.ready):
            for i in T.vectorized(2):
                own[n * 2 + i] = vector_s[buffer, first + n * 8 + t * 2 + i]

    emit()


def _sigmoid(x):
    """Without the branches of an exact division, behind which nothing is moved ahead; bfloat16 holds less."""
    exponential = T.call_pure_extern("float32", "__expf", -x)
    return T.call_pure_extern("float32", "__fdividef", T.float32(1), T.float32(1) + exponential)


def slots_type(epilogue: str, tokens, top_k, H):
    """The type of y. `reduce`: each slot by itself, bfloat16; `atomic`: float32, zeros to which slots are added."""
    return T.Tensor((tokens, top_k, H), "bfloat16") if epilogue == "reduce" else T.Tensor((tokens, H), "float32")


def put_pair(epilogue: str):
    """The macro that stores two neighbours of a slot's row, a pair of `values`."""

    @T.macro
    def put_pair(y, token, slot, column, values, pair):
        if epilogue == "reduce":
            for v in T.vectorized(2):
                y[token, slot, column + v] = T.cast(values[pair * 2 + v], "bfloat16")
        else:
            for v in T.unroll(2):
                T.atomic_add(y[token, column + v], values[pair * 2 + v])

    return put_pair


def gate_up(config: Config, num_blocks: int, activation, operand: TileFormat = BFLOAT16):
    """The prim_func of stage 1: (x, scale_x, expert_ids, num_valid, w13, scale13, bias13, hidden).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x | (blocks * block_M, H), tokens in sorted order | bfloat16 or E4M3 |
    | scale_x | (blocks * block_M,); of bfloat16 empty | float32 |
    | expert_ids, num_valid | of `moe_sort`, with block_M | int32 |
    | w13 | (E, row tiles, steps, words) of the operand's packing, gate beside up | uint32 |
    | scale13 | (E, row tiles * 64), gate beside up; of bfloat16 (0, 0) | float32 |
    | bias13 | (E, row tiles * 64), gate beside up | float32 |
    | hidden | (blocks * block_M, I), in sorted order; rows of padding, and past num_valid, are undefined | bfloat16 |
    """
    H, groups, blocks = T.dynamic("H"), T.dynamic("groups"), T.dynamic("blocks")
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    scaled_tokens, scaled_experts, scaled_rows = (T.dynamic(f"scaled_{name}") for name in ("tokens", "experts", "rows"))
    I = groups * MX_GROUP
    block_M, tiles = config.block_M, config.tiles
    part_M, ready, sums = config.part_M, config.ready, block_M // 2
    features = TILE // 2  # of a tile
    tiles_of_part = min(tiles, _PART // features)

    fetch_rows, fetch_tokens, take_rows = _fetch(config, operand)

    @T.macro
    def fetch(sinks, buffer, full, stage, expert, row0, row_tile):
        fetch_rows(sinks, buffer, full, stage, expert, row_tile)
        if operand is not BFLOAT16:
            fetch_tokens(sinks.scale, sinks.scale_s, buffer, full, stage, row0)

    @T.macro
    def put(sinks, buffer, warpgroup, row0, part, row, first_tile, column):
        if first_tile * features + column < sinks.I:
            for v in T.vectorized(8):
                sinks.hidden[row0 + part * part_M + row, first_tile * features + column + v] = sinks.out_s[
                    warpgroup, row, column + v
                ]

    put_rows = _put_rows(part_M, tiles_of_part * features, put)

    def store(sinks, acc, buffer, row0, row_tile, warpgroup, thread):
        def activate(m: int, part: int):
            @T.macro
            def emit():
                g, t, warp = thread % 32 // 4, thread % 4, thread // 32
                row = (warpgroup * tiles + m) * TILE + warp * 16 + g
                take_rows(sinks, buffer, row)
                feature = m % tiles_of_part * features + warp * 8 + g
                for first in T.unroll(part_M // 8 // ready):
                    if operand is not BFLOAT16:
                        _take_tokens(config, sinks.scale_s, sinks.scales, buffer, part * part_M + first * ready * 8, t)
                    for n in T.unroll(ready):
                        for i in T.unroll(2):
                            at = m * sums + (part * part_M // 8 + first * ready + n) * 4 + i
                            scale = T.float32(1) if operand is BFLOAT16 else sinks.scales[n * 2 + i]
                            gate = acc[at] * (scale * sinks.rows_power[0]) + sinks.rows_bias[0]
                            up = acc[at + 2] * (scale * sinks.rows_power[1]) + sinks.rows_bias[1]
                            sinks.values[n * 2 + i] = activation(gate, up, _sigmoid)
                    for n in T.unroll(ready):
                        for i in T.unroll(2):
                            place = (first * ready + n) * 8 + t * 2 + i
                            sinks.out_s[warpgroup, place, feature] = T.cast(sinks.values[n * 2 + i], "bfloat16")

            emit()

        for first in range(0, tiles, tiles_of_part):
            for part in range(block_M // part_M):
                for m in range(tiles_of_part):
                    activate(first + m, part)
                put_rows(sinks, buffer, warpgroup, thread, row0, part, row_tile + first)

    product = _product(config, num_blocks, operand, fetch, store)

    @T.prim_func
    def gate_up(
        x: T.Tensor((blocks * block_M, H), operand.dtype),
        scale_x: T.Tensor((scaled_tokens,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w13: T.Tensor((experts, row_tiles, steps, operand.tile_words), "uint32"),
        scale13: T.Tensor((scaled_experts, scaled_rows), "float32"),
        bias13: T.Tensor((experts, row_tiles * TILE), "float32"),
        hidden: T.Tensor((blocks * block_M, I), "bfloat16"),
    ):
        with T.Kernel(num_blocks, threads=_THREADS) as block:
            out_s = T.alloc_shared((_COMPUTING, part_M, tiles_of_part * features + _PAD), "bfloat16")
            bias_s, power_s = (T.alloc_shared((2, config.rows), "float32") for name in ("bias", "power"))
            scale_s = T.alloc_shared((2, block_M), "float32")
            rows_bias, rows_power = (T.alloc_local((2,), "float32") for name in ("bias", "power"))
            scales, values = (T.alloc_local((2 * ready,), "float32") for name in ("scales", "values"))
            sinks = SimpleNamespace(
                scale=scale_x, power=scale13, bias=bias13, scale_s=scale_s, power_s=power_s, bias_s=bias_s, out_s=out_s,
                rows_bias=rows_bias, rows_power=rows_power, scales=scales, values=values, hidden=hidden, I=I,
                row_tiles=row_tiles,
            )  # fmt: skip
            product(x, w13, expert_ids, num_valid, sinks, block, T.ceildiv(2 * I, config.rows), row_tiles, steps)

    return gate_up


def down(config: Config, num_blocks: int, epilogue: str, operand: TileFormat = BFLOAT16):
    """The prim_func of stage 2: (hidden, scale_hidden, token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden | (blocks * block_M, I), in sorted order | bfloat16 or E4M3 |
    | scale_hidden | (blocks * block_M,); of bfloat16 empty | float32 |
    | token_ids, weights, expert_ids, num_valid | of `moe_sort`, with block_M | int32; weights float32 |
    | w2 | (E, row tiles, steps, words) of the operand's packing, `neighbours` | uint32 |
    | scale2 | (E, row tiles * 64), `neighbours`; of bfloat16 (0, 0) | float32 |
    | bias2 | (E, row tiles * 64), `neighbours` | float32 |
    | y | of `slots_type`; slots without a local expert are not written | |
    """
    tokens, top_k, groups, I, blocks = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "I", "blocks"))
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    scaled_tokens, scaled_experts, scaled_rows = (T.dynamic(f"scaled_{name}") for name in ("tokens", "experts", "rows"))
    H = groups * MX_GROUP
    block_M, tiles = config.block_M, config.tiles
    part_M, ready, sums = config.part_M, config.ready, block_M // 2
    add_pair = put_pair("atomic")

    fetch_rows, fetch_tokens, take_rows = _fetch(config, operand)

    @T.macro
    def fetch(sinks, buffer, full, stage, expert, row0, row_tile):
        fetch_rows(sinks, buffer, full, stage, expert, row_tile)
        fetch_tokens(sinks.token_ids, sinks.ids_s, buffer, full, stage, row0)
        fetch_tokens(sinks.weights, sinks.weights_s, buffer, full, stage, row0)
        if operand is not BFLOAT16:
            fetch_tokens(sinks.scale, sinks.scale_s, buffer, full, stage, row0)

    @T.macro
    def put(sinks, buffer, warpgroup, row0, part, row, first_tile, column):
        id = T.alloc_var("int32", sinks.ids_s[buffer, part * part_M + row])
        if (id & _TOKEN) < sinks.tokens and first_tile * TILE + column < sinks.H:
            for v in T.vectorized(8):
                sinks.y[id & _TOKEN, id >> TOKEN_BITS, first_tile * TILE + column + v] = sinks.out_s[warpgroup, row, column + v]

    put_rows = _put_rows(part_M, TILE, put)

    def store(sinks, acc, buffer, row0, row_tile, warpgroup, thread):
        def finish(m: int, part: int):
            @T.macro
            def emit():
                g, t, warp = thread % 32 // 4, thread % 4, thread // 32
                row = (warpgroup * tiles + m) * TILE + warp * 16 + g
                take_rows(sinks, buffer, row)
                for first in T.unroll(part_M // 8 // ready):
                    _take_tokens(config, sinks.weights_s, sinks.own_weights, buffer, part * part_M + first * ready * 8, t)
                    if operand is not BFLOAT16:
                        _take_tokens(config, sinks.scale_s, sinks.scales, buffer, part * part_M + first * ready * 8, t)
                    for n in T.unroll(ready):
                        for i in T.unroll(2):
                            scale = T.float32(1) if operand is BFLOAT16 else sinks.scales[n * 2 + i]
                            for v in T.unroll(2):
                                at = m * sums + (part * part_M // 8 + first * ready + n) * 4 + v * 2 + i
                                sum = acc[at] * (scale * sinks.rows_power[v]) + sinks.rows_bias[v]
                                sinks.values[(n * 2 + i) * 2 + v] = sum * sinks.own_weights[n * 2 + i]
                    for n in T.unroll(ready):
                        for i in T.unroll(2):
                            place = (first * ready + n) * 8 + t * 2 + i
                            put_own(sinks, buffer, row_tile + m, warpgroup, part, place, warp * 16 + 2 * g, n * 2 + i)

            emit()

        for m in range(tiles):
            for part in range(block_M // part_M):
                finish(m, part)
                if epilogue == "reduce":
                    put_rows(sinks, buffer, warpgroup, thread, row0, part, row_tile + m)
        if epilogue == "atomic":
            _meet(warpgroup)  # as put_rows does last: then the buffer is given back

    @T.macro
    def put_own(sinks, buffer, tile, warpgroup, part, place, column, pair):
        """Store the neighbours that a thread has of a token: to shared memory, or where they are added."""
        if epilogue == "reduce":
            for v in T.vectorized(2):
                sinks.out_s[warpgroup, place, column + v] = T.cast(sinks.values[pair * 2 + v], "bfloat16")
        else:
            token = sinks.ids_s[buffer, part * part_M + place] & _TOKEN
            if token < sinks.tokens and tile * TILE + column < sinks.H:
                add_pair(sinks.y, token, 0, tile * TILE + column, sinks.values, pair)

    product = _product(config, num_blocks, operand, fetch, store)

    @T.prim_func
    def down(
        hidden: T.Tensor((blocks * block_M, I), operand.dtype),
        scale_hidden: T.Tensor((scaled_tokens,), "float32"),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        weights: T.Tensor((blocks * block_M,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w2: T.Tensor((experts, row_tiles, steps, operand.tile_words), "uint32"),
        scale2: T.Tensor((scaled_experts, scaled_rows), "float32"),
        bias2: T.Tensor((experts, row_tiles * TILE), "float32"),
        y: slots_type(epilogue, tokens, top_k, H),
    ):
        with T.Kernel(num_blocks, threads=_THREADS) as block:
            out_s = T.alloc_shared((_COMPUTING, part_M, TILE + _PAD), "bfloat16")
            ids_s = T.alloc_shared((2, block_M), "int32")
            weights_s, scale_s = (T.alloc_shared((2, block_M), "float32") for name in ("weights", "scale"))
            bias_s, power_s = (T.alloc_shared((2, config.rows), "float32") for name in ("bias", "power"))
            rows_bias, rows_power = (T.alloc_local((2,), "float32") for name in ("bias", "power"))
            scales, own_weights = (T.alloc_local((2 * ready,), "float32") for name in ("scales", "weights"))
            values = T.alloc_local((4 * ready,), "float32")
            sinks = SimpleNamespace(
                scale=scale_hidden, power=scale2, bias=bias2, scale_s=scale_s, power_s=power_s, bias_s=bias_s, out_s=out_s,
                rows_bias=rows_bias, rows_power=rows_power, token_ids=token_ids, weights=weights, ids_s=ids_s,
                weights_s=weights_s, scales=scales, own_weights=own_weights, values=values, tokens=tokens, H=H,
                row_tiles=row_tiles, y=y,
            )  # fmt: skip
            product(hidden, w2, expert_ids, num_valid, sinks, block, T.ceildiv(H, config.rows), row_tiles, steps)

    return down


def takes(problem: Problem) -> bool:
    """Tiles for bfloat16 or fp8, and any number of tokens."""
    return problem.weights_layout in HOPPER_LAYOUTS.values()


def compile_kernels(problem: Problem, device) -> Callable:
    """Return run(x, routing, w13, w2, y), see `problem`."""
    config, operand, num_blocks = pick_config(problem), TILE_FORMATS[problem.a_format], problem.num_sms
    H, I = problem.hidden_size, problem.intermediate_size
    scatter = sm90_scatter.compile_scatter(problem, device)
    config13, config2 = fitted(config, problem, 2 * I), fitted(config, problem, H)
    first = device.compile(gate_up, config13, num_blocks, problem.activation, operand, pass_configs=PASS_CONFIGS)
    requantize = sm90_scatter.compile_requantize(problem, device)
    second = device.compile(down, config2, num_blocks, problem.epilogue, operand, pass_configs=PASS_CONFIGS)

    def run(x, routing, w13, w2, y) -> None:
        token_ids, weights, expert_ids, num_valid, _ = routing
        hidden = device.empty(len(token_ids), I, dtype="bfloat16")
        first(*scatter(x, routing), expert_ids, num_valid, w13.tiles, w13.row_scale, w13.bias, hidden)
        second(*requantize(hidden, routing), token_ids, weights, expert_ids, num_valid, w2.tiles, w2.row_scale, w2.bias, y)

    return run
