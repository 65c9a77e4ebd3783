"""`tilelang-ext doctor`: names what is missing, what that disables and the fix, and speaks when the package cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tilelang_ext_cli
from tilelang_ext_cli import doctor

ROOT = Path(__file__).resolve().parents[1]


def by_name(checks):
    return {check.name: check for check in checks}


def test_healthy(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert tilelang_ext_cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for part in ("tilelang", "torch", "apache-tvm-ffi", "native library", "simulator", "nvcc", "CUDA", "ROCm", "MPS"):
        assert part in output
    assert "MISSING" not in output


def test_every_absent_part_says_what_it_disables_and_a_fix(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda command: None)
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    absent = [check for check in doctor.diagnose() if not check.ok]
    assert {"tilelang", "torch", "nvcc", "hipcc or clang"} <= set(by_name(absent))
    for check in absent:
        assert check.disables
        assert check.fix


def test_missing_tilelang(monkeypatch, capsys):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tilelang" else version(name))
    assert tilelang_ext_cli.main(["doctor"]) == 1
    assert "pip install tilelang==0.1.15" in capsys.readouterr().out


def test_missing_compiler_of_the_simulator(monkeypatch):
    simulator = doctor._module_at("_tilelang_ext_simulator_test", doctor.PACKAGE / "simulator" / "__init__.py")

    def find_compiler():
        raise simulator.CompilerMissingError("compiler: the simulator needs clang >= 16; got none; run `pip install ziglang`")

    monkeypatch.setattr(simulator, "find_compiler", find_compiler)
    monkeypatch.setattr(doctor, "_module_at", lambda name, path: simulator)
    check = by_name(doctor._compilers())["simulator"]
    assert (check.ok, check.required) == (False, True)
    assert check.found == "compiler: the simulator needs clang >= 16; got none"
    assert check.fix == "pip install ziglang==0.15.2"


def test_missing_compiler_for_amd(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda command: None)
    check = by_name(doctor._compilers())["hipcc or clang"]
    assert (check.ok, check.required) == (False, False)
    assert check.found == "rocm.find_compiler: needs ROCm's hipcc or clang >= 20 with its ld.lld; got none on PATH"
    assert check.fix == "`apt-get install clang-22 lld-22` (Debian) and `pip install triton`, or install ROCm"


def test_clang_without_headers_for_amd(monkeypatch, tmp_path):
    """A clang alone does not compile HIP: its headers come with the triton wheel."""
    for name in ("clang++-22", "ld.lld"):
        (tmp_path / name).write_text(f"#!/bin/sh\n[ $1 = --version ] && echo clang version 22.1.8 || echo {tmp_path}/ld.lld\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # what `make hip` unpacked is not there either
    check = doctor._amd_compiler()
    assert not check.ok
    assert "needs the HIP headers and device libraries of the triton wheel; got none in " in check.found
    assert check.fix == "`pip install triton`, or `make hip` in a checkout"


@pytest.mark.parametrize(("built_for", "fix"), [(None, "install a CUDA build of torch"), ("12.0", "update the NVIDIA driver")])
def test_gpu_that_torch_cannot_use(monkeypatch, built_for, fix):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(doctor, "_first_line", lambda command, *_: "GPU 0: Example" if command == "nvidia-smi" else None)
    check = doctor._cuda(torch)
    assert not check.ok
    assert "GPU 0: Example" in check.found
    assert check.fix.startswith(fix)


@pytest.fixture
def checkout_without_library(tmp_path):
    for name in ("tilelang_ext", "tilelang_ext_cli", "src/simulator"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return tmp_path


def test_speaks_when_the_package_cannot_be_imported(checkout_without_library):
    """In a process of its own, where nothing is imported yet: no library, then the exit code says so."""
    environment = {**os.environ, "PYTHONPATH": str(checkout_without_library), "COLUMNS": "300"}
    # An editable installation finds the package before PYTHONPATH does.
    start = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
    command = [sys.executable, "-c", start + "import tilelang_ext_cli; sys.exit(tilelang_ext_cli.main(['doctor']))"]
    done = subprocess.run(command, cwd=checkout_without_library, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "tilelang_ext native library: must be built for tilelang 0.1." in done.stdout
    assert "MISSING native library; disables everything" in done.stdout
    assert "pip install --no-build-isolation -e ." in done.stdout


def test_plain_text_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.show([doctor.Check("package", "part", "not there", False, True, "everything", "get it")])
    output = capsys.readouterr().out
    assert " ".join(output.split()) == "MISSING package part not there MISSING part; disables everything get it"
