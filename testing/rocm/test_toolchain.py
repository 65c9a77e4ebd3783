"""Finding a HIP compiler: which one is taken, and what is said when a part is missing. Made of fake commands."""

import os
import stat

import pytest

from tilelang_ext import rocm
from tilelang_ext.rocm import CompilerMissingError, toolchain


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with no compiler, to which `add` puts commands; AMD's folder is `amd`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setattr(toolchain, "_ROCM_HIPCC", str(tmp_path / "opt" / "rocm" / "bin" / "hipcc"))
    monkeypatch.setattr(toolchain, "_amd_directory", lambda: tmp_path / "amd")
    toolchain.find_compiler.cache_clear()

    def add(name, version, linker=None):
        path = commands / name
        path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "{version}";; *) echo "{linker or "ld.lld"}";; esac\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    yield add
    toolchain.find_compiler.cache_clear()


def test_hipcc_comes_first(machine):
    hipcc = machine("hipcc", "HIP version: 7.1.25424")
    machine("clang++-22", "clang version 22.1.8", linker=machine("ld.lld", "LLD"))
    found = rocm.find_compiler()
    assert found.command == (hipcc,)
    assert found.version == "HIP version: 7.1.25424"


def test_newest_clang_with_its_linker(machine, tmp_path):
    lld = machine("ld.lld-22", "LLD")
    machine("clang++-23", "clang version 23.1.0")
    machine("clang++-20", "clang version 20.1.0", linker=lld)
    clang = machine("clang++-22", "Debian clang version 22.1.8", linker=lld)
    found = rocm.find_compiler()
    assert found.command[0] == clang
    assert "-nogpulib" in found.command
    assert f"-I{tmp_path / 'amd' / 'include'}" in found.command
    assert str(tmp_path / "amd" / "lib" / "ocml.bc") in found.command


@pytest.mark.parametrize(
    ("version", "linker", "found"),
    [
        (None, None, "got none on PATH"),
        ("clang version 19.1.7", "lld", "got clang version 19.1.7 on PATH"),
        ("Apple clang version 21.0.0", "lld", "got Apple clang version 21.0.0 on PATH"),
        ("clang version 22.1.8", None, "got clang version 22.1.8 without ld.lld on PATH"),
    ],
)
def test_no_compiler_says_what_is_there_and_how_to_get_one(machine, version, linker, found):
    if version:
        machine("clang++", version, linker=linker and machine("ld.lld-22", "LLD"))
    with pytest.raises(CompilerMissingError) as error:
        rocm.find_compiler()
    assert found in str(error.value)
    assert str(error.value).endswith("; `apt-get install clang-22 lld-22` (Debian) and `pip install triton`, or install ROCm")


def unpack(folder, *, without=None):
    for part in ("lib/ocml.bc", "lib/ockl.bc", "include/hip/hip_runtime.h"):
        if part != without:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).touch()
    return folder


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment with a triton, whose folder is returned."""

    class Spec:
        origin = str(tmp_path / "triton" / "__init__.py")

    monkeypatch.setattr(toolchain.sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: Spec)
    return tmp_path / "triton" / "backends" / "amd"


def test_an_installed_triton_comes_first(environment, tmp_path):
    unpack(tmp_path / "venv/share/tilelang_ext/amd")
    unpack(environment)
    assert toolchain._amd_directory() == environment


@pytest.mark.parametrize("part", ["lib/ocml.bc", "lib/ockl.bc", "include/hip/hip_runtime.h"])
def test_what_make_hip_unpacked_is_found_beside_half_a_triton(part, environment, tmp_path):
    unpack(environment, without=part)
    unpacked = unpack(tmp_path / "venv/share/tilelang_ext/amd")
    assert toolchain._amd_directory() == unpacked


def test_no_triton(environment, monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    message = r"device libraries of the triton wheel; got none in .*/venv/share/tilelang_ext/amd; .pip install triton., or"
    with pytest.raises(CompilerMissingError, match=message):
        toolchain._amd_directory()


@pytest.mark.parametrize("arch", ["sm_90", "gfx942 -o /tmp/x", "-gfx942", "gfx942:xnack+", ""])
def test_an_architecture_is_a_name(arch):
    with pytest.raises(ValueError, match="arch must be the name of an AMD architecture; got"):
        rocm.compile_hip("", arch)


def test_stand_in_headers_are_found():
    assert (toolchain.include_directory() / "rocwmma" / "rocwmma.hpp").is_file()
    assert os.path.isabs(toolchain.include_directory())
