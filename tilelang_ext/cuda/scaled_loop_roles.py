"""What consumers and producer of a scaled loop do, for `scaled_loop.py`: the kernel's block is built anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilelang import language as T
from tvm import tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import substitute

from tilelang_ext.cuda.scaled_loop_form import BAND, BLOCK_K, Kernel, Tiling, group_factor_b
from tilelang_ext.cuda.statements import (
    barriers,
    call,
    equal,
    fence,
    fragment,
    is_one,
    local,
    loop,
    nodes_of,
    parallel,
    region_of,
    sequence,
    shared,
    store,
    strides_of,
    when,
    with_body,
)
from tilelang_ext.cuda.warp_roles import WARP, WARPGROUP, in_place_of, specialized, way_to, with_roles

_LOADERS, _FETCHERS = WARP, WARPGROUP - WARP  # threads of the producer warpgroup that copy tiles, and that fetch factors


def specialize(func: tirx.PrimFunc, kernel: Kernel, tiling: Tiling) -> tirx.PrimFunc:
    """Return the function with the block built anew, and a warpgroup more."""
    return specialized(func, kernel.block, _block(kernel, tiling), kernel.thread, kernel.threads)


def _block(kernel: Kernel, tiling: Tiling) -> tirx.SBlock:
    ring, product, thread = _Ring(kernel), kernel.product, kernel.thread
    factors = _Factors(ring, tiling) if product.grouped else None
    consumers, loaders = _Consumers(ring, tiling, factors), _Loaders(ring)

    def consumer(body: tirx.Stmt) -> tirx.Stmt:
        return sequence(*consumers.counts.begin(), in_place_of(body, [(kernel.loop, consumers.loop())]))

    def producer(body: tirx.Stmt) -> tirx.Stmt:
        def role(own) -> tirx.Stmt:
            return sequence(*own.counts.begin(), way_to(body, [(kernel.loop, own.loop())]))

        return tirx.IfThenElse(thread < kernel.threads + _LOADERS, role(loaders), role(factors) if factors else None)

    block = with_roles(kernel.block, consumer, producer, thread, kernel.threads, kernel.registers)
    gone = (product.A.data, product.B.data, kernel.total.data)
    kept = [buffer for buffer in block.alloc_buffers if not any(buffer.data.same_as(data) for data in gone)]
    allocated = [buffer for part in (ring, consumers, loaders, factors) if part is not None for buffer in part.allocated]
    annotations = {**block.annotations, "barrier_init": {**block.annotations.get("barrier_init", {}), **ring.arrivals()}}
    if len(tiling.pieces) > 1:
        layout = T.Fragment(consumers.shape, forward_fn=consumers.of_tile)
        annotations["layout_map"] = {**block.annotations.get("layout_map", {}), product.C.data: layout}
    return with_body(block, block.body, [*kept, *allocated], annotations)


class _Ring:
    """The stages of A and B in shared memory and their barriers: full ones from the producer, empty ones from the consumers.

    Sums in float32 take a turn of as many steps as there are stages at once: with stages that are constants, no address
    arithmetic stands between a wait and the next product. A tile begins at the first stage, so that stages may differ in the
    rounds of use behind them.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.num_stages = kernel, kernel.num_stages
        self.steps = kernel.loop.extent
        self.turn = 1 if kernel.product.in_unit else kernel.num_stages  # steps
        self.even = isinstance(self.steps, tirx.IntImm) and int(self.steps) % self.turn == 0
        self.A_s, self.B_s = (
            shared((self.num_stages, *tile.shape), tile.dtype, tile.name) for tile in (kernel.product.A, kernel.product.B)
        )
        self.full, self.empty = barriers(self.num_stages, "full"), barriers(self.num_stages, "empty")
        self.allocated = [self.A_s, self.B_s, self.full, self.empty]

    def arrivals(self) -> dict:
        """Return how often each barrier is arrived at in a round: loading and fetching threads, consuming warps."""
        counts = {
            self.full: _LOADERS + (_FETCHERS if self.kernel.product.grouped else 0),
            self.empty: self.kernel.threads // WARP,
        }
        return {barrier.data: [tirx.IntImm("int32", count)] * self.num_stages for barrier, count in counts.items()}

    def turns(self, steps_of: Callable) -> list[tirx.Stmt]:
        """Return the loop over turns and what is left; `steps_of(ns, first)` are steps `ns` of the turn from `first` on."""
        k, whole = tirx.Var("k", "int32"), self.steps // self.turn
        body = sequence(*steps_of(range(self.turn), k * self.turn))
        # The compiler would unroll the producer's loops, and its few registers would overflow.
        stmts = [loop(k, whole, body, tirx.ForKind.UNROLLED, {"pragma_unroll_factor": tirx.IntImm("int32", 1)})]
        if self.even:
            return stmts
        if isinstance(self.steps, tirx.IntImm):
            return stmts + steps_of(range(int(self.steps) % self.turn), whole * self.turn)
        left = self.steps - whole * self.turn
        return stmts + [when(n < left, sequence(*steps_of([n], whole * self.turn))) for n in range(self.turn - 1)]


class _Counts:
    """Where a role is in the ring: steps behind it where a turn is one step, else rounds of all stages, or of each stage."""

    def __init__(self, ring: _Ring, name: str) -> None:
        self.ring = ring
        self.buffer = local(1 if ring.even else ring.num_stages, "int32", name)

    def begin(self) -> list[tirx.Stmt]:
        return [store(self.buffer, 0, n) for n in range(int(self.buffer.shape[0]))]

    def stage(self, n: int, back: int = 0):
        """Return the stage of step n of a turn, or of the step `back` steps ago."""
        return n if self.ring.turn > 1 else (self.buffer[0] - back) % self.ring.num_stages

    def parity(self, n: int):
        """Return whether the barriers of step n of a turn are in an odd round."""
        rounds = self.buffer[0 if self.ring.even else n]
        return (rounds if self.ring.turn > 1 else rounds // self.ring.num_stages) % 2

    def end_step(self, n: int) -> list[tirx.Stmt]:
        counter = 0 if self.ring.even else n
        last = self.ring.even and n < self.ring.turn - 1
        return [] if last else [store(self.buffer, self.buffer[counter] + 1, counter)]


class _Consumers:
    """Warpgroups that multiply a stage, add the product to the sums, and scale the sums behind the loop."""

    def __init__(self, ring: _Ring, tiling: Tiling, factors: _Factors | None) -> None:
        self.ring, self.kernel, self.tiling, self.factors = ring, ring.kernel, tiling, factors
        self.shape = tuple(int(extent) for extent in self.kernel.product.C.shape)
        self.counts = _Counts(ring, "consumed")
        shape, in_flight = (tiling.rows, tiling.columns), 0 if self.kernel.product.in_unit else tiling.in_flight
        self.sums = [fragment(shape, "sums") for _ in tiling.pieces]
        self.partials = [fragment(shape, "partial") for _ in range(in_flight)]
        self.read = [[fragment((tiling.rows,), "factor") for _ in tiling.pieces] for _ in range(in_flight if factors else 0)]
        self.allocated = [self.counts.buffer, *self.sums, *self.partials, *(one for step in self.read for one in step)]

    def of_piece(self, i, j):
        """Return the thread and the register that hold an element of a piece, as WGMMA leaves it."""
        thread = i // BAND * WARPGROUP + i % BAND // 16 * 32 + i % 8 * 4 + j % 8 // 2
        return thread, j // 8 * 4 + i % 16 // 8 * 2 + j % 2

    def of_tile(self, i, j):
        """Return the thread and the register that hold an element of C: pieces one after another."""
        rows, columns = self.tiling.rows, self.tiling.columns
        thread, register = self.of_piece(i % rows, j % columns)
        return thread, (i // rows * (self.shape[1] // columns) + j // columns) * (columns // 2) + register

    def loop(self) -> tirx.Stmt:
        steps = self.steps_in_unit() if self.kernel.product.in_unit else self.steps_in_float32()
        return sequence(*steps, *(self.scaled(piece) for piece in range(len(self.tiling.pieces))))

    def steps_in_unit(self) -> list[tirx.Stmt]:
        """Issue the product of a step, then wait for the one before and give its stage back."""
        stage, before = self.counts.stage(0), self.counts.stage(0, back=1)

        def step(_, k) -> list[tirx.Stmt]:
            return [
                self.wait(0),
                self.multiply(stage, 0, self.sums[0], k == 0),
                when(k > 0, sequence(call(T.wait_wgmma(1)), self.release(before))),
                *self.counts.end_step(0),
            ]

        registers = self.shape[0] * self.shape[1] // self.kernel.threads
        return [*self.ring.turns(step), call(T.wait_wgmma(0)), self.release(before), fence(self.sums[0], registers)]

    def steps_in_float32(self) -> list[tirx.Stmt]:
        """Add the pieces of a turn of steps to the sums, each while the next one's product runs if two are in flight."""
        pieces, in_flight = range(len(self.tiling.pieces)), self.tiling.in_flight

        def steps(ns: Sequence[int], _) -> list[tirx.Stmt]:
            stmts, pending = [], []

            def finish() -> None:
                n, piece, partial, factor = pending.pop(0)
                stmts.append(call(T.wait_wgmma(len(pending))))
                if piece == pieces[-1]:
                    stmts.append(self.release(self.counts.stage(n)))
                stmts.append(self.add(piece, partial, factor))

            for n in ns:
                stmts.append(self.wait(n))
                factors = self.read[n % in_flight] if self.factors else [None for _ in pieces]
                stmts += [self.read_factors(n, piece, factor) for piece, factor in enumerate(factors) if factor is not None]
                for piece in pieces:
                    partial = self.partials[(n * len(pieces) + piece) % in_flight]
                    stmts.append(self.multiply(self.counts.stage(n), piece, partial, True))
                    pending.append((n, piece, partial, factors[piece]))
                    if len(pending) == in_flight:
                        finish()
                stmts += self.counts.end_step(n)
            while pending:
                finish()
            return stmts

        return [*(call(T.clear(sums)) for sums in self.sums), *self.ring.turns(steps)]

    def wait(self, n: int) -> tirx.Stmt:
        return call(T.barrier_wait(self.ring.full[self.counts.stage(n)], self.counts.parity(n)))

    def release(self, stage) -> tirx.Stmt:
        return when(self.kernel.thread % WARP == 0, call(T.mbarrier_arrive(self.ring.empty[stage])))

    def multiply(self, stage, piece: int, accumulator: tirx.Buffer, clear) -> tirx.Stmt:
        row, column = self.tiling.pieces[piece]
        A = self.ring.A_s[stage, row : row + self.tiling.rows, 0:BLOCK_K]
        B = self.ring.B_s[stage, column : column + self.tiling.columns, 0:BLOCK_K]
        return call(T.wgmma_gemm(A, B, accumulator, transpose_B=True, policy=self.tiling.policy, clear_accum=clear))

    def read_factors(self, n: int, piece: int, factor: tirx.Buffer) -> tirx.Stmt:
        row, column = self.tiling.pieces[piece]
        read = parallel((self.tiling.rows,), lambda i: store(factor, self.factors.of(self.counts.stage(n), column, row + i), i))
        # The compiler would else read them between two products, and the second would wait.
        return sequence(read, fence(factor, 2))

    def add(self, piece: int, partial: tirx.Buffer, factor: tirx.Buffer | None) -> tirx.Stmt:
        sums = self.sums[piece]

        def stmt(i, j) -> tirx.Stmt:
            product = partial[i, j] if factor is None else partial[i, j] * factor[i]
            return store(sums, sums[i, j] + product, i, j)

        return parallel((self.tiling.rows, self.tiling.columns), stmt)

    def scaled(self, piece: int) -> tirx.Stmt:
        """Add a piece of the sums, times the factors of all of K, to C."""
        product, (row, column) = self.kernel.product, self.tiling.pieces[piece]
        factors = [factor for factor in (product.whole_a, product.whole_b) if not is_one(factor)]

        def stmt(i, j) -> tirx.Stmt:
            value = self.sums[piece][i, j]
            if factors:
                factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
                value = value * substitute(factor, {product.i: row + i, product.j: column + j})
            at = row + i, column + j
            return store(product.C, T.cast(T.cast(product.C[at], "float32") + value, product.C.dtype), *at)

        extents = self.tiling.rows, self.tiling.columns
        several = len(self.tiling.pieces) > 1  # else the layout of C follows from that of the sums
        return parallel(extents, stmt, T.Fragment(extents, forward_fn=self.of_piece) if several else None)


class _Loaders:
    """The warp that copies tiles of A and B into the stages. It stores nothing itself: its copies would wait for that."""

    def __init__(self, ring: _Ring) -> None:
        self.ring, self.counts = ring, _Counts(ring, "loaded")
        self.allocated = [self.counts.buffer]

    def loop(self) -> tirx.Stmt:
        ring = self.ring

        def steps(ns: Sequence[int], first) -> list[tirx.Stmt]:
            stmts = []
            for n in ns:
                stage = self.counts.stage(n)
                stmts.append(call(T.barrier_wait(ring.empty[stage], self.counts.parity(n) ^ 1)))
                for copy, tiles in zip(ring.kernel.copies, (ring.A_s, ring.B_s), strict=True):
                    stmts.append(self.load(copy, tiles, stage, first + n))
                stmts += [call(T.barrier_arrive(ring.full[stage])), *self.counts.end_step(n)]
            return stmts

        return sequence(*ring.turns(steps))

    def load(self, copy: tirx.Call, tiles: tirx.Buffer, stage, step) -> tirx.Stmt:
        source, at = region_of(copy.args[0]), {self.ring.kernel.loop.loop_var: step}
        box = [Range.from_min_extent(substitute(axis.min, at), axis.extent) for axis in source.region]
        rows, columns = tiles.shape[1:]
        barrier, annotations = self.ring.full[stage], dict(copy.annotations or {})
        target = tiles[stage, 0:rows, 0:columns]
        return call(T.tma_copy(tirx.BufferRegion(source.buffer, box), target, barrier=barrier, annotations=annotations))


class _Factors:
    """Three warps that fetch the group factors of the rows of a tile a turn ahead, and store them in shared memory."""

    def __init__(self, ring: _Ring, tiling: Tiling) -> None:
        self.ring, self.tiling, self.counts = ring, tiling, _Counts(ring, "fetched")
        self.rows = int(ring.kernel.product.C.shape[0])
        self.chunks = -(-self.rows // _FETCHERS)  # rows that one thread fetches
        self.columns = sorted({column for _, column in tiling.pieces})
        padded = self.chunks * _FETCHERS
        self.shared = shared((ring.num_stages, len(self.columns), padded), "float32", "factors")
        self.factors_a = local(self.chunks * ring.turn, "float32", "factors_a")
        self.factors_b = local(len(self.columns) * ring.turn, "float32", "factors_b")
        self.allocated = [self.counts.buffer, self.shared, self.factors_a, self.factors_b]

    def of(self, stage, column: int, row):
        """Return the factor of a row of the tile, in the columns from `column` on."""
        return self.shared[stage, self.columns.index(column), row]

    def loop(self) -> tirx.Stmt:
        ring = self.ring

        def steps(ns: Sequence[int], first) -> list[tirx.Stmt]:
            stmts = []
            for n in ns:
                stage = self.counts.stage(n)
                stmts.append(call(T.barrier_wait(ring.empty[stage], self.counts.parity(n) ^ 1)))
                stmts += self.store_step(stage, n)
                stmts += [call(T.barrier_arrive(ring.full[stage])), *self.counts.end_step(n)]
            return [*stmts, self.fetch_turn(first + ring.turn)] if len(ns) == ring.turn else stmts

        return sequence(self.fetch_turn(0), *ring.turns(steps))

    def store_step(self, stage, n: int) -> list[tirx.Stmt]:
        turn, row = self.ring.turn, self.ring.kernel.thread - (self.ring.kernel.threads + _LOADERS)
        return [
            store(
                self.shared,
                self.factors_a[chunk * turn + n] * self.factors_b[group * turn + n],
                stage,
                group,
                chunk * _FETCHERS + row,
            )
            for group in range(len(self.columns))
            for chunk in range(self.chunks)
        ]

    def fetch_turn(self, first) -> tirx.Stmt:
        """Fetch the factors of a turn from step `first` on, one load right after another, as wide as the scales of a row allow.

        Rows of scales lie in different lines of the L1 cache: a warp's load of one step takes as many look-ups as one of four.
        """
        ring, product = self.ring, self.ring.kernel.product
        thread = ring.kernel.thread - (ring.kernel.threads + _LOADERS)
        rows = [T.min(thread + chunk * _FETCHERS, self.rows - 1) for chunk in range(self.chunks)]
        stmts = []
        for chunk, row in enumerate(rows):
            stmts += self.fetch(self.factors_a, chunk, substitute(product.group_a, {product.i: row}), first)
        for group, column in enumerate(self.columns):
            stmts += self.fetch(self.factors_b, group, group_factor_b(product, column, self.tiling.columns), first)
        return when(first < ring.steps, sequence(*stmts)) if ring.even else sequence(*stmts)

    def fetch(self, buffer: tirx.Buffer, place: int, factor: tirx.PrimExpr, first) -> list[tirx.Stmt]:
        """Store a factor of the steps of a turn; those past the last step are the last one's."""
        ring, turn = self.ring, self.ring.turn
        width = _width(factor, turn) if ring.even else 1

        def of(n) -> tirx.Stmt:
            step = first + n if ring.even else T.min(first + n, ring.steps - 1)
            return store(buffer, substitute(factor, {ring.kernel.loop.loop_var: step}), place * turn + n)

        if width == 1:
            return [of(n) for n in range(turn)]
        stmts = []
        for begin in range(0, turn, width):
            n = tirx.Var("n", "int32")
            stmts.append(loop(n, width, of(begin + n), tirx.ForKind.VECTORIZED))
        return stmts


def _width(factor: tirx.PrimExpr, steps: int) -> int:
    """Return how many steps' scales one load can take: they are neighbours, and rows begin at a multiple of as many."""
    strides = [strides_of(load.buffer) for load in nodes_of(factor, lambda node: isinstance(node, tirx.BufferLoad))]
    for width in (4, 2):
        if steps % width == 0 and all(equal(last, 1) and all(equal(s % width, 0) for s in rest) for *rest, last in strides):
            return width
    return 1
