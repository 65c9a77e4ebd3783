"""The mark of statements that multiply codes with E8M0 scales per 32 of K: some matrix units take codes and scales directly.

The statements decode, or scale partial sums, which every target can do. A target that has the instruction replaces them.
"""

from __future__ import annotations

from tilelang.utils.language import to_buffer_region

from tilelang_ext.marks import BLOCK_SCALED


def block_scaled(total, A, scale_a, B, scale_b, K, *, part: int = 0) -> dict:
    """Return the annotation of a loop or T.gemm that does nothing but

        total[i, j] += sum over k < K of (scale_a A)[i, k] * (scale_b B)[j, k]

    | operand | what |
    | --- | --- |
    | total | (M, N) float32, a fragment |
    | A, B | regions (M, K), (N, K) of a float type, or packed E2M1: uint8, K / 2 columns; past K they hold zeros or end |
    | scale_a, scale_b | regions (M, K / 32), (N, K / 32) of E8M0 bytes; None for 1 |

    Where one product takes several statements in a row, each statement has the mark and its number `part`: a target that takes
    scales replaces part 0 by the whole product and removes the others.
    """
    regions = [None if operand is None else to_buffer_region(operand) for operand in (total, A, scale_a, B, scale_b)]
    return {BLOCK_SCALED: [*regions, K, part]}
