"""Bad input ends in one clear error: name, rule, what was got, what to do."""

import time

import numpy as np
import pytest
import torch
from simulator.kernels import line_of, plant

from simulator import kernels
from tilelang_ext import simulate
from tilelang_ext.simulator import (
    CompileError,
    CompilerMissingError,
    CrashError,
    SimulatorError,
    TimeLimitError,
    execute_msl,
    find_compiler,
    toolchain,
)


def run(source, *arguments, entry="f", grid=(1, 1, 1), threads=(32, 1, 1), **options):
    return execute_msl(kernels.HEADER + source, entry, arguments, grid=grid, threads=threads, **options)


def test_compile_error_names_the_line_of_the_text():
    source = plant(kernels.GEMM, "simdgroup_load(a[i]", "simdgroup_lode(a[i]")
    with pytest.raises(CompileError, match=rf"kernel\.metal:{line_of(source, 'simdgroup_lode')}:\d+: error: .*simdgroup_lode"):
        kernels.run_gemm(source)


def test_store_of_another_type_is_refused():
    source = "kernel void f(device half* y [[buffer(0)]]) { simdgroup_matrix<float, 8, 8> m; simdgroup_store(m, y, 8); }"
    with pytest.raises(CompileError, match="simdgroup_store: matrix and memory have the same element type"):
        run(source, np.zeros(64, np.float16))


def test_unknown_entry():
    with pytest.raises(CompileError, match="entry: must name a kernel of the source; got 'g'; the source defines: f"):
        run("kernel void f() {}", entry="g")


def test_unbalanced_text():
    with pytest.raises(SimulatorError):
        run("kernel void f(device int* x [[buffer(0)]] { ")


def test_missing_arguments():
    with pytest.raises(ValueError, match=r"arguments: one for each \[\[buffer\(i\)\]\] is needed; got 1 for 3"):
        execute_msl(kernels.GEMM, "gemm", [np.zeros(1)], grid=(1, 1, 1), threads=(128, 1, 1))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ([1.0, 2.0], r"arguments\[0\]: must be a torch CPU tensor, a numpy array or bytes; got list"),
        (b"1234", r"arguments\[0\]: a buffer that the kernel writes needs an array; got bytes"),
        (torch.zeros(1, device="meta"), r"arguments\[0\]: must be a CPU tensor; got device meta"),
    ],
)
def test_wrong_argument(argument, message):
    with pytest.raises(TypeError, match=message):
        run("kernel void f(device float* y [[buffer(0)]]) { y[0] = 1; }", argument)


@pytest.mark.parametrize(("name", "shape"), [("grid", (-1, 1, 1)), ("threads", (32, 1)), ("threads", (2048, 1, 1))])
def test_wrong_launch_shape(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: "):
        run("kernel void f() {}", **{name: shape})


@pytest.mark.parametrize("workers", [1, 2])
def test_time_limit(workers):
    source = (
        "kernel void f(device atomic_int* y [[buffer(0)]]) { while (atomic_load_explicit(y, memory_order_relaxed) == 0) {} }"
    )
    run(source, np.ones(1, np.int32))
    start = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"timeout: the kernel must end within it; got no end after 0\.5 s"):
        run(source, np.zeros(1, np.int32), timeout=0.5, workers=workers, grid=(4, 1, 1))
    assert time.monotonic() - start < 3


def test_wild_pointer_dies_with_its_finding():
    source = "kernel void f(device int* y [[buffer(0)]]) {\n  y[0] = 1;\n  y[1 << 29] = 2;  // wild\n}"
    y = np.zeros(4, np.int32)
    with pytest.raises(CrashError, match=r"^kernel: must run to its end; got .*SIGSEGV") as caught:
        run(source, y)
    (finding,) = caught.value.report.findings
    assert finding.kind == "out of bounds"
    assert "// wild" in finding.text


def test_private_memory_past_the_stack():
    source = (
        "kernel void f(device int* y [[buffer(0)]]) { int big[1 << 20];"
        " for (int i = 0; i < 1 << 20; ++i) big[i] = y[0]; y[0] = big[y[1]]; }"
    )
    with pytest.raises(CrashError):
        run(source, np.zeros(4, np.int32), check=False)


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    find_compiler.cache_clear()
    with pytest.raises(CompilerMissingError, match=r"`pip install ziglang` or `apt-get install clang-19`"):
        find_compiler()
    find_compiler.cache_clear()


def test_alignas_between_address_space_and_type():
    """No C++ takes an attribute list there, Metal's neither, though the text that runs here would not notice."""
    source = (
        "kernel void f(device half* a [[buffer(0)]]) {\n"
        "  threadgroup alignas(16) half s[8];\n  s[0] = a[0];\n  a[0] = s[0];\n}\n"
    )
    with pytest.raises(CompileError, match=r"alignas must stand before the address space; got `threadgroup alignas"):
        execute_msl(source, "f", [torch.zeros(8, dtype=torch.float16)], grid=(1, 1, 1), threads=(1, 1, 1))


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("cuda", "; or run a CUDA kernel on an NVIDIA GPU"),
        ("c", '; or run a kernel for the CPU with tilelang.compile(kernel, target="c")'),
        ({"kind": "vulkan"}, ""),
        ("", ""),
    ],
)
def test_a_target_without_simulator_names_those_that_have_one(target, advice):
    with pytest.raises(ValueError, match="simulate: target must be") as raised:
        simulate(None, target=target)
    start = 'simulate: target must be "metal", "metal4" or "hip -mcpu=" with one of gfx90a, gfx940, '
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(f"got {target!r}; pass one of these{advice}")


def test_the_newest_compiler_is_taken(tmp_path, monkeypatch):
    for version in (toolchain.MINIMUM_CLANG - 1, toolchain.MINIMUM_CLANG, toolchain.MINIMUM_CLANG + 2):
        script = tmp_path / f"clang++-{version}"
        script.write_text(f"#!/bin/sh\necho Debian clang version {version}.1.0\n")
        script.chmod(0o755)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None)
    assert find_compiler.__wrapped__().command == (str(tmp_path / f"clang++-{toolchain.MINIMUM_CLANG + 2}"),)
