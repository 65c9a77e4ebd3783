"""`compile_hip`: compile HIP text to a code object and report its instructions and resources, without AMD hardware."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tilelang_ext.rocm.toolchain import CODE_OBJECT_VERSION, Compiler, find_compiler

_LIMIT_SECONDS = 300
# HIP's header, where a text begins with it behind nothing but definitions of names that it does not read.
_HEADER = re.compile(r"(?:[ \t]*(?://.*|#(?:ifndef|define) (?:TL|TILELANG_EXT)_.*|#endif.*)?\n)*(#include <hip/.*>\n)")
_lock = threading.Lock()
_met: Counter = Counter()  # how many texts began with this header
# A kernel's figures in the metadata that clang writes below its instructions.
_FIGURES = {
    "vgprs": "vgpr_count",
    "agprs": "agpr_count",
    "sgprs": "sgpr_count",
    "vgpr_spills": "vgpr_spill_count",
    "sgpr_spills": "sgpr_spill_count",
    "scratch_bytes": "private_segment_fixed_size",
    "lds_bytes": "group_segment_fixed_size",
    "wave": "wavefront_size",
}


class CompileError(RuntimeError):
    """The compiler refused the text; the message holds what it said."""


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes: registers per lane, spilled registers, scratch bytes per lane, LDS bytes per work-group.

    `vgprs` counts all vector registers, `agprs` those of them that are accumulation registers. `lds_bytes` is static LDS;
    dynamic LDS (`extern __shared__`) is sized at launch and not included.
    """

    name: str
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    wave: int


@dataclass(frozen=True)
class CodeObject:
    """A compiled text: `code` is an ELF that hipModuleLoadData takes, `isa` its assembly, `kernels` the resources of each."""

    arch: str
    code: bytes
    isa: str
    kernels: tuple[KernelResources, ...]

    def count(self, mnemonic: str) -> int:
        """Return how many instructions of this exact name the assembly holds, as in `count("v_mfma_f32_16x16x16_f16")`."""
        return len(re.findall(rf"^\s+{re.escape(mnemonic)}(?:_e32|_e64)?\s", self.isa, re.MULTILINE))


def compile_hip(source: str, arch: str) -> CodeObject:
    """Compile HIP text for one architecture, such as "gfx942".

    The compiler is ROCm's hipcc or a clang (`find_compiler`). Everything happens in a temporary folder; nothing is run.
    Raises CompileError with the compiler's messages, CompilerMissingError where there is no compiler, ValueError for an
    `arch` that is no architecture's name.
    """
    if not re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        raise ValueError(f"compile_hip: arch must be the name of an AMD architecture; got {arch!r}; pass one such as 'gfx942'")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="tilelang_ext-hip-") as name:
        folder = Path(name)
        (folder / "kernel.hip").write_text(source)
        flags = _flags(compiler, arch)
        if not compiler.is_clang:
            _check(_run(flags, ("-save-temps=obj", "kernel.hip", "-o", "kernel.co"), folder, arch), compiler, arch)
            isa = next(folder.glob("kernel-hip-*.s"))
        else:
            isa, compiled = folder / "kernel.s", ("-S", "kernel.hip", "-o", "kernel.s")
            header = _precompiled(compiler, arch, source)
            if header is None or _run((*flags, *header), compiled, folder, arch).returncode:
                _check(_run(flags, compiled, folder, arch), compiler, arch)
            linker = (compiler.command[0], "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", CODE_OBJECT_VERSION, "-fuse-ld=lld")
            _check(_run(linker, ("kernel.s", "-o", "kernel.co"), folder, arch), compiler, arch)
        text = isa.read_text()
        return CodeObject(arch, (folder / "kernel.co").read_bytes(), text, _kernels(text))


def _flags(compiler: Compiler, arch: str) -> tuple[str, ...]:
    templates = Path(importlib.util.find_spec("tilelang").origin).parent / "src"
    language = "-x", "hip", f"--offload-arch={arch}", "--cuda-device-only", "--no-gpu-bundle-output", "-std=c++17", "-O3"
    return *compiler.command, *language, f"-I{templates}"


def _run(command: tuple[str, ...], files: tuple[str, ...], folder: Path, arch: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise CompileError(
            f"compile_hip: must end within {_LIMIT_SECONDS} s; got no end for {arch}; split the kernel"
        ) from None


def _check(done: subprocess.CompletedProcess, compiler: Compiler, arch: str) -> None:
    if done.returncode:
        raise CompileError(
            f"compile_hip: the text must compile for {arch}; got errors of {compiler.version}; correct the lines named\n"
            f"{done.stderr}"
        )


@functools.cache
def _header(compiler: Compiler, arch: str, include: str) -> tempfile.TemporaryDirectory | None:
    """A folder, until the process ends, with this header compiled for one architecture; None where clang does not do that."""
    folder = tempfile.TemporaryDirectory(prefix="tilelang_ext-hip-")
    Path(folder.name, "header.hip").write_text(include)
    files = "-S", "-Xclang", "-emit-pch", "header.hip", "-o", "header.pch"
    return None if _run(_flags(compiler, arch), files, Path(folder.name), arch).returncode else folder


def _precompiled(compiler: Compiler, arch: str, source: str) -> tuple[str, ...] | None:
    """Return the flags that read HIP's header compiled, from the second text of a process that begins with it.

    It takes three quarters of the time of compiling a small kernel, and as long to compile on its own.
    """
    found = _HEADER.match(source)
    if found is None:
        return None
    key = compiler, arch, found[1]
    with _lock:
        _met[key] += 1
        folder = _header(*key) if _met[key] > 1 else None
    return folder and ("-Xclang", "-include-pch", "-Xclang", str(Path(folder.name, "header.pch")))


def _kernels(isa: str) -> tuple[KernelResources, ...]:
    """Read the figures of every kernel from the metadata of an assembly."""
    metadata = isa.partition("\namdhsa.kernels:")[2].partition("\namdhsa.")[0]
    kernels = []
    for entry in re.split(r"^  - ", metadata, flags=re.MULTILINE)[1:]:
        figures = {field: re.search(rf"\.{key}: +(\d+)", entry) for field, key in _FIGURES.items()}
        kernels.append(
            KernelResources(
                name=re.search(r"^    \.name: +(\S+)", entry, re.MULTILINE)[1],
                **{field: int(match[1]) if match else 0 for field, match in figures.items()},
            )
        )
    return tuple(kernels)
