"""`T.gemm` with fp8 operands on NVIDIA GPUs: which instruction runs, and what is refused.

| target | K-major operands | others |
| --- | --- | --- |
| sm_75 | scalar arithmetic | the same |
| sm_80 to sm_87 | half mma.sync on codes decoded in registers (decoded_mma.py) | the same |
| sm_89, sm_120 | fp8 mma.sync | the same |
| sm_90 | WGMMA where the tile allows (M % 64, 128 threads), else mma.sync | transposed for WGMMA (transposed_wgmma.py) |
| sm_100 | mma.sync; T.tcgen05_gemm with C in tensor memory is upstream's | the same |

On sm_90 and sm_100 the assembler compiles fp8 mma.sync to conversions and half MMAs, which is correct, but at half the rate:
a `T.gemm` with the annotation `require_native_fp8` is refused there, and where there is no fp8 unit.
"""

from __future__ import annotations

from tilelang.contrib.nvcc import get_target_compute_version
from tilelang.cuda.op.gemm.gemm_fma import GemmFMA
from tilelang.cuda.op.gemm.gemm_mma import GemmMMA
from tvm.target import Target

from tilelang_ext.cuda.decoded_mma import DecodedEmitter
from tilelang_ext.cuda.sliced_wgmma import SlicedWGMMA
from tilelang_ext.cuda.transposed_wgmma import TransposedWGMMA, needs_transposition
from tilelang_ext.formats import FP8_OPERANDS, OCP_OF_FNUZ
from tilelang_ext.marks import REQUIRE_NATIVE_FP8

_FP8 = {format.dtype for format in FP8_OPERANDS}
_FNUZ = {format.dtype for format in OCP_OF_FNUZ}
_MMA_K = 32  # K of one fp8 instruction


def _compute_version(target: Target) -> tuple[int, int]:
    major, minor = get_target_compute_version(target).split(".")
    return int(major), int(minor)


class _Fp8Operands:
    """The rules for fp8 operands, which each class below puts in front of one of upstream's classes."""

    def __post_init__(self) -> None:
        for name, buffer in (("A", self.A), ("B", self.B)):
            if str(buffer.dtype) in _FNUZ:
                raise NotImplementedError(
                    f"T.gemm: on NVIDIA GPUs fp8 operands must be float8_e4m3fn or float8_e5m2; got {buffer.dtype} ({name}, "
                    f"{buffer.name}); convert codes and scale with tilelang_ext.quantization.fnuz_to_ocp, or use gfx942"
                )
        super().__post_init__()

    @property
    def is_fp8(self) -> bool:
        return {str(self.A.dtype), str(self.B.dtype)} <= _FP8

    @property
    def allow_f8f6f4_mixed_dtypes(self) -> bool:
        return self.is_fp8  # the instructions take any two fp8 types

    def _refuse_if_native_is_required(self, target: Target, instead: str) -> None:
        if self.is_fp8 and REQUIRE_NATIVE_FP8 in self.gemm_node.annotations:
            raise NotImplementedError(
                f"T.gemm: require_native_fp8 needs an fp8 instruction; got {target.attrs['arch']}, {instead}; compile for "
                "sm_89, sm_90 (tiles of M % 64 == 0 on 128 threads or a multiple) or sm_120, or drop the requirement"
            )


class Fp8GemmMMA(_Fp8Operands, GemmMMA):
    """mma.sync, on decoded operands where the matrix unit takes no fp8; WGMMA where only an operand's major rules it out."""

    def infer_layout(self, target, thread_nums):
        if self._is_transposed(target, thread_nums):
            return TransposedWGMMA(self.gemm_node).infer_layout(target, thread_nums)
        if _compute_version(target) < (8, 9):
            self._refuse_if_native_is_required(target, "which has no fp8 unit")
        elif (9, 0) <= _compute_version(target) < (12, 0):
            self._refuse_if_native_is_required(target, "whose fp8 mma.sync is made of half products")
        return super().infer_layout(target, thread_nums)

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        if self._is_transposed(target, thread_bounds.extent):
            gemm = TransposedWGMMA(self.gemm_node)
            return gemm.lower(layout_map, target, thread_bounds, thread_index, mbar_phase_expr)
        return super().lower(layout_map, target, thread_bounds, thread_index, mbar_phase_expr)

    def _is_transposed(self, target, threads) -> bool:
        return self.is_fp8 and needs_transposition(self, target, int(threads))

    def _make_mma_emitter(self, target, thread_nums, thread_var=None):
        if self.is_fp8:
            if int(self.K) % _MMA_K:
                raise ValueError(
                    f"T.gemm: on NVIDIA GPUs K of an fp8 tile must be a multiple of {_MMA_K}; got K = {self.K}; "
                    "round the tile up and mask the tail when copying"
                )
            if _compute_version(target) < (8, 9):
                self.intrin_emitter_cls = DecodedEmitter
        return super()._make_mma_emitter(target, thread_nums, thread_var)


class Fp8GemmWGMMA(_Fp8Operands, SlicedWGMMA):
    """WGMMA on Hopper."""


class Fp8GemmFMA(_Fp8Operands, GemmFMA):
    """Scalar arithmetic, for Volta and Turing."""

    def infer_layout(self, target, thread_nums):
        self._refuse_if_native_is_required(target, "which has no fp8 unit")
        return super().infer_layout(target, thread_nums)
