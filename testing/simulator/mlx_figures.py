"""Counts of MLX's kernels, by executing their text in the simulator: MLX 0.32.4, from the headers of the wheel `mlx-metal`.

Recorded, so that CI can hold ours beside them without a download; `make test-peers` counts them again (`test_mlx.py`).
"""

from typing import NamedTuple


class Figures(NamedTuple):
    """Of one launch: bytes are per 8x8x8 MMA, barriers per 1,000."""

    device_read: float
    constant_read: float
    threadgroup_read: float
    threadgroup_written: float
    barriers: float


STEEL_512 = {  # gemm of half, 512x512x512, by its tile (BM, BN, BK, WM, WN)
    (64, 64, 16, 2, 2): Figures(32.0, 1.8, 64, 32, 16.1),
    (64, 32, 32, 2, 2): Figures(48.0, 3.5, 96, 48, 16.6),
}
QMM_T_256 = {  # fp_qmm_t of half by weights of so many bits, 128x128x256: tiles of 32x32x32 with 2x2 simdgroups
    4: Figures(42.0, 5.0, 128, 64, 33.2),  # mxfp4
    8: Figures(50.0, 5.0, 128, 64, 33.2),  # mxfp8
}
