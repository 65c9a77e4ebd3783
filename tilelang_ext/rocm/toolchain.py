"""Find the HIP compiler: ROCm's hipcc, else a clang with the AMD headers and device libraries of the triton wheel.

Standard library only: `tilelang-ext doctor` loads this file by itself.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM_CLANG = 20  # the first that knows gfx950 and gfx12
ADVICE = "`apt-get install clang-22 lld-22` (Debian) and `pip install triton`, or install ROCm"
_ROCM_HIPCC = "/opt/rocm/bin/hipcc"
_PROBE_SECONDS = 20
CODE_OBJECT_VERSION = "-mcode-object-version=6"


class CompilerMissingError(RuntimeError):
    """No compiler for AMD GPUs, or a part of it is missing; the message says which and how to get it."""


@dataclass(frozen=True)
class Compiler:
    """A driver that compiles HIP: the start of its command line, its version, and whether it is a clang, no hipcc."""

    command: tuple[str, ...]
    version: str
    is_clang: bool = True


def include_directory() -> Path:
    """Return the folder of stand-ins for headers that the triton wheel lacks, in an installation or a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "include", here.parents[1] / "src" / "rocm" / "include"):
        if (folder / "hip" / "hip_fp16.h").is_file():
            return folder
    raise CompilerMissingError(f"tilelang_ext.rocm: its headers must be installed; got none in {here / 'include'}; reinstall")


@functools.cache
def find_compiler() -> Compiler:
    """Return hipcc if ROCm is installed, else the newest clang >= 20 that has its ld.lld, with triton's AMD headers.

    Raises CompilerMissingError, which names what was found, what is missing and how to install it.
    """
    if hipcc := shutil.which("hipcc") or shutil.which(_ROCM_HIPCC):
        version = _output(hipcc, "--version")
        if match := re.search(r"HIP version.*", version):
            return Compiler((hipcc,), match[0], is_clang=False)
    clang, version = _find_clang()
    amd = _amd_directory()
    device_libraries = [
        argument
        for name in ("ocml.bc", "ockl.bc")
        for argument in ("-Xclang", "-mlink-builtin-bitcode", "-Xclang", str(amd / "lib" / name))
    ]
    command = (
        clang, "-fuse-ld=lld", "-nogpulib", "-nogpuinc", CODE_OBJECT_VERSION, "-include", "__clang_hip_runtime_wrapper.h",
        "-include", "oclc_controls.h", "-D__HIP_PLATFORM_AMD__",
        f"-I{include_directory()}", f"-I{amd / 'include'}", *device_libraries,
    )  # fmt: skip
    return Compiler(command, version)


def _find_clang() -> tuple[str, str]:
    seen = []
    for name in (*(f"clang++-{version}" for version in range(30, MINIMUM_CLANG - 1, -1)), "clang++"):
        path = shutil.which(name)
        if path is None:
            continue
        version = _output(path, "--version").partition("\n")[0]
        major = re.search(r"version (\d+)", version)
        if "Apple" in version or not major or int(major[1]) < MINIMUM_CLANG:
            seen.append(version)
        elif shutil.which(_output(path, "-print-prog-name=ld.lld").strip()) is None:
            seen.append(f"{version} without ld.lld")
        else:
            return path, version
    raise CompilerMissingError(
        f"rocm.find_compiler: needs ROCm's hipcc or clang >= {MINIMUM_CLANG} with its ld.lld; got {', '.join(seen) or 'none'} "
        f"on PATH; {ADVICE}"
    )


def _amd_directory() -> Path:
    """Return the AMD folder of the triton wheel: that of an installed triton (not imported), or what `make hip` unpacked."""
    spec = importlib.util.find_spec("triton")
    unpacked = Path(sys.prefix) / "share" / "tilelang_ext" / "amd"
    folders = ([Path(spec.origin).parent / "backends" / "amd"] if spec and spec.origin else []) + [unpacked]
    for folder in folders:
        if all((folder / part).exists() for part in ("lib/ocml.bc", "lib/ockl.bc", "include/hip/hip_runtime.h")):
            return folder
    raise CompilerMissingError(
        "rocm.find_compiler: clang needs the HIP headers and device libraries of the triton wheel; got none in "
        f"{' or '.join(map(str, folders))}; `pip install triton`, or `make hip` in a checkout"
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
