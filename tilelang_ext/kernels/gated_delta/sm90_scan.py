"""From chunk to chunk on Hopper: results and states of the gated delta rule, with the state in registers.

Everything is transposed, so that whatever an MMA reads from the left is an accumulator of the MMA before, rounded (PTX ISA
9.7.15: what a thread has of an accumulator are the elements that it holds of a left operand of 16 bits). Of a chunk, for 64
rows of V:

    P = S K^T;  X = V^T - P diag(p);  R = X T^T                                p = factors[0]
    O = S Q^T diag(o) + R A^T                                                  o = factors[2]
    S = s S + R diag(u) K                                                      u = factors[1], s = factors[3]

Warp roles, one block per sequence, head and slice of 64 rows of V per consumer:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of k, q, v, T, A and the factors of a chunk | 24 |
| 1, and 2 if there are two | consumers: 64 rows of V each, their MMAs and results | 240 |

Pipeline, producer role -> consumer role: a stage is a chunk; full: 128 threads and the bytes, empty: 4 warps of each consumer.

Steady state of a consumer:

    issue R | issue S Q^T | scale S | R is complete: round it twice | the next chunk has landed | issue S |
    S Q^T is complete: scale it | issue O | S is complete: round it, issue the next chunk's P |
    O is complete: store it through the stage's v, release the stage | P is complete: the next chunk's X

The wait for the next chunk stands where no accumulator that is read before the next wait for MMAs is in flight: its loop would
make ptxas serialize the MMAs.

Rows past the end of a tensor are zeros, by TMA. Those of another sequence are cleared where they would be multiplied by 0.

Floor on an H200, K and V of 128: the MMAs of a chunk and 64 rows take 1,024 cycles, one after the other; both kernels move 2 KB
per token and head, at 4.25 TB/s (docs/log/gated_delta.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import (
    FACTORS,
    HOPPER,
    MAX_SEQUENCES,
    PrefillProblem,
    Span,
    alloc_span,
    find_sequence,
)
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch, warpgroup_sync

WGMMA_M, WGMMA_K = 64, 16
PANEL = 64  # elements of 16 bits in a swizzled row of 128 bytes of shared memory
# The kernel's own barriers order everything here; TMA clips what lies past the end, and stores are guarded.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_PTX_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
_SWIZZLE_128B, _SWIZZLE_ATOM = 1, 1024 // 16  # of a descriptor: its mode, and the stride between eight rows of 128 bytes
_ROW_BYTES, _UNIT = 128, 16  # of a row of shared memory; of a descriptor
_FLOAT_BYTES = 4
_VECTOR = 8  # elements of 16 bytes


@dataclass(frozen=True)
class Config:
    """Consumers of a block, and stages of the pipeline."""

    num_consumers: int
    num_stages: int = 3

    @property
    def roles(self) -> Roles:
        return Roles(self.num_consumers, 24, 240)


def pick_config(problem: PrefillProblem, sequences: int) -> Config:
    """Return two consumers where blocks of one would not all run at once: they share the loads of q, k, T and A."""
    return Config(1 if sequences <= sequences_of_one_wave(problem) or problem.V % (2 * WGMMA_M) else 2)


def sequences_of_one_wave(problem: PrefillProblem) -> int:
    """Return the most sequences whose blocks of one consumer are no more than the SMs."""
    return problem.num_sms // (problem.heads * (problem.V // WGMMA_M))


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel."""

    problem: PrefillProblem
    config: Config

    @property
    def slices(self) -> int:
        """Blocks of a head."""
        return self.problem.V // (WGMMA_M * self.config.num_consumers)

    @property
    def panels(self) -> int:
        """Panels of 64 channels."""
        return self.problem.K // PANEL

    @property
    def panel_bytes(self) -> int:
        return self.problem.chunk * _ROW_BYTES

    @property
    def states(self) -> int:
        """Registers of S of a thread."""
        return self.problem.K // 2

    @property
    def tokens(self) -> int:
        """Registers of P, X, R and O of a thread."""
        return self.problem.chunk // 2


@dataclass(frozen=True, eq=False)
class _Operands:
    """The parameters of the prim_func, in order."""

    q: Any
    k: Any
    v: Any
    solution: Any
    scores: Any
    factors: Any
    cu_seqlens: Any
    initial: Any
    out: Any
    final: Any


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    q_s: Any  # (num_stages, panels, C, 64)
    k_s: Any
    v_s: Any  # (num_stages, num_consumers, C, 64)
    solution_s: Any  # (num_stages, C, 64)
    scores_s: Any
    factors_s: Any  # (num_stages, FACTORS, C)
    pipeline: Pipeline
    span: Span
    sequence: Any
    head: Any
    row: Any  # of V, the block's first
    thread: Any

    @property
    def num_chunks(self):
        return T.ceildiv(self.span.tokens, PANEL)


@dataclass(frozen=True, eq=False)
class _Consumer:
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


def scan_chunks(problem: PrefillProblem, config: Config):
    """The prim_func (q, k, v, solution, scores, factors, cu_seqlens, initial, out, final)."""
    traits, types = _Traits(problem, config), problem.types()

    @T.prim_func
    def scan_chunks(
        q: types.q,
        k: types.k,
        v: types.v,
        solution: types.solution,
        scores: types.scores,
        factors: types.factors,
        cu_seqlens: types.cu_seqlens,
        initial: types.initial,
        out: types.out,
        final: types.final,
    ):
        _scan(traits, _Operands(q, k, v, solution, scores, factors, cu_seqlens, initial, out, final))

    return scan_chunks


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _scan(traits, operands):
    with T.Kernel(
        operands.final.shape[0] * traits.problem.heads * traits.slices, threads=traits.config.roles.threads
    ) as number:
        stages, C, dtype = traits.config.num_stages, traits.problem.chunk, traits.problem.dtype
        q_s = T.alloc_shared((stages, traits.panels, C, PANEL), dtype)
        k_s = T.alloc_shared((stages, traits.panels, C, PANEL), dtype)
        v_s = T.alloc_shared((stages, traits.config.num_consumers, C, PANEL), dtype)
        solution_s = T.alloc_shared((stages, C, PANEL), dtype)
        scores_s = T.alloc_shared((stages, C, PANEL), dtype)
        factors_s = T.alloc_shared((stages, FACTORS, C), "float32")
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_s, v_s, solution_s, scores_s)})
        pipeline = alloc_pipeline(stages, WARPGROUP, traits.config.roles.consumer_warps)
        span, thread = alloc_span(), T.get_thread_binding()
        head, sequence = number // traits.slices % traits.problem.heads, number // (traits.slices * traits.problem.heads)
        row = number % traits.slices * (WGMMA_M * traits.config.num_consumers)
        pdl.trigger()
        pdl.wait()
        find_sequence(traits.problem, operands.q, operands.cu_seqlens, sequence, span)
        _dispatch_roles(
            traits,
            operands,
            _Block(q_s, k_s, v_s, solution_s, scores_s, factors_s, pipeline, span, sequence, head, row, thread),
        )


def _dispatch_roles(traits: _Traits, operands: _Operands, block: _Block) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, number))
        for number in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Keep the pipeline filled, chunk after chunk."""
    traits.config.roles.begin_producer()
    for chunk in T.serial(block.num_chunks):
        stage = block.pipeline.stage(chunk)
        block.pipeline.acquire(stage, block.pipeline.empty_phase(chunk))
        _load(traits, operands, block, chunk, stage)
        block.pipeline.commit(stage)


def _load(traits: _Traits, operands: _Operands, block: _Block, chunk, stage) -> None:
    """Issue the loads of a chunk, in the order in which consumers need them."""
    problem, span, full = traits.problem, block.span, block.pipeline.full[stage]
    C, first = problem.chunk, span.first + chunk * problem.chunk
    tile, qk_head = (span.slot + chunk) * problem.heads + block.head, block.head // (problem.heads // problem.qk_heads)

    def load_panels(source, head, column: int, shared, panels: int) -> None:
        for panel in range(panels):
            at = column + panel * PANEL
            T.evaluate(
                T.tma_copy(
                    source[span.batch, first : first + C, head, at : at + PANEL], shared[stage, panel, :, :], barrier=full
                )
            )

    @T.macro
    def load_factors():
        if T.shuffle_elect(WARPGROUP):
            T.mbarrier_expect_tx(full, FACTORS * C * _FLOAT_BYTES)
            T.tma_load(
                T.address_of(block.factors_s[stage, 0, 0]), T.address_of(operands.factors[tile, 0, 0]), full,
                FACTORS * C * _FLOAT_BYTES, 0,
            )  # fmt: skip

    load_panels(operands.k, qk_head, 0, block.k_s, traits.panels)
    load_factors()
    load_panels(operands.v, block.head, block.row, block.v_s, traits.config.num_consumers)
    T.evaluate(T.tma_copy(operands.solution[tile, 0:C, 0:C], block.solution_s[stage, :, :], barrier=full))
    load_panels(operands.q, qk_head, 0, block.q_s, traits.panels)
    T.evaluate(T.tma_copy(operands.scores[tile, 0:C, 0:C], block.scores_s[stage, :, :], barrier=full))


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, block, number):
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
    _store_state(traits, operands, block, consumer)


def _alloc_consumer(traits: _Traits, block: _Block, number: int) -> _Consumer:
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
    return _Consumer(number, *registers, descriptors, block.thread % WARPGROUP)


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
def _store_state(traits, operands, block, consumer):
    for j in T.unroll(traits.problem.K // 8):
        for r in T.unroll(2):
            for i in T.vectorized(2):
                operands.final[
                    block.sequence,
                    block.head,
                    block.row + consumer.number * WGMMA_M + consumer.row + 8 * r,
                    8 * j + consumer.column + i,
                ] = T.cast(consumer.S[4 * j + 2 * r + i], traits.problem.state_dtype)


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
    _store(traits, operands, block, consumer, chunk, stage, block.span.tokens - chunk * C)
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
            right.data, (first_panel * traits.panel_bytes + k * (32 if along_sum else WGMMA_K * _ROW_BYTES)) // _UNIT,
            accumulator.data, 0, T.bool(True), 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _clear_keys(traits, block, consumer, stage, rows):
    """Clear keys past the end of the sequence: 0 times an infinity of another sequence would be NaN."""
    if rows < traits.problem.chunk:
        for turn in T.serial(traits.panels * traits.problem.chunk * (PANEL // _VECTOR) // WARPGROUP):
            piece = turn * WARPGROUP + consumer.thread
            if piece // 8 % traits.problem.chunk >= rows:
                for e in T.vectorized(_VECTOR):
                    block.k_s[
                        stage, piece // (8 * traits.problem.chunk), piece // 8 % traits.problem.chunk, piece % 8 * _VECTOR + e
                    ] = T.cast(0, traits.problem.dtype)
        T.fence_proxy_async()
        warpgroup_sync(consumer.number)


@T.macro
def _store(traits, operands, block, consumer, chunk, stage, rows):
    """Store the results through the shared memory of the chunk's v, which this consumer alone reads."""
    for j in T.unroll(traits.problem.chunk // 8):
        for r in T.unroll(2):
            for i in T.unroll(2):
                block.v_s[stage, consumer.number, 8 * j + consumer.column + i, consumer.row + 8 * r] = T.cast(
                    consumer.O[4 * j + 2 * r + i], traits.problem.dtype
                )
    T.fence_proxy_async()  # before TMA writes there again
    warpgroup_sync(consumer.number)
    for turn in T.unroll(traits.problem.chunk * (PANEL // _VECTOR) // WARPGROUP):
        piece = turn * WARPGROUP + consumer.thread
        if piece // 8 < rows:
            for e in T.vectorized(_VECTOR):
                operands.out[
                    block.span.batch,
                    block.span.first + chunk * traits.problem.chunk + piece // 8,
                    block.head,
                    block.row + consumer.number * WGMMA_M + piece % 8 * _VECTOR + e,
                ] = block.v_s[stage, consumer.number, piece // 8, piece % 8 * _VECTOR + e]


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: PrefillProblem) -> bool:
    """Hopper, K of 64 or 128 and V of whole tiles."""
    return problem.arch == HOPPER and problem.K in (PANEL, 2 * PANEL) and problem.V % WGMMA_M == 0


def sequences_served(problem: PrefillProblem, sequences: int) -> tuple[int, int]:
    """Return the fewest and the most sequences that have the configuration of this number."""
    most = sequences_of_one_wave(problem)
    return (1, most) if sequences <= most else (most + 1, MAX_SEQUENCES)


def compile_kernel(problem: PrefillProblem, sequences: int, device) -> Callable:
    """Return the compiled kernel for numbers of sequences that have the configuration of this one."""
    return device.compile(scan_chunks, problem, pick_config(problem, sequences), pass_configs=PASS_CONFIGS)
