"""HIP: bad input ends in one clear error, and a kernel that dies or hangs harms nobody."""

import numpy as np
import pytest
import torch
from simulator.hip_kernels import gemm, operands
from simulator.hip_texts import EXCHANGE, GEMM, HEADER, TEMPLATES, run, run_exchange, run_gemm
from simulator.kernels import line_of, plant

from tilelang_ext import simulate
from tilelang_ext.rocm import program
from tilelang_ext.simulator import CompileError, CrashError, TimeLimitError, execute_hip, execute_msl

KERNEL = 'extern "C" __global__ void f(float* y, int n) { %s }\n'


def run_body(body, **options):
    y = np.zeros(64, np.float32)
    return run(HEADER + KERNEL % body, "f", [y, 64], **options), y


def test_compile_error_names_the_line_of_the_text():
    source = plant(GEMM, "half_x4 a[2]", "half_x5 a[2]")
    with pytest.raises(CompileError, match=rf"kernel\.hip:{line_of(source, 'half_x5')}:\d+: error: .*half_x5"):
        run_gemm(source)


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"arch: must be one of gfx90a, .*; got 'gfx803'; pass one of these"):
        run_exchange(arch="gfx803")


def test_unknown_entry():
    with pytest.raises(CompileError, match="entry: must name a kernel of the source; got 'g'; the source defines: exchange"):
        run(EXCHANGE, "g", [np.zeros(64, np.int32)])


def test_too_few_arguments():
    with pytest.raises(ValueError, match="arguments: one for each of A, B, C, K is needed; got 1; pass them in order"):
        run(GEMM, "gemm", [np.zeros(1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1, 64], r"arguments\[0\]: y must be a tensor or array; got int; convert it"),
        ([np.zeros(1), np.zeros(1)], r"arguments\[1\]: n must be a number; got ndarray; convert it"),
    ],
)
def test_wrong_kind_of_argument(arguments, message):
    with pytest.raises(TypeError, match=message):
        run(HEADER + KERNEL % "", "f", arguments)


def test_too_many_threads():
    with pytest.raises(ValueError, match="threads: at most 1024 per threadgroup; got"):
        run(EXCHANGE, "exchange", [np.zeros(64, np.int32)], threads=2048)


def test_assembly_that_is_not_simulated():
    with pytest.raises(CompileError, match=r"kernel\.hip:\d+:\d+: error: .*asm_v_add_f32"):
        run_body('asm volatile("v_add_f32 v0, v1, v2" ::: "memory");')
    with pytest.raises(CompileError, match="inline assembly with outputs is not simulated; got `v_exp_f32 %0, %1`"):
        run_body('float x; asm volatile("v_exp_f32 %0, %1" : "=v"(x) : "v"(y[0]));')


def test_unknown_builtin():
    with pytest.raises(CompileError, match="__builtin_amdgcn_not_one"):
        run_body("__builtin_amdgcn_not_one();")


def test_numbers_have_the_type_of_their_parameter():
    source = HEADER + (
        'extern "C" __global__ void f(double* y, int i, float x, unsigned long u, _Float16 h, bool b) {\n'
        "  y[0] = i; y[1] = x; y[2] = u; y[3] = h; y[4] = b;\n}\n"
    )
    y = np.zeros(5)
    run(source, "f", [y, -7, 0.25, 1 << 40, 1.5, True], threads=1)
    assert y.tolist() == [-7, 0.25, 1 << 40, 1.5, 1]


def test_time_limit():
    with pytest.raises(TimeLimitError, match=r"got no end after 0\.3 s"):
        run_body("while (y[0] == 0.0f) __builtin_amdgcn_wave_barrier();", timeout=0.3)


def test_crash():
    with pytest.raises(CrashError, match="kernel: must run to its end; got SIGSEGV"):
        run_body("*(volatile int*)16 = 1;")


def test_targets_of_simulate():
    kernel = gemm(64, 64, 32, "float16")
    a, b, _, _ = operands(64, 64, 32, "float16")
    results = []
    for target in ("hip -mcpu=gfx942", {"kind": "hip", "mcpu": "gfx942"}, program.hip_target("hip -mcpu=gfx942")):
        c = torch.full((64, 64), torch.nan)
        report = simulate(kernel, a, b, c, target=target)
        assert report.instructions == {"mfma_f32_16x16x16f16": 32}
        results.append(c)
    lowered = program.lower(kernel, "hip -mcpu=gfx942")
    c = torch.full((64, 64), torch.nan)
    simulate(lowered, a, b, c)
    assert all(torch.equal(c, result) for result in results)
    assert "__builtin_amdgcn_mfma" in lowered.get_kernel_source()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hip", r'hip_target: must name an architecture; got hip; pass "hip -mcpu=gfx942", or another mcpu'),
        ({"kind": "hip"}, r"arch: must be one of .*; got 'gfx900'"),  # TVM's own default
    ],
)
def test_target_without_an_architecture(target, message):
    with pytest.raises(ValueError, match=message):
        simulate(gemm(64, 64, 32, "float16"), *operands(64, 64, 32, "float16")[:3], target=target)


def test_wrong_tensor():
    a, b, c, _ = operands(64, 64, 32, "float16")
    with pytest.raises(TypeError, match=r"A must be torch\.float16; got torch\.float32"):
        simulate(gemm(64, 64, 32, "float16"), a.float(), b, c, target="hip -mcpu=gfx942")


def test_dialects_do_not_mix():
    with pytest.raises(CompileError):
        execute_msl(EXCHANGE, "exchange", [np.zeros(64)], grid=(1, 1, 1), threads=(64, 1, 1), include_directories=(TEMPLATES,))
    with pytest.raises(CompileError, match="the source defines: none"):
        execute_hip("kernel void f() {}", "f", [], arch="gfx942", grid=(1, 1, 1), threads=(64, 1, 1))
