"""Products of many tokens and MXFP4 weights: consumers that decode and multiply, a producer that copies, for mxfp4_product.py.

    Before                                       After
    for tile in ...:                             if thread < threads:               consumer warpgroups
        total = A[tile] . (scale W)[tile]            for tile in ...:
        store total                                      total = mxfp4_consume(stages, scale)
                                                         store total
                                                 elif thread < threads + 32:        a warp that copies tokens and codes by TMA
                                                     for tile in ...: for k in serial(steps):
                                                         wait empty; tma_copy(A, W); arrive full
                                                 else:                              three that copy scales
                                                     for tile in ...: mxfp4_fetch_scales(scale, stages)

A stage holds 128 bytes of each token, as much of K of the codes of each row, and a word of four scales of it. All products of a
kernel have the same tile and go through the same stages. Where rows of A are gathered, or scales do not begin at multiples of
four bytes, or K ends inside a stage, the three warps run `mxfp4_fetch`, which copies gathered tokens too; what lies past K is
zeros. The functions are in mxfp4_wgmma.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tilelang import language as T
from tilelang.layout import make_swizzled_layout
from tvm import tirx
from tvm.ir import Range

from tilelang_ext.cuda.mxfp4_form import Product, begins_at, device_call, first_of, is_multiple, rows_of, stride_of
from tilelang_ext.cuda.statements import barriers, call, equal, local, loop, sequence, shared, store, with_body
from tilelang_ext.cuda.warp_roles import WARP, WARPGROUP, OtherForm, in_place_of, registers_of_consumer, way_to, with_roles
from tilelang_ext.formats import MX_GROUP

_TYPES = {"bfloat16": "kBFloat16", "float8_e4m3fn": "kFloat8_e4m3", "float8_e5m2": "kFloat8_e5m2"}  # of A, for the matrix unit
_TOKEN_BYTES = 128  # in a stage
BAND = 64  # rows of weights of a product of a warpgroup
_GROUPS = 4  # of scales, a word, that are copied at once
_MAX_ROWS = 256  # of a box that TMA copies, and of tokens in a product
_SUM_REGISTERS = {1: 128, 2: 128, 3: 80, 4: 32}  # of a thread, by warpgroups
_PRODUCER_REGISTERS, _GATHERING_REGISTERS = 40, 72  # of a thread of the producer; of one that holds numbers of rows
# An SM holds several blocks of few tokens if a consumer has registers enough: of what it has decoded of a band, and others.
_FEW_TOKENS, _MAX_BLOCKS, _FEW_REGISTERS, _DECODED_REGISTERS, _OTHER_REGISTERS = 32, 3, 40, 32, 32
_SHARED_BYTES = 228 * 1024  # of an SM
_FETCHERS = WARPGROUP - WARP  # threads that copy scales
_MIN_STAGES, _MAX_STAGES = 3, 8
_SLACK = 2048  # bytes, to align stages and for barriers


class Tile(NamedTuple):
    """What a block computes at once: tokens, rows of weights, the dtype of tokens; and by how many warpgroups."""

    tokens: int
    rows: int
    dtype: str
    warpgroups: int

    @property
    def bands(self) -> int:
        """Products of 64 rows of a warpgroup."""
        return self.rows // (BAND * self.warpgroups)

    @property
    def step(self) -> int:
        """Elements of K of a stage."""
        return _TOKEN_BYTES // (2 if self.dtype == "bfloat16" else 1)

    @property
    def type(self) -> str:
        return f"tl::DataType::{_TYPES[self.dtype]}"

    @property
    def stage_bytes(self) -> int:
        return self.tokens * _TOKEN_BYTES + self.rows * (self.step // 2 + 4)

    def place(self, i, j):
        """Return the thread and the register that hold an element of the product, (tokens, rows)."""
        row = j % BAND
        thread = j // (BAND * self.bands) * WARPGROUP + row // 16 * 32 + row % 16 // 2 * 4 + i % 8 // 2
        return thread, j // BAND % self.bands * (self.tokens // 2) + i // 8 * 4 + i % 2 * 2 + row % 2


def groups_of(product: Product) -> int:
    """Return of how many groups of scales K and the scales' rows must be multiples: FP8 looks at all scales of a row first."""
    return 1 if str(product.A.buffer.dtype) == "bfloat16" else _GROUPS


def _check_end(product: Product, step: int) -> None:
    """Check that what TMA reads past K, where K ends inside a stage, is past the tensors too, and so zeros."""
    regions = [product.W] if product.ids is not None else [product.A, product.W]
    for region in regions:
        last = region.region[-1]
        if not is_multiple(product.K, step) and not equal(last.min + last.extent, region.buffer.shape[-1]):
            raise OtherForm(f"K is {product.K}, no multiple of {step}, and {region.buffer.name} goes on behind it")


def tile_of(products: list[Product], threads: int) -> Tile:
    """Return the tile of a kernel's products; raises OtherForm if they differ or threads cannot divide it."""
    warpgroups = threads // WARPGROUP
    tiles = {Tile(product.M, product.N, str(product.A.buffer.dtype), warpgroups) for product in products}
    if len(tiles) > 1:
        raise OtherForm("products have different tiles")
    [tile] = tiles
    if tile.dtype not in _TYPES:
        raise OtherForm(f"A is {tile.dtype}")
    M, N = tile.tokens, tile.rows
    if warpgroups not in _SUM_REGISTERS or N % (BAND * warpgroups) or N > _MAX_ROWS or M % 8 or M > _MAX_ROWS:
        raise OtherForm(f"a tile of {M} x {N} is not divided among {threads} threads")
    for product in products:
        _check_end(product, tile.step)
    if tile.bands * M // 2 > _SUM_REGISTERS[warpgroups]:
        raise OtherForm(f"sums of a tile of {M} x {N} do not fit in the registers of {threads} threads")
    return tile


def blocks_per_sm(tile: Tile, threads: int, room: int) -> int:
    """Return how many blocks an SM should hold: of few tokens so many that one multiplies while others wait for weights."""
    if tile.tokens > _FEW_TOKENS:
        return 1
    needed = tile.bands * (tile.tokens // 2 + _DECODED_REGISTERS) + _OTHER_REGISTERS

    def fits(blocks: int) -> bool:
        registers = registers_of_consumer(threads, _FEW_REGISTERS, blocks)
        return registers >= needed and _stages(tile, room, blocks) > _MIN_STAGES

    return max(filter(fits, range(2, _MAX_BLOCKS + 1)), default=1)


def _stages(tile: Tile, room: int, blocks: int) -> int:
    """Return how many stages fit in the shared memory of a block, which has `room` bytes if it is alone."""
    room -= (blocks - 1) * _SHARED_BYTES // blocks
    return min(_MAX_STAGES, (room - _SLACK) // tile.stage_bytes)


def specialize(block: tirx.SBlock, thread, threads: int, tile: Tile, products: list, room: int, blocks: int) -> tirx.SBlock:
    """Return the block with roles, of which an SM holds several.

    `products` are pairs of a statement and its product, `room` bytes of shared memory.
    """
    stages = _stages(tile, room, blocks)
    if stages < _MIN_STAGES:
        raise OtherForm(f"stages of a tile of {tile.tokens} x {tile.rows} do not fit in shared memory")
    ring = _Ring(tile, stages)
    states = {"consumed": local(3, "int32", "consumed"), "loaded": local(1, "int32", "loaded")}
    states["fetched"] = local(2, "int32", "fetched")

    def role(name: str, replace: Callable, body: tirx.Stmt, of_product: Callable) -> tirx.Stmt:
        """Return a role that begins at the first stage; `of_product(product, state)` stands for each product."""
        begin = [store(states[name], 0, at) for at in range(int(states[name].shape[0]))]
        pairs = [(statement, of_product(product, states[name])) for statement, product in products]
        return sequence(*begin, replace(body, pairs))

    def producer(body: tirx.Stmt) -> tirx.Stmt:
        loads, fetches = role("loaded", way_to, body, ring.load), role("fetched", way_to, body, ring.fetch)
        return tirx.IfThenElse(thread < threads + WARP, loads, fetches)

    gathers = any(product.ids is not None for _, product in products)
    of_producer = _GATHERING_REGISTERS if gathers else _PRODUCER_REGISTERS
    if blocks > 1:
        of_producer = _FEW_REGISTERS
    registers = of_producer, registers_of_consumer(threads, of_producer, blocks)
    new = with_roles(
        block, lambda body: role("consumed", in_place_of, body, ring.consume), producer, thread, threads, registers
    )
    results = [buffer for _, product in products for buffer in (product.total, product.added_to) if buffer is not None]
    layouts = {result.data: T.Fragment((tile.tokens, tile.rows), forward_fn=tile.place) for result in results}
    layouts |= {tokens.data: make_swizzled_layout(tokens) for tokens in (ring.tokens, ring.codes)}
    annotations = {
        **new.annotations,
        "barrier_init": {**block.annotations.get("barrier_init", {}), **ring.arrivals(threads)},
        "layout_map": {**block.annotations.get("layout_map", {}), **layouts},
    }
    return with_body(new, new.body, [*new.alloc_buffers, *ring.buffers, *states.values()], annotations)


class _Ring:
    """The stages in shared memory and their barriers: full ones from the producer, empty ones from the consumers."""

    def __init__(self, tile: Tile, stages: int) -> None:
        self.tile, self.stages = tile, stages
        self.tokens = shared((stages, tile.tokens, tile.step), tile.dtype, "tokens")
        self.codes = shared((stages, tile.rows, tile.step // 2), "uint8", "codes")
        self.scales = shared((stages * tile.rows,), "uint32", "scales")
        self.full, self.empty = barriers(stages, "full"), barriers(stages, "empty")
        self.buffers = [self.tokens, self.codes, self.scales, self.full, self.empty]

    def arrivals(self, threads: int) -> dict:
        """Return how often each barrier is arrived at in a round: loading and fetching threads, consuming warps."""
        counts = {self.full: WARPGROUP, self.empty: threads // WARP}
        return {barrier.data: [tirx.IntImm("int32", count)] * self.stages for barrier, count in counts.items()}

    def consume(self, product: Product, state: tirx.Buffer) -> tirx.Stmt:
        tile = self.tile
        function = f"mxfp4_consume<{tile.type}, {tile.tokens}, {tile.rows}, {tile.warpgroups}, {self.stages}>"
        stages = (T.access_ptr(self.tokens, "r"), T.access_ptr(self.codes, "r"), T.access_ptr(self.scales, "r"))
        total = T.address_of(product.total[0, 0])
        arguments = (total, *stages, *self._barriers(), _pointer(state), *product.scales(), product.K)
        return product.completed(device_call(function, *arguments))

    def fetch(self, product: Product, state: tirx.Buffer) -> tirx.Stmt:
        tile, scales = self.tile, T.access_ptr(self.scales, "w")
        of_scales = *self._barriers(), _pointer(state), *product.scales(), product.K
        if product.ids is None and is_multiple(product.K, _GROUPS * MX_GROUP) and begins_at(product.scale, _GROUPS):
            function = f"mxfp4_fetch_scales<{tile.type}, {tile.rows}, {self.stages}, {_FETCHERS}>"
            return device_call(function, scales, *of_scales)
        aligned = next(size for size in (4, 2, 1) if begins_at(product.scale, size))  # to what loads of scales are
        function = f"mxfp4_fetch<{tile.type}, {tile.tokens}, {tile.rows}, {self.stages}, {_FETCHERS}, {aligned}"
        if product.ids is None:
            return device_call(f"{function}, false>", scales, *of_scales, T.access_ptr(self.tokens, "w"), *[0] * 4)
        of_tokens = first_of(product.ids), first_of(product.A), stride_of(product.A), rows_of(product.A)
        return device_call(f"{function}, true>", scales, *of_scales, T.access_ptr(self.tokens, "w"), *of_tokens)

    def load(self, product: Product, state: tirx.Buffer) -> tirx.Stmt:
        step, k = self.tile.step, tirx.Var("k", "int32")
        stage, parity = state[0] % self.stages, state[0] // self.stages % 2
        body = [call(T.barrier_wait(self.empty[stage], parity ^ 1))]
        copied = [(product.W, step // 2, self.codes)]
        if product.ids is None:
            copied.insert(0, (product.A, step, self.tokens))
        for region, columns, tiles in copied:
            *rows, last = region.region
            box = [*rows, Range.from_min_extent(last.min + k * columns, columns)]
            target = tiles[stage, 0 : tiles.shape[1], 0:columns]
            body.append(call(T.tma_copy(tirx.BufferRegion(region.buffer, box), target, barrier=self.full[stage])))
        body += [call(T.barrier_arrive(self.full[stage])), store(state, state[0] + 1, 0)]
        # The compiler would unroll the loop, and the producer's few registers would overflow.
        annotations = {"pragma_unroll_factor": tirx.IntImm("int32", 1)}
        return loop(k, (product.K + step - 1) // step, sequence(*body), tirx.ForKind.UNROLLED, annotations)

    def _barriers(self) -> tuple:
        return T.address_of(self.full[0]), T.address_of(self.empty[0])


def _pointer(state: tirx.Buffer):
    return T.address_of(state[0])
