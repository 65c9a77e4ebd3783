"""The compile gate: T.gemm and T.fp8_scaled_matmul through the real compiler for every architecture, with their instructions
counted, no spills, and LDS within the chip's limit."""

import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
from rocm.kernels import ARCHS, FP8, LAYOUTS, attention_products, gemm, lower, scaled_matmul

from tilelang_ext.rocm import CompileError, compile_hip

pytestmark = pytest.mark.hip

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
    return Gated(lowered.text, lowered.lds_bytes, instruction, tiles)


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm(arch):
    tiles = 4 * 4 // (128 // WAVE[arch])
    gate({"_".join(pair): gated(gemm(*pair), arch, names[arch], tiles) for pair, names in GEMM.items()}, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_fp8_scaled_matmul(arch):
    tiles = 2 * 4 // (128 // WAVE[arch])
    gate({layout: gated(scaled_matmul(layout), arch, SCALED[layout][arch], tiles) for layout in LAYOUTS}, arch)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_chained_products(arch):
    """The operand of the second product comes from registers."""
    instruction = {"gfx942": "v_mfma_f32_16x16x32_fp8_fp8", "gfx950": "v_mfma_f32_16x16x32_f16"}[arch]
    gate({"attention": gated(attention_products(E4M3_FNUZ), arch, instruction, tiles=4 * 4 // 2)}, arch)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_operands_that_do_not_lie_along_k_or_are_registers(arch):
    kernels = {"not_along_k": {"trans_A": True, "trans_B": False}, "registers": {"A_scope": "fragment"}}
    instruction, tiles = GEMM[E4M3, E4M3][arch], 4 * 4 // (128 // WAVE[arch])
    gate({name: gated(gemm(E4M3, E4M3, **options), arch, instruction, tiles) for name, options in kernels.items()}, arch)


def test_figures():
    """A kernel that keeps too much in registers spills, and its static LDS is counted."""
    source = """#include <hip/hip_runtime.h>
extern "C" __global__ void __launch_bounds__(1024) heavy(float* p) {
  __shared__ float tile[256];
  float v[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) v[i] = p[i * 1024 + threadIdx.x];
  tile[threadIdx.x % 256] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 300; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[299 - i] + tile[i % 256];
}
extern "C" __global__ void light(float* p) { p[threadIdx.x] = exp2f(p[threadIdx.x]); }
"""
    heavy, light = compile_hip(source, "gfx942").kernels
    assert (heavy.name, light.name) == ("heavy", "light")
    assert heavy.vgpr_spills > 0
    assert heavy.scratch_bytes > 0
    assert heavy.lds_bytes == 1024
    assert (light.vgpr_spills, light.scratch_bytes, light.lds_bytes) == (0, 0, 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_device_libraries_link(arch):
    """What a launch's extents and functions of the math library ask of ROCm's libraries beyond those that triton has."""
    source = """#include <hip/hip_runtime.h>
extern "C" __global__ void kernel(float* p) {
  const float x = p[threadIdx.x];
  p[threadIdx.x] = powf(x, 3.0f) + logf(x) + tanhf(x) + sqrtf(x) + sinf(x) + fmodf(x, 3.0f) + gridDim.x * blockDim.x;
}
"""
    (kernel,) = compile_hip(source, arch).kernels
    assert kernel.wave == WAVE[arch]


def test_an_error_has_the_compilers_message():
    with pytest.raises(CompileError, match=r"must compile for gfx942; got errors of .*\n(.|\n)*kernel.hip:1:.*nothing_known"):
        compile_hip("int a = nothing_known;", "gfx942")


def test_an_instruction_that_the_chip_lacks_is_an_error():
    """Why the choice is ours: the compiler refuses fp8 products on gfx90a."""
    text = lower(gemm(E4M3_FNUZ, E4M3_FNUZ), "gfx942").text
    with pytest.raises(CompileError, match=r"__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8.*needs target feature"):
        compile_hip(text, "gfx90a")
