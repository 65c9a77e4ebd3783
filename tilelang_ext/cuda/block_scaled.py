"""Which calls of `T.gemm_blockscaled` are upstream's on NVIDIA GPUs: those for which it has an instruction.

| target | operands | scales | C |
| --- | --- | --- | --- |
| sm_100 | fp8, fp6, fp4 in shared memory | E8M0 in tensor memory | tensor memory |
| sm_120 | float4_e2m1fn, B in shared memory | uint32 words of four E4M3 bytes, one per 16 of K (NVFP4) | fragment |
"""

from __future__ import annotations

from tilelang.cuda.target import target_is_sm120
from tvm import tirx
from tvm.target import Target

from tilelang_ext.formats import E2M1, NVFP4_GROUP
from tilelang_ext.passes.block_scaled_gemm import region_of, scope_of


def has_instruction(call: tirx.Call, target: Target) -> bool:
    """Whether upstream lowers a call; what it refuses in tensor memory it refuses by name."""
    A, B, C, scale_a, scale_b = (region_of(call.args[slot]).buffer for slot in (0, 1, 2, 13, 14))
    if C.scope() == "shared.tmem":
        return True
    granularities = {int(call.annotations[f"sf_{name}_granularity_k"]) for name in "ab"}
    return (
        target_is_sm120(target)
        and str(A.dtype) == str(B.dtype) == E2M1.dtype
        and str(scale_a.dtype) == str(scale_b.dtype) == "uint32"
        and granularities == {NVFP4_GROUP}
        and scope_of(B) == "shared"
        and scope_of(C) == "fragment"
    )
