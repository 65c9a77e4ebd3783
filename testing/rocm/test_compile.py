"""The compile gate: T.gemm and T.fp8_scaled_matmul through the real compiler for every architecture, with their instructions
counted, no spills, and LDS within the chip's limit."""

import re
from collections import Counter

import pytest
from rocm.kernels import ARCHS, FP8, LAYOUTS, attention_products, gemm, lower, scaled_matmul

from tilelang_ext.rocm import CompileError, compile_hip

pytestmark = pytest.mark.hip

E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ = FP8
LDS_BYTES = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}
WAVE = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
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


def gate(text, lds_bytes, arch, instruction, tiles):
    """Compile; `tiles` is how many 16x16 tiles of the result a wave has, of which each gets the same number of products.

    `instruction` None is for a kernel without the matrix unit. `lds_bytes` is what the launch adds.
    """
    compiled = compile_hip(text, arch)
    found = Counter(MATRIX.findall(compiled.isa))
    assert set(found) == ({instruction} if instruction else set())
    assert all(compiled.count(name) == count and count % tiles == 0 for name, count in found.items())
    (resources,) = compiled.kernels
    assert (resources.vgpr_spills, resources.sgpr_spills, resources.scratch_bytes) == (0, 0, 0), resources
    assert resources.wave == WAVE[arch]
    assert 0 < resources.vgprs <= (512 if WAVE[arch] == 64 else 256)
    assert resources.lds_bytes + lds_bytes <= LDS_BYTES[arch]
    assert compiled.code.startswith(b"\x7fELF")
    return compiled


def check(kernel, arch, instruction, tiles):
    """Lower a kernel and pass it through the gate."""
    lowered = lower(kernel, arch)
    return gate(lowered.text, lowered.lds_bytes, arch, instruction, tiles)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("operands", GEMM, ids="-".join)
def test_gemm(operands, arch):
    waves = 128 // WAVE[arch]
    check(gemm(*operands), arch, GEMM[operands][arch], tiles=4 * 4 // waves)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_scaled_matmul(layout, arch):
    waves = 128 // WAVE[arch]
    check(scaled_matmul(layout), arch, SCALED[layout][arch], tiles=2 * 4 // waves)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_chained_products(arch):
    """The operand of the second product comes from registers."""
    instruction = {"gfx942": "v_mfma_f32_16x16x32_fp8_fp8", "gfx950": "v_mfma_f32_16x16x32_f16"}[arch]
    check(attention_products(E4M3_FNUZ), arch, instruction, tiles=4 * 4 // 2)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
@pytest.mark.parametrize(("trans_A", "trans_B", "A_scope"), [(True, False, "shared"), (False, True, "fragment")])
def test_operands_that_do_not_lie_along_k_or_are_registers(trans_A, trans_B, A_scope, arch):
    kernel = gemm(E4M3, E4M3, trans_A=trans_A, trans_B=trans_B, A_scope=A_scope)
    check(kernel, arch, GEMM[E4M3, E4M3][arch], tiles=4 * 4 // (128 // WAVE[arch]))


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
