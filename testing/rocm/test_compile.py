"""The compile gate: T.gemm and T.fp8_scaled_matmul through the real compiler for every architecture, with their instructions
counted, no spills, and LDS within the chip's limit."""

import functools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from rocm.gates import E4M3, E4M3_FNUZ, GEMM, SCALED, WAVE, gate, gated
from rocm.kernels import ARCHS, SCALED_LAYOUTS, SCALED_SIZE, attention_products, gemm, lower, scaled_matmul

from tilelang_ext.rocm import CompileError, compile, compile_hip, find_compiler

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import gemm_blockscaled as example

pytestmark = pytest.mark.hip


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm(arch):
    tiles = 4 * 4 // (128 // WAVE[arch])
    gate({"_".join(pair): gated(gemm(*pair), arch, names[arch], tiles) for pair, names in GEMM.items()}, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_fp8_scaled_matmul(arch):
    tiles = 2 * 4 // (128 // WAVE[arch])
    kernels = {layout: scaled_matmul(layout, **SCALED_SIZE) for chip, layout in SCALED_LAYOUTS if chip == arch}
    texts = {layout: gated(kernel, arch, SCALED[layout][arch], tiles) for layout, kernel in kernels.items()}
    if arch in ("gfx950", "gfx1100"):  # T.gemm_blockscaled: MMAs that take scales, and the chip that spills first
        kernel = example.matmul(64, 64, 256, block_M=64, block_N=64, block_K=128)
        texts["gemm_blockscaled"] = gated(kernel, arch, SCALED["e8m0"][arch], 4 * 4 // (128 // WAVE[arch]))
    gate(texts, arch)


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


def test_header_is_compiled_once(monkeypatch):
    """The second text compiles the header alone, those that follow read it, and code does not depend on that."""
    commands, run = [], compile._run

    def noted(command, files, folder, arch):
        commands.append((*command, *files))
        return run(command, files, folder, arch)

    monkeypatch.setattr(compile, "_run", noted)
    monkeypatch.setattr(compile, "_met", Counter())
    monkeypatch.setattr(compile, "_header", functools.cache(compile._header.__wrapped__))
    source = """#include <hip/hip_runtime.h>
#include <stdint.h>

extern "C" __global__ void store(uint32_t* p) { p[threadIdx.x] = COUNT; }
"""
    compiled = [compile_hip(source.replace("COUNT", count), "gfx90a") for count in ("7", "9", "7")]
    assert ["-include-pch" in command for command in commands if "kernel.hip" in command] == [False, True, True]
    assert sum("-emit-pch" in command for command in commands) == 1
    first, second, third = (re.sub("__hip_cuid_[0-9a-f]+", "", each.isa) for each in compiled)
    assert first == third != second
    assert compiled[0].kernels == compiled[2].kernels
    # Generated texts begin with definitions; of a name that HIP may read the header depends.
    ours, others = "#ifndef TL_X  // why\n#define TL_X(...) 1\n#endif\n#ifndef TILELANG_EXT_Y\n", "#define HIP_X 1\n"
    commands.clear()
    assert compile_hip(f"{ours}{source}#endif\n".replace("COUNT", "7"), "gfx90a").kernels == compiled[0].kernels
    assert compile_hip(others + source.replace("COUNT", "7"), "gfx90a").kernels == compiled[0].kernels
    assert ["-include-pch" in command for command in commands if "kernel.hip" in command] == [True, False]
    # A header that does not fit is passed over.
    folder = compile._header(find_compiler(), "gfx90a", source[: source.index("#include <stdint")])
    Path(folder.name, "header.pch").write_bytes(b"")
    assert re.sub("__hip_cuid_[0-9a-f]+", "", compile_hip(source.replace("COUNT", "7"), "gfx90a").isa) == first


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
    lines = r"(?m)must compile for gfx942; got errors of .*\n(.*\n)*^kernel.hip:1:9: error: .*'nothing_known'$"
    with pytest.raises(CompileError, match=lines):
        compile_hip("int a = nothing_known;", "gfx942")


def test_an_instruction_that_the_chip_lacks_is_an_error():
    """Why the choice is ours: the compiler refuses fp8 products on gfx90a."""
    text = lower(gemm(E4M3_FNUZ, E4M3_FNUZ), "gfx942").source
    with pytest.raises(CompileError, match=r"__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8.*needs target feature"):
        compile_hip(text, "gfx90a")
