"""The two products of a mixture of experts on Hopper for many tokens: bfloat16 activations, MXFP4 weights.

Weights are the left operand, so that decoded codes go into the matrix unit from registers, and tokens the columns. A loading
warpgroup keeps a ring of stages filled by bulk copies: the tokens of a block, 64 of K at a time, and the weights' tiles as they
lie. Two computing warpgroups decode the tiles of the next step while the matrix unit multiplies this one's. Tokens are in
sorted order, since a bulk copy cannot pick rows.

A product reads 64 of K of its tokens (128 bytes each) and of its rows (34): more rows than tokens a block spare the L2 cache,
which is what bounds it; see docs/performance.md.
"""

from dataclasses import dataclass

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe_sm90_tiles import LANE_WORDS, TILE, TILE_WORDS, pairs
from tilelang_ext.kernels.mxfp4_moe_sort import TOKEN_BITS

# Barriers order everything here, and one that upstream adds would be met by the elected thread alone.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_DTYPE = "bfloat16"
_WARPGROUP = 128  # threads
_COMPUTING = 2  # warpgroups
_LOADER_REGISTERS, _COMPUTER_REGISTERS = 40, 232
_TOKEN = (1 << TOKEN_BITS) - 1
_SWIZZLE_128B = 1  # of a shared memory descriptor; its rows of eight lie 1024 bytes apart
_DESCRIPTOR = 16  # bytes that descriptors count in


@dataclass(frozen=True)
class Config:
    """Tokens of a block, tiles of 64 rows of a computing warpgroup, stages of the ring."""

    block_M: int
    tiles: int
    num_stages: int

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return _COMPUTING * self.tiles * TILE


def _product(config: Config, epilogue):
    """Return the macro of a block's product.

    `epilogue(sinks, acc, expert, row0, row_tile, thread, warp, lane)` takes a thread's sums. Those of tile m lie at
    m * block_M / 2: of columns 8 n + 2 t and the next, two of row g, then two of row g + 8.
    """
    block_M, tiles, num_stages = config.block_M, config.tiles, config.num_stages
    sums, words = block_M // 2, LANE_WORDS * 4
    tiles_of_block = _COMPUTING * tiles

    @T.macro
    def load_tiles(w, W_s, full, expert, row_tile, row_tiles, step, stage):
        # Not T.tma_copy, which takes one dimension only where it can prove that it stays inside, and an expert is read.
        if T.shuffle_elect(_WARPGROUP):
            T.mbarrier_expect_tx(full[stage], tiles_of_block * TILE_WORDS * 4)
            for i in T.unroll(tiles_of_block):
                tile = T.min(row_tile + i, row_tiles - 1)
                T.tma_load(
                    T.address_of(W_s[stage, i, 0]), T.address_of(w[expert, tile, step, 0]), full[stage], TILE_WORDS * 4, 0
                )

    @T.macro
    def load(x, w, X_s, W_s, full, empty, expert, row0, row_tile, row_tiles, steps):
        T.dec_max_nreg(_LOADER_REGISTERS)
        for step in T.serial(steps):
            stage = step % num_stages
            T.barrier_wait(empty[stage], ((step // num_stages) & 1) ^ 1)
            T.tma_copy(x[row0 : row0 + block_M, step * TILE : (step + 1) * TILE], X_s[stage, :, :], barrier=full[stage])
            load_tiles(w, W_s, full, expert, row_tile, row_tiles, step, stage)
            T.barrier_arrive(full[stage])

    def decode(W_s, A_r, stage, warpgroup, warp, lane, buffer: int):
        for m in range(tiles):

            @T.macro
            def emit():
                codes = T.alloc_local((LANE_WORDS,), "uint32")
                for v in T.vectorized(LANE_WORDS):
                    codes[v] = W_s[stage, warpgroup * tiles + m, (warp * 32 + lane) * LANE_WORDS + v]
                scales = W_s[stage, warpgroup * tiles + m, 512 + warp * 8 + lane // 4]
                pairs([codes[0], codes[1], codes[2], codes[3]], scales, A_r, (buffer * tiles + m) * words)

            emit()

    def multiply(descriptor, A_r, acc, stage, buffer: int):
        @T.macro
        def emit():
            for k in T.unroll(TILE // 16):
                for m in T.unroll(tiles):
                    T.ptx_wgmma_rs(
                        "float32", f"m64n{block_M}k16", True, "bf16", "bf16", "fp32",
                        A_r.data, (buffer * tiles + m) * words + 4 * k,
                        descriptor.data, (stage * block_M * TILE * 2 + k * 32) // _DESCRIPTOR,
                        acc.data, m * sums, T.bool(True), 1, 1,
                    )  # fmt: skip

        emit()

    @T.macro
    def release(empty, stage, lane):
        if lane == 0:
            T.mbarrier_arrive(empty[stage])

    def step_of_turn(W_s, full, empty, A_r, acc, descriptor, step, steps, warpgroup, warp, lane, buffer: int):
        """Multiply what has been decoded, and decode the next step's tiles while that runs."""

        @T.macro
        def emit():
            T.warpgroup_arrive()
            multiply(descriptor, A_r, acc, step % num_stages, buffer)
            T.warpgroup_commit_batch()
            if step > 0:
                T.wait_wgmma(1)
                release(empty, (step - 1) % num_stages, lane)
            if step + 1 < steps:
                T.barrier_wait(full[(step + 1) % num_stages], (((step + 1) // num_stages) & 1))
                decode(W_s, A_r, (step + 1) % num_stages, warpgroup, warp, lane, 1 - buffer)

        emit()

    @T.macro
    def compute(X_s, W_s, full, empty, sinks, expert, row0, row_tile, steps, thread):
        T.inc_max_nreg(_COMPUTER_REGISTERS)
        A_r = T.alloc_local((2 * tiles * words,), "uint32")
        acc = T.alloc_local((tiles * sums,), "float32")
        descriptor = T.alloc_wgmma_desc()
        warpgroup, warp, lane = thread // _WARPGROUP, thread % _WARPGROUP // 32, thread % 32
        for i in T.unroll(tiles * sums):
            acc[i] = T.float32(0)
        T.initialize_wgmma_descriptor(descriptor, X_s.access_ptr("r"), _SWIZZLE_128B, 1, 1024 // _DESCRIPTOR)
        T.barrier_wait(full[0], 0)
        decode(W_s, A_r, 0, warpgroup, warp, lane, 0)
        for turn in T.serial(T.ceildiv(steps, 2)):
            step_of_turn(W_s, full, empty, A_r, acc, descriptor, 2 * turn, steps, warpgroup, warp, lane, 0)
            if 2 * turn + 1 < steps:
                step_of_turn(W_s, full, empty, A_r, acc, descriptor, 2 * turn + 1, steps, warpgroup, warp, lane, 1)
        T.wait_wgmma(0)
        epilogue(sinks, acc, expert, row0, row_tile + warpgroup * tiles, thread, warp, lane)

    @T.macro
    def product(x, w, expert_ids, num_valid, sinks, bx, by, row_tiles, steps):
        X_s = T.alloc_shared((num_stages, block_M, TILE), _DTYPE)
        W_s = T.alloc_shared((num_stages, tiles_of_block, TILE_WORDS), "uint32")
        T.annotate_layout({X_s: make_swizzled_layout(X_s)})
        full = T.alloc_barrier([_WARPGROUP] * num_stages)
        empty = T.alloc_barrier([_COMPUTING * _WARPGROUP // 32] * num_stages)  # a warp each
        tx = T.get_thread_binding()
        if by * block_M < num_valid[0]:
            expert = expert_ids[by]
            if tx < _WARPGROUP:
                load(x, w, X_s, W_s, full, empty, expert, by * block_M, bx * tiles_of_block, row_tiles, steps)
            else:
                compute(X_s, W_s, full, empty, sinks, expert, by * block_M, bx * tiles_of_block, steps, tx - _WARPGROUP)

    return product


def gate_up(config: Config, activation):
    """The prim_func of stage 1: (x, expert_ids, num_valid, w13, bias13, hidden).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x | (blocks * block_M, H), tokens in sorted order | bfloat16 |
    | expert_ids, num_valid | of `moe_sort`, with block_M | int32 |
    | w13 | (E, row tiles, steps, 544) of `pack`, gate beside up | uint32 |
    | bias13 | (E, row tiles * 64), gate beside up | float32 |
    | hidden | (blocks * block_M, I), in sorted order; rows of padding, and past num_valid, are undefined | bfloat16 |
    """
    H, groups, blocks = T.dynamic("H"), T.dynamic("groups"), T.dynamic("blocks")
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    I = groups * MX_GROUP
    block_M, tiles = config.block_M, config.tiles
    features, sums = config.rows // 2, block_M // 2
    pad = 8  # elements, against bank conflicts
    computing = _COMPUTING * _WARPGROUP  # threads

    def store(sinks, acc, expert, row0, row_tile, thread, warp, lane):
        bias13, hidden_s, hidden, I, row_tiles, bx = sinks

        def activate(m: int):
            @T.macro
            def emit():
                g, t = lane // 4, lane % 4
                row = T.min(row_tile + m, row_tiles - 1) * TILE + warp * 16 + g
                gate, up = bias13[expert, row], bias13[expert, row + 8]
                feature = (thread // _WARPGROUP * tiles + m) * (TILE // 2) + warp * 8 + g
                for n in T.unroll(block_M // 8):
                    for i in T.unroll(2):
                        value = activation(acc[m * sums + n * 4 + i] + gate, acc[m * sums + n * 4 + 2 + i] + up)
                        hidden_s[n * 8 + t * 2 + i, feature] = T.cast(value, _DTYPE)

            emit()

        @T.macro
        def write():
            T.sync_threads(barrier_id=1, arrive_count=computing)
            for turn in T.serial(-(-block_M * features // (8 * computing))):
                place = turn * computing + thread
                row, feature = place // (features // 8), place % (features // 8) * 8
                if row < block_M and bx * features + feature < I:
                    for v in T.vectorized(8):
                        hidden[row0 + row, bx * features + feature + v] = hidden_s[row, feature + v]

        for m in range(tiles):
            activate(m)
        write()

    product = _product(config, store)

    @T.prim_func
    def gate_up(
        x: T.Tensor((blocks * block_M, H), _DTYPE),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w13: T.Tensor((experts, row_tiles, steps, TILE_WORDS), "uint32"),
        bias13: T.Tensor((experts, row_tiles * TILE), "float32"),
        hidden: T.Tensor((blocks * block_M, I), _DTYPE),
    ):
        with T.Kernel(T.ceildiv(I, features), blocks, threads=(1 + _COMPUTING) * _WARPGROUP) as (bx, by):
            hidden_s = T.alloc_shared((block_M, features + pad), _DTYPE)

            product(x, w13, expert_ids, num_valid, [bias13, hidden_s, hidden, I, row_tiles, bx], bx, by, row_tiles, steps)

    return gate_up


def down(config: Config, epilogue: str):
    """The prim_func of stage 2: (hidden, token_ids, weights, expert_ids, num_valid, w2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden | (blocks * block_M, I), of `gate_up` | bfloat16 |
    | token_ids, weights, expert_ids, num_valid | of `moe_sort`, with block_M | int32; weights float32 |
    | w2 | (E, row tiles, steps, 544) of `pack` | uint32 |
    | bias2 | (E, row tiles * 64) | float32 |
    | y | `reduce`: (tokens, top_k, H), each slot by itself; `atomic`: (tokens, H), zeros, to which slots are added | float32 |

    Slots without a local expert are not written.
    """
    tokens, top_k, H, I, blocks = (T.dynamic(name) for name in ("tokens", "top_k", "H", "I", "blocks"))
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    block_M, tiles = config.block_M, config.tiles
    sums = block_M // 2
    y_type = T.Tensor((tokens, top_k, H) if epilogue == "reduce" else (tokens, H), "float32")

    @T.macro
    def put(y, token, slot, row, value):
        if epilogue == "reduce":
            y[token, slot, row] = value
        else:
            T.atomic_add(y[token, row], value)

    def store(sinks, acc, expert, row0, row_tile, thread, warp, lane):
        token_ids, weights, bias2, row_tiles, y = sinks

        @T.macro
        def emit():
            bias = T.alloc_local((2 * tiles,), "float32")
            first = row_tile * TILE + warp * 16 + lane // 4
            for m in T.unroll(2 * tiles):
                bias[m] = bias2[expert, T.min(first + m // 2 * TILE + m % 2 * 8, row_tiles * TILE - 1)]
            for n in T.unroll(block_M // 8):
                for i in T.unroll(2):
                    place = row0 + n * 8 + lane % 4 * 2 + i
                    token, slot = token_ids[place] & _TOKEN, token_ids[place] >> TOKEN_BITS
                    if token < tokens:
                        weight = weights[place]
                        for m in T.unroll(2 * tiles):
                            row = first + m // 2 * TILE + m % 2 * 8
                            if row < H:
                                put(y, token, slot, row, (acc[m // 2 * sums + n * 4 + m % 2 * 2 + i] + bias[m]) * weight)

        emit()

    product = _product(config, store)

    @T.prim_func
    def down(
        hidden: T.Tensor((blocks * block_M, I), _DTYPE),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        weights: T.Tensor((blocks * block_M,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w2: T.Tensor((experts, row_tiles, steps, TILE_WORDS), "uint32"),
        bias2: T.Tensor((experts, row_tiles * TILE), "float32"),
        y: y_type,
    ):
        with T.Kernel(T.ceildiv(H, config.rows), blocks, threads=(1 + _COMPUTING) * _WARPGROUP) as (bx, by):
            product(hidden, w2, expert_ids, num_valid, [token_ids, weights, bias2, row_tiles, y], bx, by, row_tiles, steps)

    return down
