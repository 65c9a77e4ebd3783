"""Compile gate: what T.fp8_scaled_matmul becomes on each generation of NVIDIA GPUs, counted in the machine code."""

import pytest
from cuda.kernels import E4M3, E5M2, LAYOUTS, lower, matmul
from cuda.toolkit import compile_texts, needs_nvcc

M, N, K = 128, 192, 256
KERNELS = {
    "tensor": {"layouts": LAYOUTS["tensor"]},
    "row_mixed": {"a": E4M3, "b": E5M2},
    "block_e5m2": {"layouts": LAYOUTS["block"], "a": E5M2, "b": E5M2},
    "e8m0": {"layouts": LAYOUTS["e8m0"], "K": 128},
    "nn": {"trans_B": False},
    "tn": {"trans_A": True, "trans_B": True},
    "tt": {"trans_A": True, "trans_B": False, "layouts": LAYOUTS["block"]},
    "a_in_registers": {"A_scope": "fragment", "K": 128},
}
# The instruction of every product. On sm_100 fp8 mma.sync is spelled as conversions and half products: its own fp8
# instruction reads and writes tensor memory.
# Hopper, whose products are of another kind, sees every kernel; each kernel is also seen on two of the others.
KERNELS_OF = {
    "sm_80": ("row_mixed", "block_e5m2", "tn", "a_in_registers"),
    "sm_89": ("tensor", "e8m0", "nn", "tt"),
    "sm_90a": tuple(KERNELS),
    "sm_100a": ("row_mixed", "block_e5m2", "nn", "a_in_registers"),
    "sm_120a": ("tensor", "e8m0", "tn", "tt"),
    "sm_103a": ("row_mixed",),  # generations of sm_100's kind: one kernel shows that the text is theirs too
    "sm_110a": ("nn",),
}
PRODUCT = {"sm_80": "HMMA", "sm_89": "QMMA", "sm_90a": "QGMMA", "sm_100a": "HMMA", "sm_120a": "QMMA"}
PRODUCT |= dict.fromkeys(("sm_103a", "sm_110a"), PRODUCT["sm_100a"])


@needs_nvcc
@pytest.mark.parametrize("arch", PRODUCT)
def test_products(arch):
    texts = {name: lower(matmul(**{"M": M, "N": N, "K": K, "name": name, **KERNELS[name]}), arch) for name in KERNELS_OF[arch]}
    for name, kernel in compile_texts(texts, arch).items():
        products = {op for op in ("HMMA", "QMMA", "HGMMA", "QGMMA", "IMMA") if kernel.count(op)}
        assert products == {PRODUCT[arch]}, (name, kernel.instructions)
        assert kernel.spilled == 0, name
        # Codes become halves by multiplication on sm_80 (E5M2 by moving bytes), by an instruction on sm_100.
        assert bool(kernel.count("HMUL2")) is (arch == "sm_80" and name != "block_e5m2"), name
        assert bool(kernel.count("F2FP")) is (arch in ("sm_100a", "sm_103a", "sm_110a")), name
