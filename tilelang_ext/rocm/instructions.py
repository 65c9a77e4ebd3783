"""The matrix instructions of AMD GPUs: which one multiplies two types on an architecture, and which lane holds what.

Every instruction is a product D += A * B on a 16x16 tile by one wave. With `lane % 16` the row of A, or the column of B,

    k(lane, e) = e // run * (groups * run) + lane // 16 % groups * run + e % run

is the K of the lane's operand element e. The unit pairs the elements of A and B that have the same place, so any order of K
that A and B share gives the same sum; `run` is that freedom. D is in one of three places:

| `Accumulator` | row of element e | column | units |
| --- | --- | --- | --- |
| MFMA, called with A and B exchanged | lane % 16 | lane // 16 * 4 + e | CDNA |
| WMMA_GFX11 | e * 2 + lane // 16 | lane % 16 | RDNA 3 |
| WMMA_GFX12 | lane // 16 * 8 + e | lane % 16 | RDNA 4 |

Sources: AMD's "CDNA 3" and "CDNA 4", "RDNA 3" and "RDNA 4 Instruction Set Architecture" reference guides; the places of D are
those of tilelang's own fp16 products, so that both kinds can share an accumulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext.formats import CODES_PER_BYTE, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, FP8_OPERANDS

TILE = 16  # rows and columns of every tile
SCALED_K = 128  # of the instruction that takes scales
FP8_DTYPES = tuple(format.dtype for format in FP8_OPERANDS)


@dataclass(frozen=True)
class Accumulator:
    """Where a lane keeps its elements of the float32 tile D."""

    wave: int
    row: Callable  # (lane, element) -> row
    col: Callable
    lane: Callable  # (row, column) -> lane
    element: Callable
    exchanged: bool  # the instruction is called as B, A, which makes a lane's elements neighbours of one row

    @property
    def elements(self) -> int:
        return TILE * TILE // self.wave


MFMA = Accumulator(
    wave=64,
    row=lambda lane, e: lane % 16,
    col=lambda lane, e: lane // 16 * 4 + e,
    lane=lambda i, j: j // 4 * 16 + i,
    element=lambda i, j: j % 4,
    exchanged=True,
)
WMMA_GFX11 = Accumulator(
    wave=32,
    row=lambda lane, e: e * 2 + lane // 16,
    col=lambda lane, e: lane % 16,
    lane=lambda i, j: i % 2 * 16 + j,
    element=lambda i, j: i // 2,
    exchanged=False,
)
WMMA_GFX12 = Accumulator(
    wave=32,
    row=lambda lane, e: lane // 16 * 8 + e,
    col=lambda lane, e: lane % 16,
    lane=lambda i, j: i // 8 * 16 + j,
    element=lambda i, j: i % 8,
    exchanged=False,
)


@dataclass(frozen=True)
class MatrixInstruction:
    """One instruction. `operand` is the C type of a lane's elements of A or B, `arguments` what follows A, B and D."""

    builtin: str  # after __builtin_amdgcn_
    K: int
    groups: int  # of lanes along K; lanes beyond TILE * groups repeat the first ones (gfx11)
    accumulator: Accumulator
    operand: str
    arguments: str = ""

    @property
    def elements(self) -> int:
        """Elements of A, and of B, that a lane holds."""
        return self.K // self.groups

    @property
    def name(self) -> str:
        return self.builtin


@dataclass(frozen=True)
class Product:
    """How two operand types are multiplied: `register` is the type in registers, codes as they are where it is None."""

    instruction: MatrixInstruction
    register: str | None


def _vector(element: str, count: int) -> str:
    return f"__attribute__((__vector_size__({count} * sizeof({element})))) {element}"


_MFMA_ARGUMENTS = ", 0, 0, 0"  # cbsz, abid, blgp: no broadcast
_F8_NAMES = {E4M3.dtype: "fp8", E5M2.dtype: "bf8", E4M3_FNUZ.dtype: "fp8", E5M2_FNUZ.dtype: "bf8"}
_PACKED = "uint8"  # of a product with scales: two codes of E2M1
_F8F6F4_FORMAT = {E4M3.dtype: 0, E5M2.dtype: 1, _PACKED: 4}
_UNIT_SCALES = "0x7f7f7f7f"  # four E8M0 bytes of 2^0

MFMA_16 = {
    "float16": MatrixInstruction("mfma_f32_16x16x16f16", 16, 4, MFMA, _vector("_Float16", 4), _MFMA_ARGUMENTS),
    "bfloat16": MatrixInstruction("mfma_f32_16x16x16bf16_1k", 16, 4, MFMA, _vector("short", 4), _MFMA_ARGUMENTS),
}
MFMA_32 = {
    "float16": MatrixInstruction("mfma_f32_16x16x32_f16", 32, 4, MFMA, _vector("_Float16", 8), _MFMA_ARGUMENTS),
    "bfloat16": MatrixInstruction("mfma_f32_16x16x32_bf16", 32, 4, MFMA, _vector("short", 8), _MFMA_ARGUMENTS),
}
WMMA_11 = {"float16": MatrixInstruction("wmma_f32_16x16x16_f16_w32", 16, 1, WMMA_GFX11, _vector("_Float16", 16))}
WMMA_12 = {"float16": MatrixInstruction("wmma_f32_16x16x16_f16_w32_gfx12", 16, 2, WMMA_GFX12, _vector("_Float16", 8))}


def _mfma_f8(a: str, b: str) -> MatrixInstruction:
    # Called as B, A: so the first type in the name is B's.
    return MatrixInstruction(f"mfma_f32_16x16x32_{_F8_NAMES[b]}_{_F8_NAMES[a]}", 32, 4, MFMA, "long", _MFMA_ARGUMENTS)


def _mfma_f8f6f4(a: str, b: str, scale_a: str = _UNIT_SCALES, scale_b: str = _UNIT_SCALES) -> MatrixInstruction:
    # cbsz and blgp are the formats of the first and second operand; then the byte of each scale register, and the register.
    arguments = f", {_F8F6F4_FORMAT[b]}, {_F8F6F4_FORMAT[a]}, 0, {scale_b}, 0, {scale_a}"
    return MatrixInstruction("mfma_scale_f32_16x16x128_f8f6f4", SCALED_K, 4, MFMA, _vector("int", 8), arguments)


def _wmma_f8(a: str, b: str) -> MatrixInstruction:
    name = f"wmma_f32_16x16x16_{_F8_NAMES[a]}_{_F8_NAMES[b]}_w32_gfx12"
    return MatrixInstruction(name, 16, 2, WMMA_GFX12, _vector("int", 2))


@dataclass(frozen=True)
class Unit:
    """The matrix unit of an architecture, as far as products of fp8, and those that tilelang leaves slow, need it.

    `native` fp8 types go in as codes, to instructions that `f8` lists from the largest K down. Every other fp8 type is decoded
    to `decoded`, in which each of its values is exact. `wide` has 16-bit instructions with a larger K than tilelang emits.
    """

    native: tuple[str, ...]
    f8: tuple[Callable, ...]
    decoded: str
    half: tuple[dict[str, MatrixInstruction], ...]  # from the largest K down
    wide: bool = False
    scaled: tuple[str, ...] = ()  # types that it multiplies with E8M0 scales per 32 of K, lane // 16 having those of its 32


_OCP = (E4M3.dtype, E5M2.dtype)
_FNUZ = (E4M3_FNUZ.dtype, E5M2_FNUZ.dtype)
UNITS = {
    # Its 16-bit products read and write subnormals as zero: the subnormals of E5M2 would be lost in half. (MIOpen's
    # "MI200 MFMA behavior specifics"; bfloat16 has the exponents of float32.)
    "gfx90a": Unit((), (), "bfloat16", (MFMA_16,)),
    "gfx942": Unit(_FNUZ, (_mfma_f8,), "float16", (MFMA_16,)),
    "gfx950": Unit(_OCP, (_mfma_f8f6f4, _mfma_f8), "float16", (MFMA_32, MFMA_16), wide=True, scaled=(*_OCP, _PACKED)),
    "gfx1100": Unit((), (), "float16", (WMMA_11,)),
    "gfx1201": Unit(_OCP, (_wmma_f8,), "float16", (WMMA_12,)),
}
# Chips of one generation have the same unit.
UNITS |= dict.fromkeys(("gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152"), UNITS["gfx1100"])
UNITS |= {"gfx1200": UNITS["gfx1201"]}


def select_product(arch: str, a_dtype: str, b_dtype: str, K: int) -> Product | None:
    """Return how `arch` multiplies A and B over a tile's K, None where tilelang's own instruction is as good.

    Raises NotImplementedError for fp8 on other architectures and int8 on gfx90a, TypeError for fp8 beside another type,
    ValueError for a K that no instruction divides.
    """
    fp8 = [dtype in FP8_DTYPES for dtype in (a_dtype, b_dtype)]
    unit = UNITS.get(arch)
    if arch == "gfx90a" and "int8" in (a_dtype, b_dtype):
        raise NotImplementedError(
            "T.gemm: int8 operands need an instruction with K = 32, which is all that tilelang emits; got gfx90a, which has "
            "K = 16 alone; convert the tiles to half, or compile for gfx942 or gfx950"
        )
    if not any(fp8):
        if unit is None or not unit.wide or a_dtype != b_dtype or a_dtype not in unit.half[0]:
            return None
        instruction = unit.half[0][a_dtype]
        return Product(instruction, a_dtype) if K % instruction.K == 0 else None
    if not all(fp8):
        raise TypeError(f"T.gemm: both operands must be fp8 types; got {a_dtype} and {b_dtype}; cast the fp8 tile to {a_dtype}")
    if unit is None:
        raise NotImplementedError(
            f"T.gemm: fp8 operands are for {', '.join(UNITS)}; got {arch or 'no architecture'}; "
            "name one as the target's mcpu, or convert the tiles to half"
        )
    if a_dtype in unit.native and b_dtype in unit.native:
        candidates = [Product(f8(a_dtype, b_dtype), None) for f8 in unit.f8]
    else:
        candidates = []
    candidates += [Product(half[unit.decoded], unit.decoded) for half in unit.half]
    for product in candidates:
        if K % product.instruction.K == 0:
            return product
    raise ValueError(f"T.gemm: K of fp8 tiles must be a multiple of {TILE}; got {K}; pad K with zeros")


def takes_scales(arch: str, a_dtype: str, b_dtype: str) -> bool:
    """Whether `arch` multiplies A and B, fp8 types or uint8 for packed E2M1, with their E8M0 scales in the instruction."""
    return arch in UNITS and a_dtype in UNITS[arch].scaled and b_dtype in UNITS[arch].scaled


def scaled_product(a_dtype: str, b_dtype: str) -> MatrixInstruction:
    """Return the product of types that `takes_scales` allows; its arguments name the registers scale_a and scale_b."""
    return _mfma_f8f6f4(a_dtype, b_dtype, "scale_a", "scale_b")


def codes_per_byte(dtype: str) -> int:
    """Return how many codes an element of an operand of a product with scales holds."""
    return CODES_PER_BYTE if str(dtype) == _PACKED else 1
