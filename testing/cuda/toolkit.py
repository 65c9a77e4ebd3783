"""nvcc and the disassembler: from CUDA texts to registers, spills and instructions, with no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler, on PATH")


class Compiled(NamedTuple):
    """One kernel: instructions by mnemonic and first modifier, such as HMMA.16816, and bytes of registers spilled."""

    instructions: Counter
    spilled: int

    def count(self, mnemonic: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] == mnemonic)


def compile_texts(texts: dict[str, str], arch: str) -> dict[str, Compiled]:
    """Compile kernels, each under its own name, for one architecture in one run of nvcc, and read what came of each."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text("\n".join(texts.values()))
        includes = [f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
        command = [
            "nvcc",
            "-std=c++20",
            "-cubin",
            f"-arch={arch}",
            "-Xptxas",
            "-v",
            "-w",
            *includes,
            str(source),
            "-o",
            str(binary),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "instructions are serialized" not in done.stderr, done.stderr  # warpgroup products one after another
        listing = subprocess.run(
            [_nvdisasm(), "-c", str(binary)], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    spilled = dict(re.findall(r"Function properties for (\w+)\n.*?(\d+) bytes spill stores", done.stderr))
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)", listing, flags=re.MULTILINE)
    compiled = {}
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)?)", text, flags=re.MULTILINE)
        compiled[name.removesuffix("_kernel")] = Compiled(Counter(found), int(spilled[name]))
    assert compiled.keys() == texts.keys()
    return compiled


def _nvdisasm() -> str:
    on_path = shutil.which("nvdisasm")
    if on_path:
        return on_path
    [program] = [file for file in metadata.files("nvidia-cuda-nvdisasm") or () if file.name == "nvdisasm"]
    return str(program.locate())
