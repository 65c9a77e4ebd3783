"""The two GEMMs of a mixture of experts on Hopper by the MMA of a warp, for few tokens per expert.

    hidden[row, j] = act(w13[e, j] . x[token(row)] + bias13[e, j], w13[e, I + j] . x[token(row)] + bias13[e, I + j])
    y[token(row), slot(row), h] = weight[row] * (w2[e, h] . hidden[row] + bias2[e, h])

Activations are bfloat16, weights are MXFP4. With few tokens per expert the time is that of loading weights, so every warp has
the loads of four steps, 64 of K each, in flight. Weights are the left operand of the MMA; they are decoded in registers and
never go to shared memory. Tokens are its columns, eight per MMA. The MoE intrinsics, which work on tiles that all threads
share, cannot say which lane loads and decodes what, so none is used.

Warp roles, of a block of warps * splits warps, `blocks_per_sm` blocks per SM; there is no warp specialization:

| warp | role |
| --- | --- |
| w of split s | loads and decodes rows 16 w to 16 w + 15 of the block, every splits-th step of K from step s on; their MMAs |
| all | copy tokens, and run the epilogue |

Pipelines, producer role -> consumer role:

| pipeline | carries | depth | ordered by |
| --- | --- | --- | --- |
| global memory -> one lane | the lane's codes and scales of a step | 4 steps | the registers that are loaded |
| all warps -> all warps | tokens of a chunk of K: 4 steps of each split | 2 chunks | cp.async groups, a barrier of the block |

Steady state:

    all warps   copy the tokens of chunk c + 1 | wait for those of chunk c | barrier
                four times: decode a step | load the step that takes its place, for chunk c + 1 | MMAs
                barrier ; on to the next chunk
                after the last chunk: accumulators to shared memory | barrier | add splits, bias | activate or weight | store

With PDL, `down` loads weights before it waits for the kernel that writes its activations; `gate_up` waits for the sort first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, TOKEN_BITS, TOKEN_MASK, Problem
from tilelang_ext.kernels.mxfp4_moe.sm90_decode import decode
from tilelang_ext.kernels.mxfp4_moe.sm90_slots import slots_type, store_pair
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, TILE
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.roles import WARP

PARTIAL_DTYPE, USES_PDL = "bfloat16", True
# The kernel's own barriers order all accesses, and its own bounds checks keep them inside.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
LANE_WORDS = BFLOAT16.lane_words
_DTYPE = BFLOAT16.dtype
_IN_FLIGHT = 4  # steps of a warp whose loads are in flight
_MMA_M, _MMA_N, _MMA_K = 16, 8, 16  # rows of weights, tokens, K
_COPY = 8  # elements of a copy of 16 bytes
_TILE_LINES = BFLOAT16.tile_words // LANE_WORDS  # of a tile, four words each
_SCALE_LINE = 32 * LANE_WORDS  # the first line of a tile that has scales
_PAD = 8  # elements of a row of shared memory, against bank conflicts


@dataclass(frozen=True)
class Config:
    """Tokens of a block; warps beside each other, with 16 rows of weights each; splits of K; blocks per SM.

    The warps divide the rows of weights, and the splits divide the steps of K.
    """

    block_M: int
    warps: int
    splits: int
    blocks_per_sm: int

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return self.warps * _MMA_M

    @property
    def threads(self) -> int:
        return self.warps * self.splits * WARP


# By the rows that an expert has when all experts are equally busy; each is the fastest of some on an H200, see
# docs/log/mxfp4_moe.md.
_MAX_ROWS_PER_EXPERT = 6
_TABLE = (
    # (slots up to, config)
    (64, Config(8, 4, 2, 4)),  # there are few blocks, so K is split to fill the SMs
    (None, Config(8, 8, 1, 4)),
)


def pick_config(problem: Problem) -> Config:
    """Return the tile for a problem, by its slots."""
    return next(config for most, config in _TABLE if most is None or problem.slots <= most)


def pick_configs(problem: Problem) -> tuple[Config]:
    """Return the one configuration of both GEMMs."""
    return (pick_config(problem),)


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traits:
    """What the host knows of one kernel."""

    config: Config
    is_first: bool  # whether this is the first GEMM, which gathers rows by token and directly follows the sort

    @property
    def token_mmas(self) -> int:
        """MMAs beside each other for all tokens of a block."""
        return self.config.block_M // _MMA_N

    @property
    def chunk(self) -> int:
        """K of the tokens that are copied at a time."""
        return _IN_FLIGHT * self.config.splits * TILE

    @property
    def row_copies(self) -> int:
        """Copies of 16 bytes that one row of a chunk takes."""
        return self.chunk // _COPY

    @property
    def thread_copies(self) -> int:
        """Copies of 16 bytes that one thread issues for a chunk."""
        return self.config.block_M * self.row_copies // self.config.threads


@dataclass(frozen=True, eq=False)
class _Operands:
    """Tensors of a GEMM in global memory, and its extents."""

    activations: Any  # (tokens, K), or in sorted order (blocks * block_M, K)
    lines: Any  # uint32 (lines, 4): the tiles of all experts, see `sm90_decode`
    bias: Any  # (experts, row_tiles * 64)
    token_ids: Any  # (blocks * block_M,)
    expert_ids: Any  # (blocks,)
    tokens: Any
    K: Any
    row_tiles: Any  # tiles of weights of one expert

    @property
    def steps(self):
        return T.ceildiv(self.K, TILE)


@dataclass(frozen=True, eq=False)
class _Block:
    """Shared memory, and where the block and the thread are."""

    X_s: Any  # (2, block_M, chunk and padding) bfloat16
    sums_s: Any  # (splits, block_M, rows and padding) float32: the accumulators of all warps
    bias_s: Any  # (rows,) float32
    bx: Any  # which rows of weights
    row: Any  # the first, in sorted order
    thread: Any


@dataclass(frozen=True, eq=False)
class _Registers:
    """The registers of a thread."""

    codes: Any  # uint32 (_IN_FLIGHT * LANE_WORDS,)
    scales: Any  # uint32 (_IN_FLIGHT,)
    A_r: Any  # one step of weights, decoded
    B_r: Any  # eight tokens by 64 of K
    accumulators: Any  # of each MMA: tokens 2 t and 2 t + 1 of row g, then of row g + 8
    lines: Any  # int64 (2,): the lines of codes and of scales that the lane begins with
    rows: Any  # int32 (thread_copies,): the rows of activations that the thread copies


def gate_up(config: Config, activation):
    """Return the prim_func of the first GEMM: (x, token_ids, expert_ids, w13, bias13, hidden).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x | (tokens, H) | bfloat16 |
    | token_ids, expert_ids | as `moe_sort` with block_M writes them; blocks without an expert end at once | int32 |
    | w13 | (E * row tiles * steps * 136, 4), tiles of `HopperWeights` | uint32 |
    | bias13 | (E, row tiles * 64), its bias | float32 |
    | hidden | (blocks * block_M, I), in sorted order; padding, and blocks without an expert, are undefined | bfloat16 |
    """
    tokens, hidden_groups, groups, blocks = (T.dynamic(name) for name in ("tokens", "hidden_groups", "groups", "blocks"))
    experts, row_tiles, lines = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("lines")
    H, I = hidden_groups * MX_GROUP, groups * MX_GROUP
    block_M, features = config.block_M, config.rows // 2
    traits = _Traits(config, is_first=True)

    @T.prim_func
    def gate_up(
        x: T.Tensor((tokens, H), _DTYPE),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        w13: T.Tensor((lines, LANE_WORDS), "uint32"),
        bias13: T.Tensor((experts, row_tiles * TILE), "float32"),
        hidden: T.Tensor((blocks * block_M, I), _DTYPE),
    ):
        with T.Kernel(T.ceildiv(I, features), blocks, threads=config.threads) as (bx, by):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            operands = _Operands(x, w13, bias13, token_ids, expert_ids, tokens, H, row_tiles)
            _gemm(traits, operands, functools.partial(_store_hidden, activation, hidden, I), bx, by)

    return gate_up


def down(config: Config, epilogue: str):
    """Return the prim_func of the second GEMM: (hidden, token_ids, weights, expert_ids, w2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden | (blocks * block_M, I), as `gate_up` writes it | bfloat16 |
    | token_ids, weights, expert_ids | as `moe_sort` with block_M writes them | int32; weights float32 |
    | w2 | (E * row tiles * steps * 136, 4), tiles of `HopperWeights` | uint32 |
    | bias2 | (E, row tiles * 64), its bias | float32 |
    | y | as `slots_type` returns; slots without a local expert are not written | |
    """
    tokens, top_k, hidden_groups, groups = (T.dynamic(name) for name in ("tokens", "top_k", "hidden_groups", "groups"))
    blocks, experts, row_tiles, lines = (T.dynamic(name) for name in ("blocks", "experts", "row_tiles", "lines"))
    H, I = hidden_groups * MX_GROUP, groups * MX_GROUP
    block_M, traits = config.block_M, _Traits(config, is_first=False)

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
        with T.Kernel(T.ceildiv(H, config.rows), blocks, threads=config.threads) as (bx, by):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            operands = _Operands(hidden, w2, bias2, token_ids, expert_ids, tokens, I, row_tiles)
            _gemm(traits, operands, functools.partial(_store_slots, epilogue, weights, y, H), bx, by)

    return down


# --- block -----------------------------------------------------------------------------------------------------------


@T.macro
def _gemm(traits, operands, store, bx, by):
    """Run the GEMM of a block. `store(traits, operands, block)` emits the epilogue."""
    X_s = T.alloc_shared((2, traits.config.block_M, traits.chunk + _PAD), _DTYPE)
    sums_s = T.alloc_shared((traits.config.splits, traits.config.block_M, traits.config.rows + 4), "float32")
    bias_s = T.alloc_shared((traits.config.rows,), "float32")
    registers = _alloc_registers(traits)
    thread = T.get_thread_binding()
    block = _Block(X_s, sums_s, bias_s, bx, by * traits.config.block_M, thread)
    if traits.is_first:
        pdl.wait()
    # The loads of all that the sort says of this block are in flight together, since loading weights waits for them.
    expert = T.alloc_var("int32", operands.expert_ids[by])
    _find_rows(traits, operands, block, registers)
    if expert >= 0:
        _multiply(traits, operands, block, registers, expert)
        store(traits, operands, block)
    elif not traits.is_first:
        pdl.wait()


def _alloc_registers(traits: _Traits) -> _Registers:
    @T.macro
    def alloc():
        codes, scales = T.alloc_local((_IN_FLIGHT * LANE_WORDS,), "uint32"), T.alloc_local((_IN_FLIGHT,), "uint32")
        A_r, B_r = T.alloc_local((4 * LANE_WORDS,), "uint32"), T.alloc_local((2 * TILE // _MMA_K,), "uint32")
        acc = T.alloc_local((traits.token_mmas * 4,), "float32")
        lines, rows = T.alloc_local((2,), "int64"), T.alloc_local((traits.thread_copies,), "int32")
        return codes, scales, A_r, B_r, acc, lines, rows

    return _Registers(*alloc())


def _find_rows(traits: _Traits, operands: _Operands, block: _Block, registers: _Registers) -> None:
    """Load which rows of activations the thread copies; -1 where a row has no token."""
    threads, row_copies, token_ids = traits.config.threads, traits.row_copies, operands.token_ids

    @T.macro
    def emit():
        for n in T.unroll(traits.thread_copies):
            row = block.row + (n * threads + block.thread) // row_copies
            token = token_ids[row] & TOKEN_MASK
            registers.rows[n] = T.if_then_else(token < operands.tokens, token if traits.is_first else row, -1)

    emit()


# --- loads -----------------------------------------------------------------------------------------------------------


@T.macro
def _load_weights(operands, registers, step, slot, thread):
    """Issue the loads of the lane's codes and scales of a step; those of a step past the last are zeros."""
    for v in T.vectorized(LANE_WORDS):
        registers.codes[slot * LANE_WORDS + v] = T.uint32(0)
    registers.scales[slot] = T.uint32(0)
    if step < operands.steps:
        for v in T.vectorized(LANE_WORDS):
            registers.codes[slot * LANE_WORDS + v] = operands.lines[registers.lines[0] + step * _TILE_LINES, v]
        registers.scales[slot] = operands.lines[registers.lines[1] + step * _TILE_LINES, thread % 32 // 4 % 4]


@T.macro
def _copy_tokens(traits, operands, block, registers, chunk):
    """Issue the copies of a chunk of the tokens; rows without a token, and K past the end, are filled with zeros."""
    for n in T.unroll(traits.thread_copies):
        copy = n * traits.config.threads + block.thread
        k = chunk * traits.chunk + copy % traits.row_copies * _COPY
        inside = (registers.rows[n] >= 0) & (k < operands.K)
        T.ptx_cp_async(
            T.access_ptr(block.X_s[chunk % 2, copy // traits.row_copies, copy % traits.row_copies * _COPY], "w", _COPY),
            T.access_ptr(operands.activations[T.max(registers.rows[n], 0), T.if_then_else(k < operands.K, k, 0)], "r", _COPY),
            _COPY,
            inside,
        )
    T.ptx_commit_group()


def _copy_bias(traits: _Traits, operands: _Operands, block: _Block, expert) -> None:
    """Issue the copies of the rows' bias; they belong to the first chunk of tokens, so that the epilogue need not wait."""
    rows, bias, bias_s, last = traits.config.rows, operands.bias, block.bias_s, operands.row_tiles * TILE - 4

    @T.macro
    def emit():
        if block.thread < rows // 4:
            T.ptx_cp_async(
                T.access_ptr(bias_s[block.thread * 4], "w", 4),
                T.access_ptr(bias[expert, T.min(block.bx * rows + block.thread * 4, last)], "r", 4),
                4,
            )

    emit()


# --- main loop -------------------------------------------------------------------------------------------------------


def _multiply(traits: _Traits, operands: _Operands, block: _Block, registers: _Registers, expert) -> None:
    """Multiply the block's rows of weights by its tokens, and leave the accumulators of all warps in sums_s."""
    config = traits.config

    @T.macro
    def emit():
        lane, warp = block.thread % WARP, block.thread // WARP % config.warps
        split = block.thread // WARP // config.warps
        _find_lines(traits, operands, block, registers, expert, warp)
        for slot in T.unroll(_IN_FLIGHT):
            _load_weights(operands, registers, slot * config.splits + split, slot, block.thread)
        _copy_bias(traits, operands, block, expert)
        if not traits.is_first:
            pdl.wait()
        pdl.trigger()  # here, since the compiler moves no load of weights past it
        _copy_tokens(traits, operands, block, registers, 0)
        for i in T.unroll(traits.token_mmas * 4):
            registers.accumulators[i] = T.float32(0)
        for chunk in T.serial(T.ceildiv(operands.steps, _IN_FLIGHT * config.splits)):
            _copy_tokens(traits, operands, block, registers, chunk + 1)
            T.ptx_wait_group(1)
            T.sync_threads()
            for slot in T.unroll(_IN_FLIGHT):
                _multiply_step(traits, operands, block, registers, chunk, slot, split)
            T.sync_threads()
        for n in T.unroll(traits.token_mmas):
            for i in T.unroll(4):
                token, row = n * _MMA_N + lane % 4 * 2 + i % 2, warp * _MMA_M + lane // 4 + i // 2 * 8
                block.sums_s[split, token, row] = registers.accumulators[n * 4 + i]
        T.sync_threads()

    emit()


def _find_lines(traits: _Traits, operands: _Operands, block: _Block, registers: _Registers, expert, warp) -> None:
    """Compute the lines that the lane begins with: in 64 bits here, once, and not at each load."""
    lane = block.thread % WARP

    @T.macro
    def emit():
        first = block.bx * traits.config.warps + warp
        tile, warp_of_tile = T.min(first // 4, operands.row_tiles - 1), first % 4
        tiles_before = T.cast(expert * operands.row_tiles + tile, "int64") * operands.steps
        registers.lines[0] = tiles_before * _TILE_LINES + warp_of_tile * 32 + lane
        registers.lines[1] = tiles_before * _TILE_LINES + _SCALE_LINE + warp_of_tile * 2 + lane // 16

    emit()


def _multiply_step(traits: _Traits, operands: _Operands, block: _Block, registers: _Registers, chunk, slot, split) -> None:
    """Decode the step of a slot, load the step that takes its place, and issue the MMAs of the decoded one."""
    splits = traits.config.splits
    words = [registers.codes[slot * LANE_WORDS + i] for i in range(LANE_WORDS)]

    @T.macro
    def emit():
        decode(BFLOAT16, words, [registers.scales[slot]], registers.A_r, 0)
        _load_weights(operands, registers, ((chunk + 1) * _IN_FLIGHT + slot) * splits + split, slot, block.thread)
        _issue_mmas(traits, block, registers, chunk % 2, (slot * splits + split) * TILE)

    emit()


@T.macro
def _issue_mmas(traits, block, registers, buffer, k):
    """Issue the MMAs of one decoded step with all tokens, whose K begins at `k` in a buffer of X_s."""
    for n in T.unroll(traits.token_mmas):
        for half in T.unroll(2):
            token, column = n * _MMA_N + block.thread % WARP % 8, k + half * 32 + block.thread % WARP // 8 * 8
            T.ptx_ldmatrix(
                T.bool(False),
                4,
                T.access_ptr(block.X_s[buffer, token, column], "r"),
                T.access_ptr(registers.B_r[half * 4], "w"),
            )
        for i in T.unroll(TILE // _MMA_K):
            T.ptx_mma(
                "float32", "m16n8k16", "row", "col", "bf16", "bf16", "fp32", registers.A_r.data, i * 4,
                registers.B_r.data, i * 2, registers.accumulators.data, n * 4, T.bool(False),
            )  # fmt: skip


# --- epilogue --------------------------------------------------------------------------------------------------------


def _sum(traits: _Traits, block: _Block, token, row):
    """Return the sum over the splits of one element of the tile, and the bias of its row."""
    sums_s = block.sums_s
    partial = sum((sums_s[split, token, row] for split in range(1, traits.config.splits)), sums_s[0, token, row])
    return partial + block.bias_s[row]


def _store_hidden(activation, hidden, I, traits: _Traits, operands: _Operands, block: _Block) -> None:
    """The epilogue of `gate_up`: one feature per thread, gate row and up row eight apart."""
    block_M, features, threads, bx = traits.config.block_M, traits.config.rows // 2, traits.config.threads, block.bx

    @T.macro
    def emit():
        for n in T.serial(T.ceildiv(block_M * features, threads)):
            element = n * threads + block.thread
            m, feature = element // features, element % features
            row = feature // 8 * 16 + feature % 8
            if m < block_M and bx * features + feature < I:
                gate, up = _sum(traits, block, m, row), _sum(traits, block, m, row + 8)
                hidden[block.row + m, bx * features + feature] = T.cast(activation(gate, up), _DTYPE)

    emit()


def _store_slots(epilogue: str, weights, y, H, traits: _Traits, operands: _Operands, block: _Block) -> None:
    """The epilogue of `down`: two neighbouring columns per thread, whose rows of weights are eight apart."""
    block_M, rows, threads, bx = traits.config.block_M, traits.config.rows, traits.config.threads, block.bx
    token_ids, row0, store = operands.token_ids, block.row, store_pair(epilogue)

    @T.macro
    def emit():
        values = T.alloc_local((2,), "float32")
        for n in T.serial(T.ceildiv(block_M * rows // 2, threads)):
            pair = n * threads + block.thread
            m, column = pair // (rows // 2), pair % (rows // 2) * 2
            if m < block_M and bx * rows + column < H:
                token, slot = token_ids[row0 + m] & TOKEN_MASK, token_ids[row0 + m] >> TOKEN_BITS
                if token < operands.tokens:
                    for v in T.unroll(2):
                        row = column // 16 * 16 + column % 16 // 2 + v * 8
                        value = _sum(traits, block, m, row)
                        values[v] = value * weights[row0 + m]
                    store(y, token, slot, bx * rows + column, values, 0)

    emit()


# --- host ------------------------------------------------------------------------------------------------------------


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
        hidden = device.empty(token_ids.shape[0], problem.intermediate_size, dtype="bfloat16")
        first(x, token_ids, expert_ids, w13.tiles.view(-1, LANE_WORDS), w13.bias, hidden)
        second(hidden, token_ids, weights, expert_ids, w2.tiles.view(-1, LANE_WORDS), w2.bias, y)

    return run
