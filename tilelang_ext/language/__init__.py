"""`tilelang.language` plus the tile intrinsics of tilelang_ext: `from tilelang_ext import language as T`."""

from __future__ import annotations

import tilelang.language as _upstream
from tilelang.language import *  # noqa: F403

__all__ = [*_upstream.__all__]
