"""The compile gate: kernels through the real compiler, their instructions counted, no spills, LDS within the chip's limit."""

import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from rocm.kernels import FP8, LAYOUTS, lower

from tilelang_ext.rocm import compile_hip

E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ = FP8
LDS_BYTES = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}
WAVE = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
_KERNEL = re.compile(r"(__global__ void __launch_bounds__\(\d+\)) \w+\(")
MATRIX = re.compile(r"^\s+(v_(?:mfma|wmma|swmmac)_\w+)\s", re.MULTILINE)
BF16_GFX90A = "v_mfma_f32_16x16x16bf16_1k"

# (A, B): what the assembly of each architecture must hold, and nothing else.
GEMM = {
    (E4M3, E4M3): {
        "gfx90a": BF16_GFX90A,
        "gfx942": "v_mfma_f32_16x16x16_f16",
        "gfx950": "v_mfma_scale_f32_16x16x128_f8f6f4",
        "gfx1100": "v_wmma_f32_16x16x16_f16",
        "gfx1201": "v_wmma_f32_16x16x16_fp8_fp8",
    },
    (E5M2, E4M3): {
        "gfx90a": BF16_GFX90A,
        "gfx942": "v_mfma_f32_16x16x16_f16",
        "gfx950": "v_mfma_scale_f32_16x16x128_f8f6f4",
        "gfx1100": "v_wmma_f32_16x16x16_f16",
        "gfx1201": "v_wmma_f32_16x16x16_bf8_fp8",
    },
    (E4M3_FNUZ, E5M2_FNUZ): {
        "gfx90a": BF16_GFX90A,
        "gfx942": "v_mfma_f32_16x16x32_bf8_fp8",  # B first
        "gfx950": "v_mfma_f32_16x16x32_f16",
        "gfx1100": "v_wmma_f32_16x16x16_f16",
        "gfx1201": "v_wmma_f32_16x16x16_f16",
    },
    ("float16", "float16"): {
        "gfx90a": "v_mfma_f32_16x16x16f16",
        "gfx942": "v_mfma_f32_16x16x16_f16",
        "gfx950": "v_mfma_f32_16x16x32_f16",
        "gfx1100": "v_wmma_f32_16x16x16_f16",
        "gfx1201": "v_wmma_f32_16x16x16_f16",
    },
    ("bfloat16", "bfloat16"): {
        "gfx90a": BF16_GFX90A,
        "gfx942": "v_mfma_f32_16x16x16_bf16",
        "gfx950": "v_mfma_f32_16x16x32_bf16",
        "gfx1100": "v_wmma_f32_16x16x16_bf16",
        "gfx1201": "v_wmma_f32_16x16x16_bf16",
    },
}
SCALED = dict.fromkeys(LAYOUTS, GEMM[E4M3, E4M3])  # of T.fp8_scaled_matmul in E4M3
MOE = GEMM["bfloat16", "bfloat16"]  # of the mixture of experts, whose tiles are decoded


class Gated(NamedTuple):
    """What goes through the gate: a text with one kernel, the LDS that its launch adds, and what its assembly must hold.

    `instruction` is all that it multiplies by; None is for a kernel without the matrix unit. `tiles` is how many 16x16 tiles of
    the result a wave has, of which each gets the same number of products.
    """

    text: str
    lds_bytes: int
    instruction: str | None
    tiles: int = 1


def gate(kernels: dict[str, Gated], arch: str) -> None:
    """Compile kernels, each under its own name, in one run: most of the compiler's time is for the headers they share."""
    texts = [_KERNEL.sub(rf"\1 {name}(", kernel.text) for name, kernel in kernels.items()]
    compiled = compile_hip("\n".join(texts), arch)
    assert compiled.code.startswith(b"\x7fELF")
    assert [resources.name for resources in compiled.kernels] == list(kernels)
    for resources, (name, kernel) in zip(compiled.kernels, kernels.items(), strict=True):
        (isa,) = re.findall(rf"^{name}:.*?^\.Lfunc_end", compiled.isa, re.MULTILINE | re.DOTALL)
        alone = replace(compiled, isa=isa)
        found = Counter(MATRIX.findall(isa))
        assert set(found) == ({kernel.instruction} if kernel.instruction else set()), name
        assert all(alone.count(each) == count and count % kernel.tiles == 0 for each, count in found.items()), (name, found)
        assert (resources.vgpr_spills, resources.sgpr_spills, resources.scratch_bytes) == (0, 0, 0), resources
        assert resources.wave == WAVE[arch], name
        assert 0 < resources.vgprs <= (512 if WAVE[arch] == 64 else 256), resources
        assert resources.lds_bytes + kernel.lds_bytes <= LDS_BYTES[arch], resources


def gated(kernel, arch, instruction, tiles):
    """Lower a kernel for the gate."""
    lowered = lower(kernel, arch)
    return Gated(lowered.source, lowered.dynamic_lds, instruction, tiles)
