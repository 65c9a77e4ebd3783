"""The two products of a mixture of experts on Hopper by products of a warpgroup: bfloat16 or E4M3 activations, MXFP4 weights.

Weights are the left operand, so that decoded codes go into the matrix unit from registers, and tokens the columns. A loading
warp or warpgroup keeps a ring of stages filled by bulk copies: the tokens of a block, 128 bytes of each at a time, and the
weights' tiles as they lie. Two computing warpgroups decode the tiles of the next step while the matrix unit multiplies this
one's. Tokens are in sorted order, since a bulk copy cannot pick rows.

E4M3 sums of tokens are multiplied by the scale of the token and by the power of two of the row.

A product reads 128 bytes of its tokens a step and 34 (bfloat16) or 68 (E4M3) of its rows: more rows than tokens a block spare
the L2 cache, which is what bounds it; see docs/performance.md.
"""

from dataclasses import dataclass

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe_sm90_tiles import BFLOAT16, TILE, Operand, decode
from tilelang_ext.kernels.mxfp4_moe_sort import TOKEN_BITS

# Barriers order everything here, and one that upstream adds would be met by the elected thread alone.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_WARPGROUP = 128  # threads
_COMPUTING = 2  # warpgroups
_COMPUTING_THREADS = _COMPUTING * _WARPGROUP
_LOADER_REGISTERS, _COMPUTER_REGISTERS = 40, 232
_LEFT_WORDS = 16  # registers of the left operand for a tile
_PRODUCTS = 4  # of a step and tile, 32 bytes of K each
_TOKEN = (1 << TOKEN_BITS) - 1
_SWIZZLE_128B = 1  # of a shared memory descriptor; its rows of eight lie 1024 bytes apart
_DESCRIPTOR = 16  # bytes that descriptors count in


@dataclass(frozen=True)
class Config:
    """Tokens of a block; tiles of 64 rows of a computing warpgroup; stages of the ring; blocks a processor.

    One block a processor: a warpgroup loads, and leaves its registers to the others.
    """

    block_M: int
    tiles: int
    num_stages: int
    blocks: int = 1

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return _COMPUTING * self.tiles * TILE

    @property
    def loading(self) -> int:
        """Threads that load."""
        return _WARPGROUP if self.blocks == 1 else 32

    @property
    def threads(self) -> int:
        return _COMPUTING_THREADS + self.loading


def _product(config: Config, operand: Operand, epilogue):
    """Return the macro of a block's product.

    `epilogue(sinks, acc, expert, row0, row_tile, thread, warp, lane)` takes a thread's sums. Those of tile m lie at
    m * block_M / 2: of columns 8 n + 2 t and the next, two of row g, then two of row g + 8.
    """
    block_M, tiles, num_stages, loading = config.block_M, config.tiles, config.num_stages, config.loading
    sums, lane_words, tile_words = block_M // 2, operand.lane_words, operand.tile_words
    tiles_of_block = _COMPUTING * tiles
    scale_words = operand.K // MX_GROUP // 2  # of a lane, for rows g and g + 8
    row_bytes = 128  # of a token in a stage

    @T.macro
    def load_tiles(w, W_s, full, expert, row_tile, row_tiles, step, stage):
        # Not T.tma_copy, which takes one dimension only where it can prove that it stays inside, and an expert is read.
        if T.shuffle_elect(loading):
            T.mbarrier_expect_tx(full[stage], tiles_of_block * tile_words * 4)
            for i in T.unroll(tiles_of_block):
                tile = T.min(row_tile + i, row_tiles - 1)
                T.tma_load(
                    T.address_of(W_s[stage, i, 0]), T.address_of(w[expert, tile, step, 0]), full[stage], tile_words * 4, 0
                )

    @T.macro
    def load(x, w, X_s, W_s, full, empty, expert, row0, row_tile, row_tiles, steps):
        if config.blocks == 1:
            T.dec_max_nreg(_LOADER_REGISTERS)
        for step in T.serial(steps):
            stage = step % num_stages
            T.barrier_wait(empty[stage], ((step // num_stages) & 1) ^ 1)
            T.tma_copy(
                x[row0 : row0 + block_M, step * operand.K : (step + 1) * operand.K], X_s[stage, :, :], barrier=full[stage]
            )
            load_tiles(w, W_s, full, expert, row_tile, row_tiles, step, stage)
            T.barrier_arrive(full[stage])

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
            for k in T.unroll(_PRODUCTS):
                for m in T.unroll(tiles):
                    T.ptx_wgmma_rs(
                        "float32", f"m64n{block_M}k{operand.K // _PRODUCTS}", True, operand.ptx, operand.ptx, "fp32",
                        A_r.data, (buffer * tiles + m) * _LEFT_WORDS + 4 * k,
                        descriptor.data, (stage * block_M * row_bytes + k * 32) // _DESCRIPTOR,
                        acc.data, m * sums, T.bool(True), 1, 1,
                    )  # fmt: skip

        emit()

    @T.macro
    def release(empty, stage, lane):
        if lane == 0:
            T.mbarrier_arrive(empty[stage])

    def step_of_turn(W_s, own, full, empty, A_r, acc, descriptor, step, steps, warpgroup, warp, lane, buffer: int):
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
                decode_tiles(W_s, own, A_r, (step + 1) % num_stages, warpgroup, warp, lane, 1 - buffer)

        emit()

    @T.macro
    def compute(X_s, W_s, full, empty, sinks, expert, row0, row_tile, steps, thread):
        if config.blocks == 1:
            T.inc_max_nreg(_COMPUTER_REGISTERS)
        A_r = T.alloc_local((2 * tiles * _LEFT_WORDS,), "uint32")
        acc = T.alloc_local((tiles * sums,), "float32")
        # Of a tile. Allocated here: the compiler's passes take long over buffers in inner scopes.
        own = [T.alloc_local((words,), "uint32") for words in (lane_words, scale_words)]
        descriptor = T.alloc_wgmma_desc()
        warpgroup, warp, lane = thread // _WARPGROUP, thread % _WARPGROUP // 32, thread % 32
        for i in T.unroll(tiles * sums):
            acc[i] = T.float32(0)
        T.initialize_wgmma_descriptor(descriptor, X_s.access_ptr("r"), _SWIZZLE_128B, 1, 1024 // _DESCRIPTOR)
        T.barrier_wait(full[0], 0)
        decode_tiles(W_s, own, A_r, 0, warpgroup, warp, lane, 0)
        for turn in T.serial(T.ceildiv(steps, 2)):
            step_of_turn(W_s, own, full, empty, A_r, acc, descriptor, 2 * turn, steps, warpgroup, warp, lane, 0)
            if 2 * turn + 1 < steps:
                step_of_turn(W_s, own, full, empty, A_r, acc, descriptor, 2 * turn + 1, steps, warpgroup, warp, lane, 1)
        T.wait_wgmma(0)
        epilogue(sinks, acc, expert, row0, row_tile + warpgroup * tiles, thread, warp, lane)

    @T.macro
    def product(x, w, expert_ids, num_valid, sinks, bx, by, row_tiles, steps):
        X_s = T.alloc_shared((num_stages, block_M, operand.K), operand.dtype)
        W_s = T.alloc_shared((num_stages, tiles_of_block, tile_words), "uint32")
        T.annotate_layout({X_s: make_swizzled_layout(X_s)})
        T.annotate_min_blocks_per_sm(config.blocks)
        full = T.alloc_barrier([loading] * num_stages)
        empty = T.alloc_barrier([_COMPUTING_THREADS // 32] * num_stages)  # a warp each
        tx = T.get_thread_binding()
        if by * block_M < num_valid[0]:
            expert = expert_ids[by]
            # The last threads load: a warpgroup's four warps begin at a multiple of four.
            if tx < _COMPUTING_THREADS:
                compute(X_s, W_s, full, empty, sinks, expert, by * block_M, bx * tiles_of_block, steps, tx)
            else:
                load(x, w, X_s, W_s, full, empty, expert, by * block_M, bx * tiles_of_block, row_tiles, steps)

    return product


def _scale(operand: Operand, scale, *index):
    """Return what sums are multiplied by; bfloat16 has it within."""
    return T.float32(1) if operand is BFLOAT16 else scale[index]


def slots_type(epilogue: str, tokens, top_k, H):
    """The type of y. `reduce`: each slot by itself, bfloat16; `atomic`: float32, zeros to which slots are added."""
    return T.Tensor((tokens, top_k, H), "bfloat16") if epilogue == "reduce" else T.Tensor((tokens, H), "float32")


def put_pair(epilogue: str):
    """The macro that stores two neighbours of a slot's row."""

    @T.macro
    def put_pair(y, token, slot, column, values):
        if epilogue == "reduce":
            for v in T.vectorized(2):
                y[token, slot, column + v] = T.cast(values[v], "bfloat16")
        else:
            for v in T.unroll(2):
                T.atomic_add(y[token, column + v], values[v])

    return put_pair


def gate_up(config: Config, activation, operand: Operand = BFLOAT16):
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
    features, sums = config.rows // 2, block_M // 2
    pad = 8  # elements, against bank conflicts

    def store(sinks, acc, expert, row0, row_tile, thread, warp, lane):
        scale_x, scale13, bias13, hidden_s, hidden, I, row_tiles, bx = sinks

        def activate(m: int):
            @T.macro
            def emit():
                g, t = lane // 4, lane % 4
                row = T.min(row_tile + m, row_tiles - 1) * TILE + warp * 16 + g
                bias_gate, bias_up = bias13[expert, row], bias13[expert, row + 8]
                power_gate, power_up = (_scale(operand, scale13, expert, row + i) for i in (0, 8))
                feature = (thread // _WARPGROUP * tiles + m) * (TILE // 2) + warp * 8 + g
                for n in T.unroll(block_M // 8):
                    for i in T.unroll(2):
                        token = row0 + n * 8 + t * 2 + i
                        scale = _scale(operand, scale_x, token)
                        gate = acc[m * sums + n * 4 + i] * (scale * power_gate) + bias_gate
                        up = acc[m * sums + n * 4 + 2 + i] * (scale * power_up) + bias_up
                        value = activation(gate, up)
                        hidden_s[n * 8 + t * 2 + i, feature] = T.cast(value, "bfloat16")

            emit()

        @T.macro
        def write():
            T.sync_threads(barrier_id=1, arrive_count=_COMPUTING_THREADS)
            for turn in T.serial(-(-block_M * features // (8 * _COMPUTING_THREADS))):
                place = turn * _COMPUTING_THREADS + thread
                row, feature = place // (features // 8), place % (features // 8) * 8
                if row < block_M and bx * features + feature < I:
                    for v in T.vectorized(8):
                        hidden[row0 + row, bx * features + feature + v] = hidden_s[row, feature + v]

        for m in range(tiles):
            activate(m)
        write()

    product = _product(config, operand, store)

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
        with T.Kernel(T.ceildiv(I, features), blocks, threads=config.threads) as (bx, by):
            hidden_s = T.alloc_shared((block_M, features + pad), "bfloat16")

            sinks = [scale_x, scale13, bias13, hidden_s, hidden, I, row_tiles, bx]
            product(x, w13, expert_ids, num_valid, sinks, bx, by, row_tiles, steps)

    return gate_up


def down(config: Config, epilogue: str, operand: Operand = BFLOAT16):
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
    put = put_pair(epilogue)
    tokens, top_k, groups, I, blocks = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "I", "blocks"))
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    scaled_tokens, scaled_experts, scaled_rows = (T.dynamic(f"scaled_{name}") for name in ("tokens", "experts", "rows"))
    H = groups * MX_GROUP
    block_M, tiles = config.block_M, config.tiles
    sums = block_M // 2

    def store(sinks, acc, expert, row0, row_tile, thread, warp, lane):
        scale_hidden, token_ids, weights, scale2, bias2, row_tiles, y = sinks

        @T.macro
        def emit():
            bias, power = T.alloc_local((2 * tiles,), "float32"), T.alloc_local((2 * tiles,), "float32")
            values, g = T.alloc_local((2,), "float32"), lane // 4
            for m in T.unroll(2 * tiles):
                row = T.min(row_tile + m // 2, row_tiles - 1) * TILE + warp * 16 + g + m % 2 * 8
                bias[m] = bias2[expert, row]
                power[m] = _scale(operand, scale2, expert, row)
            for n in T.unroll(block_M // 8):
                for i in T.unroll(2):
                    place = row0 + n * 8 + lane % 4 * 2 + i
                    token, slot = token_ids[place] & _TOKEN, token_ids[place] >> TOKEN_BITS
                    if token < tokens:
                        weight = weights[place]
                        scale = _scale(operand, scale_hidden, place)
                        for m in T.unroll(tiles):
                            column = (row_tile + m) * TILE + warp * 16 + 2 * g
                            for v in T.unroll(2):
                                sum = acc[m * sums + n * 4 + v * 2 + i]
                                values[v] = (sum * (scale * power[2 * m + v]) + bias[2 * m + v]) * weight
                            if column < H:
                                put(y, token, slot, column, values)

        emit()

    product = _product(config, operand, store)

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
        with T.Kernel(T.ceildiv(H, config.rows), blocks, threads=config.threads) as (bx, by):
            sinks = [scale_hidden, token_ids, weights, scale2, bias2, row_tiles, y]
            product(hidden, w2, expert_ids, num_valid, sinks, bx, by, row_tiles, steps)

    return down
