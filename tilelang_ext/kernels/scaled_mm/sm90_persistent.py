"""Scaled matmul on Hopper for more than 128 rows: a persistent kernel of two computing warpgroups and a loading one.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

One block a processor walks over the tiles, eight rows of tiles at a time, which keeps what neighbours read in the L2 cache. The
loading warpgroup fills a ring of stages by bulk copies and does not stop between tiles, so that one tile's stores run under the
next one's products. The scale groups of K are 128: a warpgroup adds a product of 64 rows to its float32 sums while the other
one's runs. With `fast_accum` the sums stay in the matrix unit, and one product is in flight while the next is issued.

Scales that cover all of K, or 1x128 beside 128x128. Floors on an H200: 2 M N K / 1.98e15 s; see docs/performance.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import torch
from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK, BlockScaledLayout
from tilelang_ext.kernels.scaled_mm.problem import Problem, compile_prim_func

ARCH = "sm_90a"
BLOCK_K = FP8_BLOCK  # bytes of a swizzled row of shared memory, and a float32 block of scales
WARPGROUP = 128  # threads
BAND = 64  # rows of one product of a warpgroup
BLOCKS = (BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK))
# Bulk copies clip what lies past the end, and the rest is clamped here.
PASS_CONFIGS = {"tl.disable_warp_specialized": True, "tl.disable_safe_memory_legalize": True}

_COMPUTING = 2  # warpgroups
_LOADER_REGISTERS, _COMPUTER_REGISTERS = 40, 232  # a thread: 128 x 40 + 256 x 232 of the processor's 65,536
_TILES_OF_ROWS = 8  # that are walked over together
_STORES = 2  # of a part of the tile that a warpgroup has running
_STEPS_OF_A_STORE = 2  # of the next tile, before the next late part is stored


@dataclass(frozen=True)
class Config:
    """The tile of a block, the stages of its ring, the columns of a part that is stored at once, the number of blocks, and how
    many parts of a tile are stored during the next one's steps.
    """

    block_M: int
    block_N: int
    num_stages: int
    store_N: int
    num_blocks: int
    late: int = 0


def pick_config(problem: Problem) -> Config:
    """Return the largest tile of which every processor has one."""
    num_blocks = num_processors()
    table = [
        # (whether the sums stay in the matrix unit, block_M, block_N, num_stages, bytes of a row stored at once, late)
        (True, 128, 256, 4, 128, 3),  # 128 registers of sums and 48 of late parts; reads least from the L2 cache
        (True, 128, 128, 6, 128, 2),
        (False, 256, 128, 4, 64, 0),  # 192 registers: the product of one band beside the sums of two; room for the factors
        (False, 128, 128, 5, 64, 0),
    ]
    rows = [row for row in table if row[0] is _sums_stay(problem)]
    for _, block_M, block_N, num_stages, store_bytes, late in rows:  # noqa: B007 -- the last one serves what fits none
        if -(-problem.max_M // block_M) * -(-problem.N // block_N) >= num_blocks:
            break
    steps = -(-problem.K // BLOCK_K)
    num_stages = 4 if steps % num_stages and steps % 4 == 0 else min(num_stages, steps)  # constant stages run 7% faster
    store_N = store_bytes * 8 // T.dtype(problem.out_dtype).bits
    return Config(block_M, block_N, num_stages, store_N, num_blocks, min(late, steps // _STEPS_OF_A_STORE))


def num_processors() -> int:
    """Of the current GPU; of an H200 where there is none, as for tests of the machine code."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def _sums_stay(problem: Problem) -> bool:
    return problem.fast_accum and problem.layout_a.k is None


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    N, K, out_dtype = problem.N, problem.K, problem.out_dtype
    block_M, block_N, num_stages, num_blocks = config.block_M, config.block_N, config.num_stages, config.num_blocks
    store_N, parts = config.store_N, config.block_N // config.store_N
    M = T.dynamic("M")
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, problem.layout_a, M, "scale_a")
    scale_b_type = scale_type(problem, problem.layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), out_dtype)
    fast, grouped = _sums_stay(problem), problem.layout_a.k is not None
    steps, columns = -(-K // BLOCK_K), -(-N // block_N)  # of K, of tiles
    bands = block_M // (BAND * _COMPUTING)  # of a warpgroup
    fetched, fetched_b = block_M // WARPGROUP, block_N // WARPGROUP  # rows and columns whose scales a loading thread fetches
    unrolled = num_stages if steps % num_stages == 0 and not fast else 1  # steps a turn of the loop; then a stage is a constant
    # Scales of all of K come with the stage that is filled for the second time in a tile: then the tile before is stored.
    staged = not grouped and steps > num_stages
    # Written out here: within a kernel, tilelang 0.1.14 takes a call of range for a loop of the kernel.
    each_band, each_step_of_turn, each_warpgroup, each_store = range(bands), range(unrolled), range(_COMPUTING), range(_STORES)
    each_late_part = range(parts - config.late, parts)
    part_K = BLOCK_K if steps > 1 else BLOCK_K // 2  # of a product that float32 adds; errors of a single one do not average out

    # Numbers that shape a tile reach macros as closures: a macro turns its arguments into variables.

    @T.macro
    def place(tile, tiles_of_rows, place_M, place_N):
        """Write a tile's place among the tiles: down the rows of a group of them, then to the next column."""
        group = tile // (_TILES_OF_ROWS * columns)
        size = T.min(T.int32(_TILES_OF_ROWS), tiles_of_rows - group * _TILES_OF_ROWS)
        place_M[0] = group * _TILES_OF_ROWS + tile % (_TILES_OF_ROWS * columns) % size
        place_N[0] = tile % (_TILES_OF_ROWS * columns) // size

    def fetch(scale_a, scale_b, scales, row, column, k):
        """Load the scales of a step: of each row that the thread fetches, then b's."""

        @T.macro
        def emit():
            for r in T.unroll(fetched):
                scales[r] = scale_a[T.min(row + r * WARPGROUP, M - 1), T.min(k, steps - 1)]
            scales[fetched] = scale_b[column // FP8_BLOCK, T.min(k, steps - 1)]

        if grouped:
            emit()

    def of_product(i, j):
        """The thread of a warpgroup and its register that hold an element of a product, as the instruction defines them."""
        return i // 16 * 32 + i % 8 * 4 + j % 8 // 2, j // 8 * 4 + i % 16 // 8 * 2 + j % 2

    def stage_scales(scale_a, scale_b, scales_s, scales, row, column, k, tx):
        """Load the scales of all of K in a tile's first step, and store them in the one that `staged` speaks of."""

        @T.macro
        def emit():
            if k == 0:
                for r in T.unroll(fetched):
                    scales[r] = scale_a[of_row(problem.layout_a, T.min(row + r * WARPGROUP, M - 1)), 0]
                for c in T.unroll(fetched_b):
                    scales[fetched + c] = scale_b[of_row(problem.layout_b, T.min(column + c * WARPGROUP, N - 1)), 0]
            if k == num_stages:
                for n in T.unroll(fetched + fetched_b):
                    scales_s[n * WARPGROUP + tx] = scales[n]

        emit()

    def of_row(layout, row):
        return 0 if layout.rows is None else row

    def load_step(a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, scales, row0, column0, k, step, tx, first):
        """Begin the copies of a step, the `first` of a turn or not; store its factors, and fetch those of the next turn."""
        stage = step % num_stages

        @T.macro
        def emit():
            T.barrier_wait(empty[stage], ((step // num_stages) & 1) ^ 1)
            T.tma_copy(a[row0 : row0 + block_M, k * BLOCK_K : (k + 1) * BLOCK_K], A_s[stage, :, :], barrier=full[stage])
            T.tma_copy(b[column0 : column0 + block_N, k * BLOCK_K : (k + 1) * BLOCK_K], B_s[stage, :, :], barrier=full[stage])
            if grouped:
                for r in T.unroll(fetched):
                    scales_s[stage, r * WARPGROUP + tx] = scales[r] * scales[fetched]
            if staged and first:
                stage_scales(scale_a, scale_b, scales_s, scales, row0 + tx, column0 + tx, k, tx)
            T.barrier_arrive(full[stage])
            fetch(scale_a, scale_b, scales, row0 + tx, column0, k + unrolled)

        emit()

    def fetch_first(scale_a, scale_b, scales, row, column):
        for n in range(unrolled):
            fetch(scale_a, scale_b, scales[n], row, column, n)

    def load_turn(a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, scales, row0, column0, k, step, tx):
        for n in range(unrolled):
            load_step(
                a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, scales[n], row0, column0, k + n, step + n, tx, n == 0
            )

    @T.macro
    def load(a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, block, tiles_of_rows, tx):
        """Fill the ring for every tile of the block. A factor is a's scale times b's; they are fetched a turn ahead."""
        T.dec_max_nreg(_LOADER_REGISTERS)
        step = T.alloc_var("int32", init=0)
        place_M, place_N = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
        scales = [T.alloc_local((fetched + (1 if grouped else fetched_b),), "float32") for _ in each_step_of_turn]
        for turn in T.serial(T.ceildiv(tiles_of_rows * columns - block, num_blocks)):
            place(turn * num_blocks + block, tiles_of_rows, place_M, place_N)
            row0, column0 = place_M[0] * block_M, place_N[0] * block_N
            fetch_first(scale_a, scale_b, scales, row0 + tx, column0)
            for k in T.serial(steps // unrolled):
                load_turn(
                    a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, scales, row0, column0, k * unrolled, step, tx
                )
                step = step + unrolled

    @T.macro
    def release(empty, stage, tx):
        if tx % 32 == 0:
            T.mbarrier_arrive(empty[stage])

    def multiply(A_s, B_s, C_f, stage, row, clear, part=slice(0, BLOCK_K)):
        A_k, B_k = A_s[stage, row : row + BAND, part], B_s[stage, :, part]
        return T.wgmma_gemm(A_k, B_k, C_f, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=clear)

    def computer(warpgroup: int):
        """The work of a computing warpgroup, as a macro."""
        first = warpgroup * bands * BAND  # row of the tile

        def step_in_unit(A_s, B_s, scales_s, full, empty, sums, late, partial, factors, turn, k, n, step, tx):
            """Issue the product of a step, then wait for the one before and give its stage back."""
            stage = step % num_stages

            @T.macro
            def emit():
                T.barrier_wait(full[stage], (step // num_stages) & 1)
                multiply(A_s, B_s, sums[0], stage, first, k == 0)
                if k > 0:
                    T.wait_wgmma(1)
                    release(empty, (step - 1) % num_stages, tx)

            emit()
            put_late(late, turn, k)

        def step_in_float32(A_s, B_s, scales_s, full, empty, sums, late, partial, factors, turn, k, n, step, tx):
            """Add the products of a step to the sums, band by band."""
            stage = n if unrolled > 1 else step % num_stages

            @T.macro
            def begin():
                T.barrier_wait(full[stage], (step // num_stages) & 1)

            def read(band):
                @T.macro
                def emit():
                    for i in T.Parallel(BAND):
                        factors[band][i] = scales_s[stage, first + band * BAND + i]
                    # The compiler would else read them between the products, and stall those.
                    T.warpgroup_fence_operand(factors[band], num_regs=2)

                emit()

            def add(band, part):
                @T.macro
                def emit():
                    multiply(A_s, B_s, partial, stage, first + band * BAND, True, slice(part, part + part_K))
                    T.wait_wgmma(0)
                    if band == bands - 1 and part + part_K == BLOCK_K:
                        release(empty, stage, tx)
                    for i, j in T.Parallel(BAND, block_N):
                        sums[band][i, j] += partial[i, j] * factors[band][i] if grouped else partial[i, j]

                emit()

            begin()
            for band in range(bands if grouped else 0):
                read(band)
            for band in range(bands):
                for part in range(0, BLOCK_K, part_K):
                    add(band, part)

        def clear(sums):
            for sum in sums:

                @T.macro
                def emit():
                    T.clear(sum)

                emit()

        def each_step(*arguments):
            *arguments, step, tx = arguments
            for n in range(unrolled):
                (step_in_unit if fast else step_in_float32)(*arguments, n, step + n, tx)

        @T.macro
        def stage_part(out_s, out_f):
            """Write a part of the tile to the shared memory of the last but one."""
            T.tma_store_wait(_STORES - 1)  # by one thread; upstream adds a barrier here, but before a branch around all of it
            T.copy(out_f, out_s)
            T.fence_proxy_async()
            T.sync_threads(barrier_id=1 + warpgroup, arrive_count=WARPGROUP)

        @T.macro
        def put(out, out_s, row, column):
            T.tma_copy(out_s, out[row : row + BAND, column : column + store_N])

        def put_late(late, turn, k):
            """Begin to store each late part of the tile before, if there was one, in its step k."""
            for part, part_f in zip(each_late_part, late.parts_f, strict=True):

                @T.macro
                def emit():
                    if (turn > 0) & (k == 1 + (part - each_late_part[0]) * _STEPS_OF_A_STORE):
                        stage_part(late.out_s[part % _STORES], part_f)
                        put(late.out, late.out_s[part % _STORES], late.place[0], late.place[1] + part * store_N)

                emit()

        def put_last(late, any_tile):
            """Store the late parts of the last tile, if the block had `any_tile`."""
            for part, part_f in zip(each_late_part, late.parts_f, strict=True):

                @T.macro
                def emit():
                    stage_part(late.out_s[part % _STORES], part_f)
                    if any_tile:
                        put(late.out, late.out_s[part % _STORES], late.place[0], late.place[1] + part * store_N)

                emit()

        def store(scale_a, scale_b, scales_s, bias, out, sums, out_s, late, factors, row0, column0):
            """Scale the sums, add the bias and begin to write the tile. Late parts stay in registers: blocks end their tiles
            all at once, and would wait for each other's stores.
            """
            for band in range(bands):
                row = row0 + first + band * BAND

                @T.macro
                def finish():
                    for i in T.Parallel(BAND):
                        if staged:
                            factors[band][i] = scales_s[first + band * BAND + i]
                        elif not grouped:
                            factors[band][i] = scale_a[of_row(problem.layout_a, T.min(row + i, M - 1)), 0]
                    # All of them before the first store, which would else wait for its loads, and the next one for its own.
                    for i, j in T.Parallel(BAND, block_N):
                        sums[band][i, j] = finished(sums[band][i, j], factors[band][i], scale_b, scales_s, bias, column0, j)

                finish()
                for part in range(parts):

                    @T.macro
                    def round_to(out_f):
                        for i, j in T.Parallel(BAND, store_N, loop_layout=T.Fragment((BAND, store_N), forward_fn=of_product)):
                            out_f[i, j] = T.cast(sums[band][i, part * store_N + j], out_dtype)

                    @T.macro
                    def put_now():
                        out_f = T.alloc_fragment((BAND, store_N), out_dtype)
                        round_to(out_f)
                        stage_part(out_s[(band * parts + part) % _STORES], out_f)
                        put(out, out_s[(band * parts + part) % _STORES], row, column0 + part * store_N)

                    if part in each_late_part:
                        round_to(late.parts_f[part - each_late_part[0]])
                    else:
                        put_now()

            @T.macro
            def remember():
                late.place[0], late.place[1] = row0 + first, column0

            if each_late_part:
                remember()

        def finished(sum, factor, scale_b, scales_s, bias, column0, j):
            """A sum times what scales all of K, plus the bias; columns past the end are not stored."""
            column = T.min(column0 + j, N - 1) if N % block_N else column0 + j
            if staged:
                sum = sum * (factor * scales_s[block_M + j])
            elif not grouped:
                sum = sum * (factor * scale_b[of_row(problem.layout_b, column), 0])
            return sum if bias is None else sum + T.cast(bias[column], "float32")

        @T.macro
        def compute(
            scale_a, scale_b, bias, out, A_s, B_s, scales_s, out_s, full, empty, sums, partial, block, tiles_of_rows, tx
        ):
            T.inc_max_nreg(_COMPUTER_REGISTERS)
            step = T.alloc_var("int32", init=0)
            place_M, place_N = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
            factors = [T.alloc_fragment((BAND,), "float32") for _ in each_band]
            late_place = T.alloc_local((2,), "int32")  # first row and column
            late_place[0], late_place[1] = 0, 0
            late_f = [T.alloc_fragment((BAND, store_N), out_dtype) for _ in each_late_part]
            clear(late_f)
            late = SimpleNamespace(out=out, out_s=out_s, parts_f=late_f, place=late_place)
            for turn in T.serial(T.ceildiv(tiles_of_rows * columns - block, num_blocks)):
                place(turn * num_blocks + block, tiles_of_rows, place_M, place_N)
                if not fast:
                    clear(sums)
                for k in T.serial(steps // unrolled):
                    each_step(A_s, B_s, scales_s, full, empty, sums, late, partial, factors, turn, k, step, tx)
                    step = step + unrolled
                if fast:
                    T.wait_wgmma(0)
                    release(empty, (step - 1) % num_stages, tx)
                    T.warpgroup_fence_operand(sums[0], num_regs=BAND * block_N // WARPGROUP)
                store(
                    scale_a,
                    scale_b,
                    scales_s,
                    bias,
                    out,
                    sums,
                    out_s,
                    late,
                    factors,
                    place_M[0] * block_M,
                    place_N[0] * block_N,
                )
            put_last(late, tiles_of_rows * columns > block)
            T.tma_store_wait(0)

        return compute

    computers = [computer(warpgroup) for warpgroup in range(_COMPUTING)]

    @T.macro
    def matmul(a, scale_a, b, scale_b, bias, out):
        with T.Kernel(num_blocks, threads=WARPGROUP * (1 + _COMPUTING)) as block:
            A_s = T.alloc_shared((num_stages, block_M, BLOCK_K), problem.a_dtype)
            B_s = T.alloc_shared((num_stages, block_N, BLOCK_K), problem.b_dtype)
            scales_s = T.alloc_shared((num_stages, block_M) if grouped else (block_M + block_N,), "float32")
            # A buffer a store: upstream writes fragments by matrix instructions only where they fill a whole one.
            outs = [[T.alloc_shared((BAND, store_N), out_dtype) for _ in each_store] for _ in each_warpgroup]
            sums = [[T.alloc_fragment((BAND, block_N), "float32") for _ in each_band] for _ in each_warpgroup]
            partials = [T.alloc_fragment((BAND, block_N), "float32") for _ in each_warpgroup]
            T.annotate_layout({tile: make_swizzled_layout(tile) for tile in (A_s, B_s, *outs[0], *outs[1])})
            full = T.alloc_barrier([WARPGROUP] * num_stages)
            empty = T.alloc_barrier([_COMPUTING * WARPGROUP // 32] * num_stages)  # a warp each
            tiles_of_rows = T.ceildiv(M, block_M)
            tx = T.get_thread_binding()
            if tx < WARPGROUP:
                load(a, scale_a, b, scale_b, A_s, B_s, scales_s, full, empty, block, tiles_of_rows, tx)
            elif tx < 2 * WARPGROUP:
                computers[0](
                    scale_a, scale_b, bias, out, A_s, B_s, scales_s, outs[0], full, empty, sums[0], partials[0], block,
                    tiles_of_rows, tx,
                )  # fmt: skip
            else:
                computers[1](
                    scale_a, scale_b, bias, out, A_s, B_s, scales_s, outs[1], full, empty, sums[1], partials[1], block,
                    tiles_of_rows, tx,
                )  # fmt: skip

    if problem.bias_dtype is None:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            matmul(a, scale_a, b, scale_b, None, out)
    else:
        bias_type = T.Tensor((N,), problem.bias_dtype)

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            matmul(a, scale_a, b, scale_b, bias, out)

    return scaled_matmul


def scale_type(problem: Problem, layout: BlockScaledLayout, rows, name: str):
    """Return the type of a scale parameter; scales of all of K are contiguous, so that neighbours load as one."""
    if layout.k is not None:
        return problem.scale(layout, rows, name)
    return T.Tensor((1 if layout.rows is None else rows, 1), "float32")


def compile_hopper(problem: Problem, prim_func) -> Callable:
    """Compile a kernel that has `scale_type`s; `run` makes scales of all of K contiguous."""
    run = compile_prim_func(problem, prim_func, PASS_CONFIGS)
    if problem.layout_a.k is not None:
        return run
    return lambda a, scale_a, b, scale_b, bias, out: run(a, scale_a.contiguous(), b, scale_b.contiguous(), bias, out)


def fits_hopper(problem: Problem) -> bool:
    """Whether bulk copies and the scales' layouts allow one of the kernels for Hopper."""
    whole_k = problem.layout_a.k is None and problem.layout_b.k is None
    aligned = problem.K % 16 == 0 and problem.N * T.dtype(problem.out_dtype).bits % 128 == 0  # bytes of rows
    return problem.arch == ARCH and aligned and (whole_k or (problem.layout_a, problem.layout_b) == BLOCKS)


def takes(problem: Problem) -> bool:
    """Scales of all of K, or 1x128 beside 128x128, on Hopper; rows of a, b and out of a multiple of 16 bytes."""
    return fits_hopper(problem)


def compile_kernel(problem: Problem) -> Callable:
    """Return run(a, scale_a, b, scale_b, bias, out); sizes of M that share a tile share a kernel."""
    return _compile(replace(problem, max_M=0), pick_config(problem))


@cache
def _compile(problem: Problem, config: Config) -> Callable:
    return compile_hopper(problem, scaled_matmul(problem, config))
