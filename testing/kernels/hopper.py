"""Run the CUDA text of a kernel for Hopper on the CPU: hopper.h gives its calls their meaning, tensors go through files."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from cuda.execute import run_program

# Lane 0 hands a stage back for its warp right behind a wait: a lane that still waits may miss the phase, and the kernel hangs.
_EARLY_RELEASE = re.compile(
    r"\.wait\(.*\);\n(?:\s*int \w+ = .*;\n)*\s*if \(\(\(\(int\)threadIdx\.x\) (?:% 32|& 31)\) == 0\) \{\n.*\.arrive\("
)
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+), \d+\) (\w+)\((.*?)\) \{')

GIVEN = 0x7FB5C1D97FA3E2F1
# What a block or a consumer gives another; blocks run one after the other, so a word that nobody gives in 30 s is an error.
GIVING = f"""
static void tilelang_ext_give(void* word) {{ __atomic_store_n((long long*)word, {GIVEN}LL, __ATOMIC_RELEASE); }}
static void tilelang_ext_await(void* word) {{
  for (int i = 0; __atomic_load_n((long long*)word, __ATOMIC_ACQUIRE) != {GIVEN}LL; ++i) {{
    if (i == 30000) std::abort();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }}
  *(long long*)word = 0;
}}
"""


class Box(NamedTuple):
    """The box that TMA moves of a matrix: rows, and columns of at most 128 bytes."""

    rows: int
    columns: int
    swizzled: bool = True  # of matrices with four dimensions alone


def execute(
    text: str,
    grid: tuple[int, ...],
    tensors: dict[str, torch.Tensor],
    boxes: dict[str, Box],
    scalars: dict[str, int],
    cluster: int = 1,
    functions: str = "",
) -> None:
    """Run the one kernel of `text`, and write what it left in its tensors, by their names, back into them.

    It may have fewer parameters than there are tensors and scalars. It may call `functions`, in C++.
    """
    assert not _EARLY_RELEASE.search(text)
    match = _SIGNATURE.search(text)
    threads, name, parameters = match.groups()
    device = _SIGNATURE.sub(rf"void {name}(\3) {{", text[match.start() :]).replace("__grid_constant__ ", "")
    device = re.sub(r"extern __shared__ __align__\(1024\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)shared_memory;", device)
    barriers = iter(range(0, 4096, 256))  # places of up to 32 barriers each
    device = re.sub(
        r"__shared__ __align__\(16\) uint64_t (\w+)\[\d+\];",
        lambda found: f"uint64_t* {found[1]} = (uint64_t*)(shared_memory + kSharedBytes + {next(barriers)});",
        device,
    )
    assert "__shared__" not in device
    arguments, own = [], {}
    for parameter in parameters.split(", "):
        kind, parameter_name = parameter.rsplit(" ", 1)
        if kind.endswith("CUtensorMap"):
            matrix = parameter_name.removesuffix("_desc")
            own[matrix] = tensors[matrix]
            size, box = tensors[matrix].itemsize, boxes[matrix]
            outer = ""
            if tensors[matrix].dim() == 4:  # (batch, rows, heads, columns)
                (_, rows, _, columns), strides = tensors[matrix].shape, [stride * size for stride in tensors[matrix].stride()]
                outer = f", {strides[1]}, {{{strides[2]}, {strides[0]}}}, {str(box.swizzled).lower()}"
            elif tensors[matrix].dim() == 3:  # (batch, rows, columns)
                batch_stride, row_stride, _ = (stride * size for stride in tensors[matrix].stride())
                _, rows, columns = tensors[matrix].shape
                outer = f", {row_stride}, {{{batch_stride}, 0}}"
            else:
                rows, columns = tensors[matrix].shape
            extents = f"{rows}, {columns * size}, {box.rows}, {box.columns * size}, {size}"
            arguments.append(f"CUtensorMap{{(uint8_t*){matrix}.data(), {extents}{outer}}}")
        elif "*" in kind:
            own[parameter_name] = tensors[parameter_name]
            arguments.append(f"({kind.split('*')[0].removeprefix('const ')}*){parameter_name}.data()")
        else:
            arguments.append(str(scalars[parameter_name]))
    kernel = f"[] {{ blockIdx.z = z; {name}({', '.join(arguments)}); }}"
    launch = f"launch_clusters({grid[0]}, {grid[1]}, {cluster}, {threads}, {kernel});"
    call = f"static int z; for (z = 0; z < {grid[2] if len(grid) > 2 else 1}; ++z) {launch}"
    run_program("hopper.h", functions + device, own, call)
