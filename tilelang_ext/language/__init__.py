"""`tilelang.language` plus the tile intrinsics of tilelang_ext: `from tilelang_ext import language as T`."""

from __future__ import annotations

import tilelang.language as _upstream
from tilelang.language import *  # noqa: F403

from tilelang_ext.formats import BlockScaledLayout
from tilelang_ext.language.e8m0 import e8m0_to_float
from tilelang_ext.language.fp8_scaled_matmul import fp8_scaled_matmul
from tilelang_ext.language.mxfp4_dequant import mxfp4_dequant
from tilelang_ext.language.mxfp4_scaled_matmul import mxfp4_scaled_matmul

__all__ = [
    *_upstream.__all__,
    "BlockScaledLayout",
    "e8m0_to_float",
    "fp8_scaled_matmul",
    "mxfp4_dequant",
    "mxfp4_scaled_matmul",
]
