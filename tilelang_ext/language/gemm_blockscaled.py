"""`T.gemm_blockscaled`: upstream's product of tiles with a scale per row and group of K, on every target.

    C[i, j] += sum over k of SFA[i, (k_start + k) / ga] * A[i, k] * SFB[j, (k_start + k) / gb] * B[k, j]

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| A | (M, K), or (K, M) transposed | fp8, float4_e2m1fn; uint8 with two E2M1 codes per byte along K | shared, fragment |
| B | (K, N), or (N, K) transposed | the same, its own | shared, fragment |
| SFA, SFB | (M, columns), (N, columns) | see below | shared, fragment, global |
| C | (M, N) | float32, float16, bfloat16 | fragment, shared |

| scales | dtype | columns |
| --- | --- | --- |
| E8M0 | uint32: four bytes, the lowest first | K / (4 * granularity) |
| E8M0 | uint8, float8_e8m0fnu | K / granularity |
| E4M3 (NVFP4) | float8_e4m3fn; uint32 and uint8 of E2M1 operands with granularity 16 | the same |
| floats | float32, float16, bfloat16 | K / granularity |

Scales are those of all of K, whose element `k_start` is the first of the tile. In shared memory or a fragment they may be a
window on K, whose columns repeat: one word column holds what four groups need, as on sm_100. Where upstream has no instruction
for the call, `passes/expand_block_scaled.py` replaces it, by MMAs with scales on gfx950.
"""

from __future__ import annotations

import tvm_ffi
from tilelang.language.utils import buffer_region_to_tile_region
from tilelang.tileop.base import GemmWarpPolicy
from tilelang.utils.language import to_buffer_region
from tvm import tirx
from tvm.ir import Op, register_op_attr

from tilelang_ext.formats import CODES_PER_BYTE
from tilelang_ext.language.tile import Tile, equal, tile
from tilelang_ext.marks import GEMM_BLOCKSCALED

_NAME = "T.gemm_blockscaled"
_OPAQUE = 4  # tirx::CallEffectKind::kOpaque


def gemm_blockscaled(
    A,
    B,
    C,
    SFA,
    SFB,
    transpose_A: bool = False,
    transpose_B: bool = False,
    policy: GemmWarpPolicy = GemmWarpPolicy.Square,
    clear_accum: bool | tirx.PrimExpr = False,
    *,
    k_start: int | tirx.PrimExpr,
    sf_a_granularity_k: int,
    sf_b_granularity_k: int,
    annotations: dict | None = None,
) -> tirx.Call:
    """Add the product of two tiles, each times its scales, to C; where `clear_accum`, overwrite C.

    `k_start` is the element of K, among those that have scales, where the tile begins; it may be an expression. A scale covers
    `sf_a_granularity_k` or `sf_b_granularity_k` elements of K, more or fewer than the tile has. The signature is that of
    tilelang 0.1.15, whose own name means the same; here uint8 tiles may meet others, and tilelang 0.1.14 has it too.

    Raises ValueError for shapes; when the kernel is lowered, TypeError for dtypes and scopes, ValueError for a k_start inside a
    group of float scales, and NotImplementedError for other layouts of scales.
    """
    a, b, c = tile(_NAME, "A", A), tile(_NAME, "B", B), tile(_NAME, "C", C)
    for each in (a, b, c):
        each.check_constant()
    (M, K), (K_b, N) = a.shape[:: -1 if transpose_A else 1], b.shape[:: -1 if transpose_B else 1]
    K, K_b = K * _codes_per_element(a), K_b * _codes_per_element(b)
    for what, first, second in (("M of A and C", M, c.shape[0]), ("N of B and C", N, c.shape[1]), ("K of A and B", K, K_b)):
        if not equal(first, second):
            raise ValueError(
                f"{_NAME}: {what} must agree; got {first} and {second}; check the shapes and transpose_A, transpose_B"
            )
    clears = isinstance(clear_accum, bool) and clear_accum
    regions = [
        _argument(region, access)
        for region, access in (
            *((_region(operand), access) for operand, access in ((a, "r"), (b, "r"), (c, "w" if clears else "rw"))),
            (to_buffer_region(SFA), "r"),
            (to_buffer_region(SFB), "r"),
        )
    ]
    granularities = {"sf_a_granularity_k": int(sf_a_granularity_k), "sf_b_granularity_k": int(sf_b_granularity_k)}
    # The slots of upstream's call; 0 stands for no barrier.
    slots = [*regions[:3], transpose_A, transpose_B, M, N, K, policy, clear_accum, tirx.const(0, "int32"), *c.begin]
    scales = [*regions[3:], k_start if isinstance(k_start, tirx.PrimExpr) else tirx.const(k_start, "int32")]
    return tirx.call_intrin("handle", _operator(), *slots, *scales, annotations={**(annotations or {}), **granularities})


def _operator() -> Op:
    """Return upstream's operator; tilelang 0.1.14 has none, but calls are replaced before anything else reads them."""
    if GEMM_BLOCKSCALED not in Op.list_op_names():
        tvm_ffi.get_global_func("ir.RegisterOp")(GEMM_BLOCKSCALED, "a product of tiles with scales")
        register_op_attr(GEMM_BLOCKSCALED, "TCallEffectKind", tirx.IntImm("int32", _OPAQUE))
        register_op_attr(GEMM_BLOCKSCALED, "TScriptPrinterName", "gemm_blockscaled")
    return Op.get(GEMM_BLOCKSCALED)


def _codes_per_element(operand: Tile) -> int:
    return CODES_PER_BYTE if operand.dtype == "uint8" else 1


def _region(operand: Tile) -> tirx.BufferRegion:
    return operand.region(*((0, extent) for extent in operand.shape))


def _argument(region: tirx.BufferRegion, access: str) -> tirx.PrimExpr:
    return buffer_region_to_tile_region(region, access, [axis.extent for axis in region.region])
