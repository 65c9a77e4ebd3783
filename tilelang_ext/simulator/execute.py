"""Run Metal text on this machine's CPU."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from . import launch, toolchain
from .address_spaces import find_misuse
from .msl import Translation, translate
from .report import Report

SOURCE_NAME = "kernel.metal"


def execute_msl(
    source: str,
    entry: str,
    arguments: Sequence,
    *,
    grid: tuple[int, int, int],
    threads: tuple[int, int, int],
    check: bool = True,
    seed: int = 0,
    timeout: float = 60.0,
    workers: int | None = None,
    constants: Mapping[int, object] | None = None,
    include_directories: Sequence[Path] = (),
) -> Report:
    """Execute kernel `entry` of a Metal source text; outputs are written into `arguments` in place.

    Args:
        source: the text, as the code generator emitted it.
        entry: a kernel's name, its host_name, or a template with arguments (`gemm<half, 64>`).
        arguments: one for each [[buffer(i)]], in order of i: torch CPU tensors or numpy arrays; bytes for a struct;
            None where the kernel declares no such buffer.
        grid: threadgroups in x, y, z.
        threads: threads a threadgroup in x, y, z.
        check: look for faults and count bytes; without, about three times as fast.
        seed: order in which the threads run; a correct kernel gives the same result for every seed.
        timeout: seconds until the run is stopped with TimeLimitError.
        workers: processes over which threadgroups are spread; default one a core.
        constants: values of function constants by index; absent ones are false.
        include_directories: where `#include` of the source looks.

    Returns:
        Report of counts and findings. It says nothing about speed.
    """
    grid, threads = _shape("grid", grid), _shape("threads", threads)
    if math.prod(threads) > 1024:
        raise ValueError(f"threads: at most 1024 a threadgroup; got {threads}; use fewer")
    text, lines = _preprocess(source, include_directories), source.splitlines()
    translation = translate(text, entry, constants or {})
    bound = _bind(translation, arguments)
    groups = math.prod(grid)
    workers = max(1, min(workers or os.cpu_count() or 1, groups, 64))
    with ThreadPoolExecutor(1) as beside:
        misuse = beside.submit(find_misuse, text, constants or {}, lines, SOURCE_NAME) if check else None
        program = toolchain.build(translation.text, check)
    report = launch.run(program, bound, lines, SOURCE_NAME, grid, threads, check, seed, timeout, workers)
    return replace(report, findings=(*misuse.result(), *report.findings)) if misuse else report


def translate_msl(
    source: str,
    entry: str,
    constants: Mapping[int, object] | None = None,
    include_directories: Sequence[Path] = (),
) -> Translation:
    """The C++ that stands for the kernel, and its parameters."""
    return translate(_preprocess(source, include_directories), entry, constants or {})


def _preprocess(source: str, include_directories: Sequence[Path]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.metal"
        path.write_text(f'#line 1 "{SOURCE_NAME}"\n{source}\n')
        return toolchain.preprocess(path, include_directories).replace(str(path), SOURCE_NAME)


def _shape(name: str, value: tuple[int, int, int]) -> tuple[int, int, int]:
    shape = tuple(int(v) for v in value)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name}: must be three positive numbers; got {value!r}; pass (x, y, z)")
    return shape


def _bind(translation: Translation, arguments: Sequence) -> list[launch.Argument]:
    buffers = translation.buffers()
    count = max(buffers, default=-1) + 1
    if len(arguments) < count:
        raise ValueError(
            f"arguments: one for each [[buffer(i)]] is needed; got {len(arguments)} for {count}; pass them in order of i"
        )
    if count > 31:
        raise ValueError(f"source: Metal binds at most 31 buffers; got {count}; join some")
    bound = []
    for index, parameter in sorted(buffers.items()):
        value = b"" if arguments[index] is None else arguments[index]
        writable = not parameter.is_const and arguments[index] is not None
        bound.append(launch.Argument(index, value, parameter.space == "constant", writable))
    return bound
