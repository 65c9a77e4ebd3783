"""The two products of a mixture of experts on Hopper for few tokens an expert: bfloat16 activations, MXFP4 weights.

What counts is that weights arrive at the speed of memory. A warp has 16 rows of them and keeps four steps of 64 of K under way
in registers; they are the left operand of a product of a warp, and go into it once decoded, past shared memory. Tokens, the
columns, are copied ahead into shared memory for all warps of a block. Warps that share rows split K, and add their sums in the
end.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, Problem
from tilelang_ext.kernels.mxfp4_moe.routing import TOKEN_BITS
from tilelang_ext.kernels.mxfp4_moe.sm90_decode import BFLOAT16, TILE, decode
from tilelang_ext.kernels.mxfp4_moe.sm90_wgmma import put_pair, slots_type

PARTIAL_DTYPE, USES_PDL = "bfloat16", True

# The barriers and the limits below are all that is needed.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_DTYPE = BFLOAT16.dtype
_TOKEN = (1 << TOKEN_BITS) - 1
_AHEAD = 4  # steps of a warp under way
_ROWS = 16  # of a warp
_COLUMNS = 8  # of a product
_COPY = 8  # elements of 16 bytes
LANE_WORDS = BFLOAT16.lane_words
_TILE_LINES = BFLOAT16.tile_words // LANE_WORDS  # of four words
_PAD = 8  # elements, against bank conflicts


@dataclass(frozen=True)
class Config:
    """Tokens of a block; warps with rows of their own, which divide them; warps that split K of those; blocks a processor."""

    block_M: int
    warps: int
    splits: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return self.warps * _ROWS

    @property
    def threads(self) -> int:
        return self.warps * self.splits * 32


# By the rows that an expert has when all experts are equally busy; each is the fastest of some on an H200 at the sizes of
# docs/design/performance.md.
_MAX_ROWS_PER_EXPERT = 6
_TABLE = (
    # (slots up to, config)
    (64, Config(8, 4, 2, 4)),  # few blocks: K is split, to fill the SMs
    (None, Config(8, 8, 1, 4)),
)


def pick_config(problem: Problem) -> Config:
    """Return the tile for a problem, by its slots."""
    return next(config for most, config in _TABLE if most is None or problem.slots <= most)


def _product(config: Config, epilogue, follows_sort: bool):
    """Return the macro of a block's product.

    `epilogue(sinks, sums_s, bias_s, row0, bx, tx)` finds the sums of split s, token m and row r in sums_s[s, m, r]. The macro
    `gathers` rows of x by token, or takes them in sorted order. A product that `follows_sort` waits for it before all else;
    the other loads weights while the launch before it still computes tokens.
    """
    block_M, splits, threads = config.block_M, config.splits, config.threads
    columns = block_M // _COLUMNS
    chunk = _AHEAD * splits * TILE  # of K in shared memory at a time, of which there are two
    turns = block_M * chunk // _COPY // threads  # of copying one

    @T.macro
    def fetch(w, codes, scales, own, step, steps, slot):
        """Begin to load the warp's part of a step; a step past the last is zeros. `own` says where the lane's parts begin."""
        for v in T.vectorized(LANE_WORDS):
            codes[slot * LANE_WORDS + v] = T.uint32(0)
        scales[slot] = T.uint32(0)
        if step < steps:
            for v in T.vectorized(LANE_WORDS):
                codes[slot * LANE_WORDS + v] = w[own[0] + step * _TILE_LINES, v]
            scales[slot] = w[own[1] + step * _TILE_LINES, T.get_thread_binding() % 32 // 4 % 4]

    @T.macro
    def stage(x, X_s, rows, K, number, tx):
        """Begin to copy a chunk of the tokens; rows without a token (-1), and K past the end, are zeros."""
        for turn in T.unroll(turns):
            place = turn * threads + tx
            k = number * chunk + place % (chunk // _COPY) * _COPY
            inside = (rows[turn] >= 0) & (k < K)
            T.ptx_cp_async(
                T.access_ptr(X_s[number % 2, place // (chunk // _COPY), place % (chunk // _COPY) * _COPY], "w", _COPY),
                T.access_ptr(x[T.max(rows[turn], 0), T.if_then_else(k < K, k, 0)], "r", _COPY),
                _COPY,
                inside,
            )
        T.ptx_commit_group()

    @T.macro
    def multiply(X_s, A_r, B_r, acc, buffer, k, lane):
        for n in T.unroll(columns):
            for half in T.unroll(2):
                T.ptx_ldmatrix(
                    T.bool(False),
                    4,
                    T.access_ptr(X_s[buffer, n * _COLUMNS + lane % 8, k + half * 32 + lane // 8 * 8], "r"),
                    T.access_ptr(B_r[half * 4], "w"),
                )
            for i in T.unroll(TILE // 16):
                T.ptx_mma(
                    "float32", "m16n8k16", "row", "col", "bf16", "bf16", "fp32",
                    A_r.data, i * 4, B_r.data, i * 2, acc.data, n * 4, T.bool(False),
                )  # fmt: skip

    def step_of_chunk(w, X_s, codes, scales, A_r, B_r, acc, own, lane, split, number, steps, slot):
        words = [codes[slot * LANE_WORDS + i] for i in range(LANE_WORDS)]

        @T.macro
        def emit():
            decode(BFLOAT16, words, [scales[slot]], A_r, 0)
            fetch(w, codes, scales, own, ((number + 1) * _AHEAD + slot) * splits + split, steps, slot)
            multiply(X_s, A_r, B_r, acc, number % 2, (slot * splits + split) * TILE, lane)

        emit()

    @T.macro
    def product(x, w, token_ids, expert_ids, bias, sinks, tokens, gathers, K, bx, by, row_tiles, steps):
        X_s = T.alloc_shared((2, block_M, chunk + _PAD), _DTYPE)
        sums_s = T.alloc_shared((splits, block_M, config.rows + 4), "float32")
        bias_s = T.alloc_shared((config.rows,), "float32")
        codes, scales = T.alloc_local((_AHEAD * LANE_WORDS,), "uint32"), T.alloc_local((_AHEAD,), "uint32")
        A_r, B_r = T.alloc_local((4 * LANE_WORDS,), "uint32"), T.alloc_local((8,), "uint32")
        acc = T.alloc_local((columns * 4,), "float32")
        own, rows = T.alloc_local((2,), "int64"), T.alloc_local((turns,), "int32")
        tx = T.get_thread_binding()
        if follows_sort:
            T.pdl_sync()
        # All that the sort says of this block, under way together: weights wait for it.
        row0, expert = by * block_M, T.alloc_var("int32", expert_ids[by])
        for turn in T.unroll(turns):
            row = row0 + (turn * threads + tx) // (chunk // _COPY)
            token = token_ids[row] & _TOKEN
            rows[turn] = T.if_then_else(token < tokens, T.if_then_else(gathers, token, row), -1)
        if expert >= 0:
            lane, warp, split = tx % 32, tx // 32 % config.warps, tx // 32 // config.warps
            first = bx * config.warps + warp
            tile, warp_of_tile = T.min(first // 4, row_tiles - 1), first % 4
            # 64 bits once, not at every load.
            tiles_before = T.cast(expert * row_tiles + tile, "int64") * steps
            own[0] = tiles_before * _TILE_LINES + warp_of_tile * 32 + lane
            own[1] = tiles_before * _TILE_LINES + 128 + warp_of_tile * 2 + lane // 16
            for slot in T.unroll(_AHEAD):
                fetch(w, codes, scales, own, slot * splits + split, steps, slot)
            if tx < config.rows // 4:  # with the first tokens, so that the end does not wait for it
                T.ptx_cp_async(
                    T.access_ptr(bias_s[tx * 4], "w", 4),
                    T.access_ptr(bias[expert, T.min(bx * config.rows + tx * 4, row_tiles * TILE - 4)], "r", 4),
                    4,
                )
            if not follows_sort:
                T.pdl_sync()
            T.pdl_trigger()  # here, since the compiler moves no load of the weights past it
            stage(x, X_s, rows, K, 0, tx)
            for i in T.unroll(columns * 4):
                acc[i] = T.float32(0)
            for number in T.serial(T.ceildiv(steps, _AHEAD * splits)):
                stage(x, X_s, rows, K, number + 1, tx)
                T.ptx_wait_group(1)
                T.sync_threads()
                for slot in T.unroll(_AHEAD):
                    step_of_chunk(w, X_s, codes, scales, A_r, B_r, acc, own, lane, split, number, steps, slot)
                T.sync_threads()
            for n in T.unroll(columns):
                for i in T.unroll(4):
                    sums_s[split, n * _COLUMNS + lane % 4 * 2 + i % 2, warp * _ROWS + lane // 4 + i // 2 * 8] = acc[n * 4 + i]
            T.sync_threads()
            epilogue(sinks, sums_s, bias_s, row0, bx, tx)
        elif not follows_sort:
            T.pdl_sync()

    return product


def _sum(sums_s, m, row, splits: int):
    return sum((sums_s[split, m, row] for split in range(1, splits)), sums_s[0, m, row])


def gate_up(config: Config, activation):
    """The prim_func of stage 1: (x, token_ids, expert_ids, w13, bias13, hidden).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x | (tokens, H) | bfloat16 |
    | token_ids, expert_ids | of `moe_sort`, with block_M; blocks of no expert end at once | int32 |
    | w13 | (E * row tiles * steps * 136, 4), the tiles of `pack`, gate beside up | uint32 |
    | bias13 | (E, row tiles * 64), gate beside up | float32 |
    | hidden | (blocks * block_M, I), in sorted order; rows of padding, and of blocks of no expert, are undefined | bfloat16 |
    """
    tokens, hidden_groups, groups, blocks = (T.dynamic(name) for name in ("tokens", "hidden_groups", "groups", "blocks"))
    experts, row_tiles, lines = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("lines")
    H, I = hidden_groups * MX_GROUP, groups * MX_GROUP
    block_M, splits, threads = config.block_M, config.splits, config.threads
    features = config.rows // 2

    def store(sinks, sums_s, bias_s, row0, bx, tx):
        (hidden,) = sinks

        @T.macro
        def emit():
            for turn in T.serial(T.ceildiv(block_M * features, threads)):
                place = turn * threads + tx
                m, feature = place // features, place % features
                row = feature // 8 * 16 + feature % 8
                if m < block_M and bx * features + feature < I:
                    gate = _sum(sums_s, m, row, splits) + bias_s[row]
                    up = _sum(sums_s, m, row + 8, splits) + bias_s[row + 8]
                    hidden[row0 + m, bx * features + feature] = T.cast(activation(gate, up), _DTYPE)

        emit()

    product = _product(config, store, follows_sort=True)

    @T.prim_func
    def gate_up(
        x: T.Tensor((tokens, H), _DTYPE),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        w13: T.Tensor((lines, LANE_WORDS), "uint32"),
        bias13: T.Tensor((experts, row_tiles * TILE), "float32"),
        hidden: T.Tensor((blocks * block_M, I), _DTYPE),
    ):
        with T.Kernel(T.ceildiv(I, features), blocks, threads=threads) as (bx, by):
            T.annotate_min_blocks_per_sm(config.blocks)
            product(
                x,
                w13,
                token_ids,
                expert_ids,
                bias13,
                [hidden],
                tokens,
                T.bool(True),
                H,
                bx,
                by,
                row_tiles,
                T.ceildiv(H, TILE),
            )

    return gate_up


def down(config: Config, epilogue: str):
    """The prim_func of stage 2: (hidden, token_ids, weights, expert_ids, w2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden | (blocks * block_M, I), of `gate_up` | bfloat16 |
    | token_ids, weights, expert_ids | of `moe_sort`, with block_M; blocks of no expert end at once | int32; weights float32 |
    | w2 | (E * row tiles * steps * 136, 4), the tiles of `pack`, `neighbours` | uint32 |
    | bias2 | (E, row tiles * 64), `neighbours` | float32 |
    | y | of `slots_type`; slots without a local expert are not written | |
    """
    put = put_pair(epilogue)
    tokens, top_k, hidden_groups, groups = (T.dynamic(name) for name in ("tokens", "top_k", "hidden_groups", "groups"))
    blocks, experts, row_tiles, lines = (T.dynamic(name) for name in ("blocks", "experts", "row_tiles", "lines"))
    H, I = hidden_groups * MX_GROUP, groups * MX_GROUP
    block_M, splits, threads, rows = config.block_M, config.splits, config.threads, config.rows

    def store(sinks, sums_s, bias_s, row0, bx, tx):
        token_ids, weights, y = sinks

        @T.macro
        def emit():
            values = T.alloc_local((2,), "float32")
            for turn in T.serial(T.ceildiv(block_M * rows // 2, threads)):
                place = turn * threads + tx
                m, column = place // (rows // 2), place % (rows // 2) * 2
                if m < block_M and bx * rows + column < H:
                    token, slot = token_ids[row0 + m] & _TOKEN, token_ids[row0 + m] >> TOKEN_BITS
                    if token < tokens:
                        for v in T.unroll(2):
                            row = column // 16 * 16 + column % 16 // 2 + v * 8
                            value = _sum(sums_s, m, row, splits) + bias_s[row]
                            values[v] = value * weights[row0 + m]
                        put(y, token, slot, bx * rows + column, values, 0)

        emit()

    product = _product(config, store, follows_sort=False)

    @T.prim_func
    def down(
        hidden: T.Tensor((blocks * block_M, I), _DTYPE),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        weights: T.Tensor((blocks * block_M,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        w2: T.Tensor((lines, LANE_WORDS), "uint32"),
        bias2: T.Tensor((experts, row_tiles * TILE), "float32"),
        y: slots_type(epilogue, tokens, top_k, H),
    ):
        with T.Kernel(T.ceildiv(H, rows), blocks, threads=threads) as (bx, by):
            T.annotate_min_blocks_per_sm(config.blocks)
            product(
                hidden, w2, token_ids, expert_ids, bias2, [token_ids, weights, y], tokens, T.bool(False), I,
                bx, by, row_tiles, T.ceildiv(I, TILE),
            )  # fmt: skip

    return down


def takes(problem: Problem) -> bool:
    """Tiles for bfloat16, and few tokens per expert."""
    return problem.weights_layout == HOPPER_LAYOUTS["bfloat16"] and problem.rows_per_expert <= _MAX_ROWS_PER_EXPERT


def compile_kernels(problem: Problem, device) -> Callable:
    """Return run(x, routing, w13, w2, y), see `problem`."""
    config = pick_config(problem)
    first = device.compile(gate_up, config, problem.activation, pass_configs=PASS_CONFIGS)
    second = device.compile(down, config, problem.epilogue, pass_configs=PASS_CONFIGS)

    def run(x, routing, w13, w2, y) -> None:
        token_ids, weights, expert_ids, _, _ = routing
        hidden = device.empty(len(token_ids), problem.intermediate_size, dtype="bfloat16")
        first(x, token_ids, expert_ids, w13.tiles.view(-1, LANE_WORDS), w13.bias, hidden)
        second(hidden, token_ids, weights, expert_ids, w2.tiles.view(-1, LANE_WORDS), w2.bias, y)

    return run
