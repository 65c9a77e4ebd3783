"""The Metal backend: fragments with layouts, `T.gemm` on simdgroup matrices, programs for torch, MLX and the simulator."""

from __future__ import annotations

from tilelang_ext.metal.program import MetalProgram, lower
from tilelang_ext.metal.run import to_mlx, to_torch

__all__ = ["MetalProgram", "lower", "to_mlx", "to_torch"]
