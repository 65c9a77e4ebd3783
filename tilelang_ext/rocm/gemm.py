"""`T.gemm` on AMD's matrix units for fp8 operands of every flavour, and for 16-bit operands where a wider instruction exists.

    Before                                  After, for each lane of 2x2 waves on a 64x64 tile, gfx942, E4M3
    C: fragment (64, 64)                    C: registers [4 tiles * 4]
    T.gemm(A_shared, B_shared, C)           for k in K / 16: a[0:8], b[0:8] = codes of 2 tiles each, decoded to half
                                                for i, j in 2x2: mfma_f32_16x16x16f16(&C[(i*2+j)*4], &a[i*4], &b[j*4])

tilelang gives an fp8 GEMM to the instruction of the type's name, even if the chip lacks it or reads another flavour.
Here the table of `instructions.py` decides; every other GEMM is tilelang's own, unchanged but for ROLLED_K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tilelang import language as T
from tilelang.layout import make_swizzled_layout
from tilelang.rocm.op.gemm.gemm_mfma import GEMM_INST_MFMA, GemmMFMA
from tilelang.rocm.op.gemm.gemm_wmma import GEMM_INST_WMMA, GemmWMMA
from tilelang.rocm.target import target_get_mcpu
from tilelang.transform.simplify import _Simplify
from tilelang.utils.language import is_fragment, is_full_region, is_shared
from tvm import tirx
from tvm.error import InternalError
from tvm.tirx.stmt_functor import ir_transform

from tilelang_ext.marks import REQUIRE_NATIVE_FP8, ROLLED_K
from tilelang_ext.rocm.device_text import decoder_name, decoder_text, product_name, product_text
from tilelang_ext.rocm.instructions import FP8_DTYPES, MFMA, TILE, Product, select_product
from tilelang_ext.rocm.layout import Partition, accumulator_layout, operand_layout

_UPSTREAM_K = {8: 32, 16: 16, 32: 4}  # of the instructions that tilelang takes, by bits of an element
_LOAD_BYTES = 16  # the widest LDS access
_ROUNDS = """
#ifndef TILELANG_EXT_ROUNDS
#define TILELANG_EXT_ROUNDS
static __device__ inline int tilelang_ext_rounds(int rounds) {
#if __has_builtin(__builtin_amdgcn_workgroup_size_x)
  return rounds + (int)(__builtin_amdgcn_workgroup_size_x() & 1);
#else
  return rounds;
#endif
}
#endif
"""  # the same number, since blocks are whole waves: what the compiler does not know


@dataclass(frozen=True)
class _Plan:
    product: Product
    partition: Partition
    run: int  # elements that are contiguous along K in a lane, see `instructions.py`
    pack: int  # MMAs whose operands are loaded together, for wider loads


@dataclass
class MatrixUnitGemm:
    """One `T.gemm`: A and B shared or fragment, C a float32 fragment; types without an entry in the table go to `upstream`."""

    gemm_node: object
    upstream: ClassVar[type]
    instruction_key: ClassVar[str]

    def __post_init__(self) -> None:
        gemm = self.gemm_node
        self.A, self.B, self.C = gemm.a, gemm.b, gemm.c
        self.M, self.N, self.K = int(gemm.m), int(gemm.n), int(gemm.k)
        self.trans_A, self.trans_B = bool(gemm.transA), bool(gemm.transB)

    def infer_layout(self, target, thread_nums) -> dict:
        plan = self._plan(target, int(thread_nums))
        if plan is None:
            self._check_split(target, int(thread_nums))
            return self._upstreams(target, lambda gemm: gemm.infer_layout(target, thread_nums))
        layouts = {self.C: accumulator_layout(self.C.shape, plan.partition, plan.product.instruction)}
        for operand, buffer, k_is_first in (("A", self.A, self.trans_A), ("B", self.B, not self.trans_B)):
            if is_fragment(buffer):
                layouts[buffer] = operand_layout(
                    buffer.shape, plan.partition, plan.product.instruction, plan.run, operand, k_is_first
                )
            else:
                layouts[buffer] = make_swizzled_layout(buffer)
        return layouts

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        plan = self._plan(target, int(thread_bounds.extent))
        if plan is None:
            arguments = layout_map, target, thread_bounds, thread_index, mbar_phase_expr
            return self._upstreams(target, lambda gemm: gemm.lower(*arguments))
        product, partition, run, pack = plan.product, plan.partition, plan.run, plan.pack
        instruction, register = product.instruction, product.register
        groups, wave_size = instruction.groups, instruction.accumulator.wave
        elements = instruction.elements * pack
        runs = elements // run
        thread = thread_index - thread_bounds.min
        wave, lane = thread // wave_size, thread % wave_size
        rows, cols = self.M // partition.rows // TILE, self.N // partition.cols // TILE  # tiles of this wave
        row0, col0 = wave % partition.rows * rows * TILE, wave // partition.rows * cols * TILE

        A, B, C = self.A, self.B, self.C
        a_dtype, b_dtype = str(A.dtype), str(B.dtype)
        decode = register is not None and a_dtype in FP8_DTYPES
        read_a = reader(A, self.gemm_node.aRegion, self.trans_A)
        read_b = reader(B, self.gemm_node.bRegion, not self.trans_B)
        # Registers are indexed by constants only; an operand that is not contiguous along K in shared memory is gathered.
        over_k = T.unroll if is_fragment(A) or is_fragment(B) else T.serial
        run_of_a = T.unroll if self.trans_A and is_shared(A) else T.vectorized
        run_of_b = T.unroll if not self.trans_B and is_shared(B) else T.vectorized
        clear_accum = self.gemm_node.clearAccum

        def element_k(k, r, v):
            """Return the K of element v of run r in lane 0; in a fragment it names the same register of every lane."""
            return k * instruction.K * pack + r * groups * run + v

        def lane_k():
            return lane // TILE % groups * run

        def a_element(i, k, r, v):
            if is_fragment(A):
                return read_a(i * TILE, element_k(k, r, v))
            return read_a(row0 + i * TILE + lane % TILE, element_k(k, r, v) + lane_k())

        def b_element(j, k, r, v):
            if is_fragment(B):
                return read_b(j * TILE, element_k(k, r, v))
            return read_b(col0 + j * TILE + lane % TILE, element_k(k, r, v) + lane_k())

        text = product_text(instruction, a_dtype, b_dtype)
        if decode:
            text = "".join(decoder_text(dtype, register) for dtype in sorted({a_dtype, b_dtype})) + text
        multiply = product_name(instruction, a_dtype, b_dtype)
        decode_a, decode_b = (f"{decoder_name(dtype, register)}<{elements}>" if decode else "" for dtype in (a_dtype, b_dtype))

        @T.macro
        def load(a, b, k):
            for i in T.unroll(rows):
                for r in T.unroll(runs):
                    for v in run_of_a(run):
                        a[i * elements + r * run + v] = a_element(i, k, r, v)
            for j in T.unroll(cols):
                for r in T.unroll(runs):
                    for v in run_of_b(run):
                        b[j * elements + r * run + v] = b_element(j, k, r, v)

        @T.macro
        def multiply_tiles(a, b):
            for p in T.unroll(pack):
                for i in T.unroll(rows):
                    for j in T.unroll(cols):
                        T.call_extern(
                            "handle",
                            multiply,
                            T.address_of(C[i * TILE, j * TILE]),
                            T.address_of(a[i * elements + p * instruction.elements]),
                            T.address_of(b[j * elements + p * instruction.elements]),
                        )

        if decode:

            @T.prim_func
            def gemm_decoded() -> None:
                T.attr(0, "pragma_import_c", text)
                a_codes = T.alloc_local((rows * elements,), a_dtype)
                b_codes = T.alloc_local((cols * elements,), b_dtype)
                a = T.alloc_local((rows * elements,), register)
                b = T.alloc_local((cols * elements,), register)
                if clear_accum:
                    T.clear(C)
                for k in over_k(self.K // (instruction.K * pack)):
                    load(a_codes, b_codes, k)
                    for i in T.unroll(rows):
                        T.call_extern("handle", decode_a, T.address_of(a[i * elements]), T.address_of(a_codes[i * elements]))
                    for j in T.unroll(cols):
                        T.call_extern("handle", decode_b, T.address_of(b[j * elements]), T.address_of(b_codes[j * elements]))
                    multiply_tiles(a, b)

            return _Simplify(gemm_decoded, inline_let=True)

        @T.prim_func
        def gemm_native() -> None:
            T.attr(0, "pragma_import_c", text)
            a = T.alloc_local((rows * elements,), a_dtype)
            b = T.alloc_local((cols * elements,), b_dtype)
            if clear_accum:
                T.clear(C)
            for k in over_k(self.K // (instruction.K * pack)):
                load(a, b, k)
                multiply_tiles(a, b)

        return _Simplify(gemm_native, inline_let=True)

    def _upstreams(self, target, use: Callable):
        """Return use(upstream's GEMM); types that it has no instruction for, and such K, are an error that says the rule."""
        k = _UPSTREAM_K.get(T.dtype(self.A.dtype).bits, 1)
        cause = None
        try:
            if self.K % k == 0:
                return use(self.upstream(self.gemm_node))
        except (AssertionError, KeyError) as error:  # of a type that its tables do not have
            cause = error
        operands = f"{self.A.dtype} and {self.B.dtype} with K = {self.K} into {self.C.dtype}"
        raise NotImplementedError(
            f"T.gemm: the operands must be what instructions of {target_get_mcpu(target)} multiply; got {operands}; cast the "
            f"tiles to float16 or bfloat16, and take K a multiple of {k}"
        ) from cause

    def _plan(self, target, threads: int) -> _Plan | None:
        a_dtype, b_dtype = str(self.A.dtype), str(self.B.dtype)
        arch = target_get_mcpu(target) or ""
        product = select_product(arch, a_dtype, b_dtype, self.K)
        if product is None:
            return None
        if product.register is not None and a_dtype in FP8_DTYPES and REQUIRE_NATIVE_FP8 in self.gemm_node.annotations:
            raise NotImplementedError(
                f"T.gemm: require_native_fp8 needs an instruction for {a_dtype} and {b_dtype}; got {arch}, where they are "
                f"decoded to {product.register}; compile for one that has it (docs/guide/amd.md), or drop the requirement"
            )
        if a_dtype not in FP8_DTYPES and not self._fits():
            return None
        self._check()
        self._check_tile()
        instruction = product.instruction
        partition = self._partition(target, threads, instruction.accumulator.wave)
        if is_fragment(self.A) or is_fragment(self.B):
            # MFMA: as many neighbours of a row as a lane of D holds, so that the result of one GEMM is an operand of the next.
            run = MFMA.elements if instruction.accumulator is MFMA else instruction.elements
            return _Plan(product, partition, run, pack=1)
        widest = _LOAD_BYTES if a_dtype in FP8_DTYPES else _LOAD_BYTES // 2
        pack = 1
        while instruction.elements * pack < widest and self.K % (instruction.K * pack * 2) == 0:
            pack *= 2
        return _Plan(product, partition, min(instruction.elements * pack, widest), pack)

    def _partition(self, target, threads: int, wave: int) -> Partition:
        """Return upstream's split of the tile over the waves, the same for every GEMM of a kernel."""
        if threads % wave:
            raise ValueError(
                f"T.gemm: threads must be a multiple of {wave}, the lanes of a wave; got {threads}; "
                f"use threads={max(wave, threads // wave * wave)}"
            )
        policy = self.gemm_node.policy
        try:
            rows, cols = policy.compute_warp_partition(self.M, self.N, threads, target, self.instruction_key)
        except InternalError:  # upstream finds no grid
            rows, cols = 0, 0
        if rows * cols * wave != threads or self.M % (rows * TILE) or self.N % (cols * TILE):
            raise ValueError(
                f"T.gemm: the tile must split into {TILE}x{TILE} blocks over all waves; got a {self.M}x{self.N} tile and "
                f"{threads // wave} waves ({threads} threads); use fewer threads or a larger tile"
            )
        return Partition(int(rows), int(cols))

    def _fits(self) -> bool:
        """Whether the MMAs can accumulate in C."""
        return str(self.C.dtype) == "float32" and is_fragment(self.C) and is_full_region(self.gemm_node.cRegion)

    def _check(self) -> None:
        if not self._fits():
            raise TypeError(
                f"T.gemm: C of an fp8 product must be a whole float32 fragment; got {self.C.dtype} {self.C.name} in scope "
                f"{self.C.scope()!r}; accumulate in one and copy it"
            )
        for name, buffer, region in (("A", self.A, self.gemm_node.aRegion), ("B", self.B, self.gemm_node.bRegion)):
            if is_fragment(buffer) and not is_full_region(region):
                raise ValueError(
                    f"T.gemm: a fragment operand must be used whole; got a slice of {name} ({buffer.name}); "
                    "use a shared buffer, or a fragment of the slice's shape"
                )
            if not is_fragment(buffer) and not is_shared(buffer):
                raise TypeError(
                    f"T.gemm: {name} must be a shared or fragment buffer; got {buffer.name} in scope {buffer.scope()!r}; "
                    "copy the tile with T.copy first"
                )

    def _check_split(self, target, threads: int) -> None:
        """Raise ValueError unless the tile splits into whole instructions over all waves."""
        self._check_tile()
        self._partition(target, threads, int(target.attrs["thread_warp_size"]))

    def _check_tile(self) -> None:
        for name, extent in (("M", self.M), ("N", self.N)):
            if extent % TILE:
                raise ValueError(
                    f"T.gemm: the tile's {name} must be a multiple of {TILE}; got {name} = {extent}; "
                    "round the tile up and mask the tail when copying"
                )


class MfmaGemm(MatrixUnitGemm):
    """CDNA: waves of 64."""

    upstream = GemmMFMA
    instruction_key = GEMM_INST_MFMA


class WmmaGemm(MatrixUnitGemm):
    """RDNA: waves of 32."""

    upstream = GemmWMMA
    instruction_key = GEMM_INST_WMMA

    def lower(self, *arguments, **options):
        func = super().lower(*arguments, **options)
        return roll_outer_loop(func) if ROLLED_K in self.gemm_node.annotations else func


def roll_outer_loop(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Hide the number of rounds of the outermost loops, those over K, so that the compiler does not unroll them.

    Before: for k in range(8)    After: for k in range(tilelang_ext_rounds(8))
    """

    def roll(node):
        if isinstance(node, tirx.For):
            rounds = tirx.call_extern("int32", "tilelang_ext_rounds", node.extent)
            return tirx.For(node.loop_var, node.min, rounds, node.kind, node.body)
        return node

    def enter(node):
        return roll(node) if isinstance(node, tirx.For) and node.kind == tirx.ForKind.SERIAL else None

    body = ir_transform(func.body, enter, None, ["tirx.For"])
    return func.with_body(tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_c", tirx.StringImm(_ROUNDS), body))


def reader(buffer, region, k_is_first: bool):
    """Return a function that gives one element of an operand by its row (of A) or column (of B) and its K."""
    *lead, first0, second0 = [r.min for r in region.region]

    def read(i, k):
        first, second = (k, i) if k_is_first else (i, k)
        return buffer[(*lead, first0 + first, second0 + second)]

    return read
