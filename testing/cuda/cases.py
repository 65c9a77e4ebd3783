"""Problems of T.fp8_scaled_matmul for NVIDIA GPUs, that tests run from their text on the CPU and on a device."""

import torch
from cuda.kernels import E4M3, E5M2, LAYOUTS, ROW, matmul
from language.fp8_cases import operand

from tilelang_ext import reference

DECODED_CASES = {
    "both transposed": {"trans_A": True, "trans_B": False, "b": E5M2},
    "e8m0": {"layouts": LAYOUTS["e8m0"], "a": E5M2},
    "blocks, K below an instruction's": {"layouts": LAYOUTS["block"], "K": 20, "trans_B": False, "block_M": 32, "block_N": 32},
    "A in registers": {"A_scope": "fragment", "K": 64, "M": 32, "block_M": 32, "block_N": 48},
}
TRANSPOSED_CASES = {
    "both": {"trans_A": True, "trans_B": False, "a": E5M2},
    "A": {"trans_A": True, "layouts": LAYOUTS["block"], "K": 288, "block_M": 128, "block_N": 48},
    "B, 32 of K": {"trans_B": False, "layouts": LAYOUTS["e8m0"], "K": 64, "N": 24, "block_N": 24},
    "B, A in registers": {"trans_B": False, "A_scope": "fragment", "K": 96, "M": 64},
}


def problem(M=40, N=72, K=160, layouts=ROW, a=E4M3, b=E4M3, trans_A=False, trans_B=True, spread=4, **options):
    """A kernel, its tensors, the grid, and what C must be."""
    (A, SA), (B, SB) = operand(M, K, layouts[0], a, 1, spread), operand(N, K, layouts[1], b, 2, spread)
    tensors = {
        "A": A.t().contiguous() if trans_A else A,
        "SA": SA,
        "B": B if trans_B else B.t().contiguous(),
        "SB": SB,
        "C": torch.full((M, N), torch.nan),
    }
    kernel = matmul(M, N, K, layouts, a, b, trans_A=trans_A, trans_B=trans_B, **options)
    grid = -(-N // options.get("block_N", 64)), -(-M // options.get("block_M", 64))
    return kernel, tensors, grid, reference.scaled_matmul(A, SA, B, SB, *layouts)
