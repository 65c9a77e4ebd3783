"""A consumer of the scan on Hopper: the MMAs of 64 rows of V, chunk after chunk, with the state in registers.

The order of a chunk and the reason for it: `sm90_scan`.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.sm90_block import Block, Traits
from tilelang_ext.kernels.gated_delta.sm90_config import PANEL, ROW_BYTES, WGMMA_K, WGMMA_M
from tilelang_ext.kernels.gated_delta.sm90_store import VECTOR, store, store_state
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, warpgroup_sync

_PTX_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
_SWIZZLE_128B, _SWIZZLE_ATOM = 1, 1024 // 16  # of a descriptor: its mode, and the stride between eight rows of 128 bytes
_UNIT = 16  # bytes of a descriptor's unit


@dataclass(frozen=True, eq=False)
class Consumer:
    """The registers of a thread of a consumer.

    With g = lane / 4 and t = lane % 4, element 4 j + 2 r + i of an accumulator is row g + 8 r of the warp's 16 of V, and token
    or channel 8 j + 2 t + i.
    """

    number: int
    S: Any
    P: Any  # of a chunk: P, then R
    O: Any
    V: Any  # of 16 bits, as are the left operands
    S_r: Any
    X_r: Any
    R_r: Any
    descriptors: tuple  # of k by tokens, k by channels, q, T, A
    thread: Any  # of the warpgroup

    @property
    def lane(self):
        return self.thread % WARP

    @property
    def row(self):
        """Row g of the consumer's 64."""
        return self.thread // WARP * 16 + self.lane // 4

    @property
    def column(self):
        """2 t."""
        return self.lane % 4 * 2


@T.macro
def consume(traits, operands, block, number):
    """Compute the consumer's rows of V, chunk after chunk."""
    traits.config.roles.begin_consumer()
    consumer = _alloc_consumer(traits, block, number)
    _load_state(traits, operands, block, consumer)
    if block.num_chunks > 0:
        _wait_chunk(traits, block, consumer, 0)
        _issue_products(traits, block, consumer, 0)
        _subtract(traits, block, consumer, 0)
        for chunk in T.serial(block.num_chunks):
            _compute(traits, operands, block, consumer, chunk)
    store_state(traits, operands, block, consumer)


def _alloc_consumer(traits: Traits, block: Block, number: int) -> Consumer:
    panel_units = traits.panel_bytes // _UNIT

    @T.macro
    def descriptor(shared, leading):
        of = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(of, shared.access_ptr("r"), _SWIZZLE_128B, leading, _SWIZZLE_ATOM)
        return of

    @T.macro
    def alloc():
        S = T.alloc_local((traits.states,), "float32")
        P = T.alloc_local((traits.tokens,), "float32")
        O = T.alloc_local((traits.tokens,), "float32")
        V = T.alloc_local((traits.tokens,), traits.problem.dtype)
        S_r = T.alloc_local((traits.states,), traits.problem.dtype)
        X_r = T.alloc_local((traits.tokens,), traits.problem.dtype)
        R_r = T.alloc_local((traits.tokens,), traits.problem.dtype)
        return S, P, O, V, S_r, X_r, R_r

    registers = alloc()
    descriptors = (
        descriptor(block.k_s, 1),
        descriptor(block.k_s, panel_units),
        descriptor(block.q_s, 1),
        descriptor(block.solution_s, 1),
        descriptor(block.scores_s, 1),
    )
    return Consumer(number, *registers, descriptors, block.thread % WARPGROUP)


@T.macro
def _load_state(traits, operands, block, consumer):
    for j in T.unroll(traits.problem.K // 8):
        for r in T.unroll(2):
            for i in T.vectorized(2):
                if traits.problem.has_initial:
                    consumer.S[4 * j + 2 * r + i] = T.cast(
                        operands.initial[
                            block.sequence,
                            block.head,
                            block.row + consumer.number * WGMMA_M + consumer.row + 8 * r,
                            8 * j + consumer.column + i,
                        ],
                        "float32",
                    )
                else:
                    consumer.S[4 * j + 2 * r + i] = T.float32(0)


@T.macro
def _wait_chunk(traits, block, consumer, chunk):
    """Wait for the loads of a chunk."""
    stage = T.alloc_var("int32", _uniform(block.pipeline.stage(chunk)))
    block.pipeline.wait(stage, block.pipeline.full_phase(chunk))
    if traits.problem.has_lengths:
        _clear_keys(traits, block, consumer, stage, block.span.tokens - chunk * traits.problem.chunk)


@T.macro
def _issue_products(traits, block, consumer, chunk):
    """Round S, and issue P = S K^T."""
    stage = T.alloc_var("int32", _uniform(block.pipeline.stage(chunk)))
    _round(consumer.S, consumer.S_r, traits.states, traits.problem.dtype)
    k_by_tokens = consumer.descriptors[0]
    _multiply(traits, consumer.S_r, k_by_tokens, stage * traits.panels, traits.panels, consumer.P, traits.tokens)


@T.macro
def _subtract(traits, block, consumer, chunk):
    """Wait for all MMAs, and compute X = V^T - P diag(p), rounded."""
    C, P = traits.problem.chunk, consumer.P
    stage = T.alloc_var("int32", _uniform(block.pipeline.stage(chunk)))
    rows = T.alloc_var("int32", block.span.tokens - chunk * C)
    for j in T.unroll(C // 8):
        for r in T.unroll(2):
            for i in T.unroll(2):
                consumer.V[4 * j + 2 * r + i] = block.v_s[
                    stage, consumer.number, 8 * j + consumer.column + i, consumer.row + 8 * r
                ]
    T.wait_wgmma(0)
    T.warpgroup_fence_operand(P, num_regs=traits.tokens)
    for j in T.unroll(C // 8):
        for i in T.unroll(2):
            token = 8 * j + consumer.column + i
            p = block.factors_s[stage, 0, token]
            for r in T.unroll(2):
                P[4 * j + 2 * r + i] = T.cast(consumer.V[4 * j + 2 * r + i], "float32") - p * P[4 * j + 2 * r + i]
                if traits.problem.has_lengths and token >= rows:
                    P[4 * j + 2 * r + i] = T.float32(0)
    _round(P, consumer.X_r, traits.tokens, traits.problem.dtype)


@T.macro
def _compute(traits, operands, block, consumer, chunk):
    """Compute the results of a chunk, whose X is there, the state after it, and the next chunk's X."""
    C, dtype = traits.problem.chunk, traits.problem.dtype
    S, P, O = consumer.S, consumer.P, consumer.O
    _, k_by_channels, q, solution, scores = consumer.descriptors
    stage = T.alloc_var("int32", _uniform(block.pipeline.stage(chunk)))
    # Behind the last chunk its P is computed once more, and not used.
    following = T.alloc_var("int32", T.min(chunk + 1, block.num_chunks - 1))
    _multiply(traits, consumer.X_r, solution, stage, 1, P, traits.tokens)
    _multiply(traits, consumer.S_r, q, stage * traits.panels, traits.panels, O, traits.tokens)
    s = block.factors_s[stage, 3, 0]
    for e in T.unroll(traits.states):
        S[e] = S[e] * s
    T.wait_wgmma(1)
    T.warpgroup_fence_operand(P, num_regs=traits.tokens)
    _round(P, consumer.R_r, traits.tokens, dtype)
    _scale(block, consumer, P, stage, 1, C)
    _round(P, consumer.X_r, traits.tokens, dtype)
    _wait_chunk(traits, block, consumer, following)
    _add(traits, consumer.X_r, k_by_channels, stage * traits.panels, S, traits.states, False)
    T.wait_wgmma(1)
    T.warpgroup_fence_operand(O, num_regs=traits.tokens)
    _scale(block, consumer, O, stage, 2, C)
    _add(traits, consumer.R_r, scores, stage, O, traits.tokens, True)
    T.wait_wgmma(1)
    T.warpgroup_fence_operand(S, num_regs=traits.states)
    _issue_products(traits, block, consumer, following)
    T.wait_wgmma(1)
    T.warpgroup_fence_operand(O, num_regs=traits.tokens)
    store(traits, operands, block, consumer, chunk, stage, block.span.tokens - chunk * C)
    _subtract(traits, block, consumer, following)
    T.sync_warp()  # the lanes have read v and the factors
    block.pipeline.release(stage, consumer.lane)


def _uniform(stage):
    """Return a value that all threads have: from a shuffle the compiler sees it, and keeps descriptors in uniform registers."""
    return T.call_pure_extern("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), stage, 0)


@T.macro
def _round(values, rounded, count, dtype):
    for e in T.unroll(count // 2):
        for i in T.vectorized(2):
            rounded[2 * e + i] = T.cast(values[2 * e + i], dtype)


@T.macro
def _scale(block, consumer, values, stage, factor, C):
    """Multiply each token's column of an accumulator by a factor of it."""
    for j in T.unroll(C // 8):
        for i in T.unroll(2):
            x = block.factors_s[stage, factor, 8 * j + consumer.column + i]
            for r in T.unroll(2):
                values[4 * j + 2 * r + i] = values[4 * j + 2 * r + i] * x


@T.macro
def _multiply(traits, left, right, first_panel, panels, accumulator, registers):
    """Issue accumulator = left * right, where rows of `right` are tokens and lie along the sum, in panels from one on."""
    ptx = _PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(accumulator, num_regs=registers)
    T.warpgroup_fence_operand(left, num_regs=panels * PANEL // 4)
    T.warpgroup_arrive()
    for k in T.unroll(panels * PANEL // WGMMA_K):
        T.ptx_wgmma_rs(
            "float32", f"m64n{traits.problem.chunk}k16", True, ptx, ptx, "fp32",
            left.data, 8 * k,
            right.data, ((first_panel + k // 4) * traits.panel_bytes + k % 4 * 32) // _UNIT,
            accumulator.data, 0, k > 0, 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _add(traits, left, right, first_panel, accumulator, registers, along_sum):
    """Issue accumulator += left * right: as above, or with tokens along the sum, and channels in panels."""
    ptx = _PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(accumulator, num_regs=registers)
    T.warpgroup_fence_operand(left, num_regs=traits.problem.chunk // 4)
    T.warpgroup_arrive()
    for k in T.unroll(traits.problem.chunk // WGMMA_K):
        T.ptx_wgmma_rs(
            "float32", f"m64n{2 * registers}k16", along_sum, ptx, ptx, "fp32",
            left.data, 8 * k,
            right.data, (first_panel * traits.panel_bytes + k * (32 if along_sum else WGMMA_K * ROW_BYTES)) // _UNIT,
            accumulator.data, 0, T.bool(True), 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _clear_keys(traits, block, consumer, stage, rows):
    """Clear keys past the end of the sequence: 0 times an infinity of another sequence would be NaN."""
    if rows < traits.problem.chunk:
        for turn in T.serial(traits.panels * traits.problem.chunk * (PANEL // VECTOR) // WARPGROUP):
            piece = turn * WARPGROUP + consumer.thread
            if piece // 8 % traits.problem.chunk >= rows:
                for e in T.vectorized(VECTOR):
                    block.k_s[
                        stage, piece // (8 * traits.problem.chunk), piece // 8 % traits.problem.chunk, piece % 8 * VECTOR + e
                    ] = T.cast(0, traits.problem.dtype)
        T.fence_proxy_async()
        warpgroup_sync(consumer.number)
