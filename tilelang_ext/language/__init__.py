"""`tilelang.language` plus the tile intrinsics of tilelang_ext: `from tilelang_ext import language as T`."""

from __future__ import annotations

import tilelang.language as _upstream
from tilelang.language import *  # noqa: F403

from tilelang_ext.formats import BlockScaledLayout
from tilelang_ext.language import parsing as _parsing
from tilelang_ext.language.bounds import max_value, min_value  # noqa: F401 (upstream's names)
from tilelang_ext.language.e8m0 import e8m0_to_float
from tilelang_ext.language.fp8_scaled_matmul import fp8_scaled_matmul
from tilelang_ext.language.gemm_blockscaled import gemm_blockscaled
from tilelang_ext.language.messages import quieten as _quieten
from tilelang_ext.language.moe import moe_gather, moe_scatter
from tilelang_ext.language.mx_quantize import mx_quantize
from tilelang_ext.language.mxfp4_dequant import mxfp4_dequant
from tilelang_ext.language.mxfp4_scaled_matmul import mxfp4_scaled_matmul
from tilelang_ext.language.swiglu import silu_mul, swiglu
from tilelang_ext.language.tile_pairs import atomic_add, atomic_max, atomic_min, copy  # noqa: F401 (upstream's names)

__all__ = [
    *(name for name in _upstream.__all__ if name != "gemm_blockscaled"),
    "BlockScaledLayout",
    "e8m0_to_float",
    "fp8_scaled_matmul",
    "gemm_blockscaled",
    "moe_gather",
    "moe_scatter",
    "mx_quantize",
    "mxfp4_dequant",
    "mxfp4_scaled_matmul",
    "silu_mul",
    "swiglu",
]

_parsing.parse_once()
_quieten(frozenset(__all__) - frozenset(_upstream.__all__))
