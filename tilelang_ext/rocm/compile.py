"""`compile_hip`: compile HIP text to a code object and report its instructions and resources, without AMD hardware."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tilelang_ext.rocm.toolchain import find_compiler

_LIMIT_SECONDS = 300
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
    templates = Path(importlib.util.find_spec("tilelang").origin).parent / "src"
    with tempfile.TemporaryDirectory(prefix="tilelang_ext-hip-") as name:
        folder = Path(name)
        (folder / "kernel.hip").write_text(source)
        command = [
            *compiler.command, "-x", "hip", f"--offload-arch={arch}", "--cuda-device-only", "--no-gpu-bundle-output",
            "-std=c++17", "-O3", f"-I{templates}", "-save-temps=obj", "kernel.hip", "-o", "kernel.co",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CompileError(
                f"compile_hip: must end within {_LIMIT_SECONDS} s; got no end for {arch}; split the kernel"
            ) from None
        if done.returncode:
            raise CompileError(
                f"compile_hip: the text must compile for {arch}; got errors of {compiler.version}; correct the lines named\n"
                f"{done.stderr}"
            )
        isa = next(folder.glob("kernel-hip-*.s")).read_text()
        return CodeObject(arch, (folder / "kernel.co").read_bytes(), isa, _kernels(isa))


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
