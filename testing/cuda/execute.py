"""Run the CUDA text of a kernel on the CPU: device.h gives its calls their meaning, tensors go through files."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

COMPILER = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++20 compiler on PATH")
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+), 1\) (\w+)\((.*?)\) \{')


def execute(text: str, grid: tuple[int, int], tensors: dict[str, torch.Tensor], scalars: dict[str, int] | None = None) -> None:
    """Run the one kernel of `text` over a grid, and write what it left in its tensors, by their names, back into them."""
    threads, name, parameters = _SIGNATURE.search(text).groups()
    pointers = dict(reversed(pair) for pair in re.findall(r"(\w+)\s?\* __restrict__ (\w+)", parameters))
    names = [parameter.split()[-1] for parameter in parameters.split(", ")]
    device = text[_SIGNATURE.search(text).start() :]
    device = _SIGNATURE.sub(rf"void {name}(\3) {{", device)
    device = re.sub(r"extern __shared__ __align__\(1024\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)shared_memory;", device)
    assert "__shared__" not in device
    values = [f"({pointers[each]}*){each}.data()" if each in pointers else str(scalars[each]) for each in names]
    call = f"launch({grid[0]}, {grid[1]}, {threads}, [] {{ {name}({', '.join(values)}); }});"
    run_program("device.h", device, {tensor: tensors[tensor] for tensor in pointers}, call)


def run_program(header: str, device: str, tensors: dict[str, torch.Tensor], call: str) -> None:
    """Compile `device` under a header of this folder, run `call` on the tensors, and write back what it left in them."""
    entries = ", ".join(f'{{"{tensor}", {value.nbytes}}}' for tensor, value in tensors.items())
    names = "".join(f"  static const Tensor& {tensor} = tensors[{i}];\n" for i, tensor in enumerate(tensors))
    program = f"""{device}
namespace program {{
Tensor tensors[] = {{{entries}}};
void run() {{
{names}  {call}
}}
}}  // namespace program
int main() {{ return run_on_files(program::tensors, {len(tensors)}, program::run); }}
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cc").write_text(program)
        compiled = Path(_precompiled(header).name, header)
        _compile("-include", str(compiled), "kernel.cc", str(compiled.with_suffix(".o")), "-o", "kernel", folder=folder)
        for tensor, value in tensors.items():
            Path(folder, tensor).write_bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
        done = subprocess.run(["./kernel"], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for tensor, value in tensors.items():
            written = torch.frombuffer(bytearray(Path(folder, tensor).read_bytes()), dtype=value.dtype)
            value.copy_(written.reshape(value.shape))


@functools.cache
def _precompiled(header: str) -> tempfile.TemporaryDirectory:
    """A folder, until the tests end: a header that includes this one, its compiled form, and an object of what it declares.

    Both save two thirds of the CPU time of compiling a program.
    """
    folder = tempfile.TemporaryDirectory()
    here = Path(__file__).with_name(header)
    Path(folder.name, header).write_text(f'#include "{here}"\n')
    _compile("-x", "c++-header", header, "-o", f"{header}.gch", folder=folder.name)
    _compile("-c", str(here.with_suffix(".cc")), "-o", Path(header).with_suffix(".o").name, folder=folder.name)
    return folder


def _compile(*arguments: str, folder: str) -> None:
    command = [COMPILER, "-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-pthread", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
