"""Run Metal or HIP text on this machine's CPU."""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from . import hip, toolchain
from .address_spaces import find_misuse
from .hip import find_architecture
from .launch import MAX_BUFFERS, Argument, Launch, Text, run
from .msl import Translation, translate
from .report import Report
from .toolchain import METAL, Dialect

METAL_THREADGROUP_MEMORY = 32 << 10


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
        grid: threadgroups in x, y, z; with a zero nothing runs.
        threads: threads per threadgroup in x, y, z.
        check: look for faults and count bytes; without it the run is about three times as fast.
        seed: order in which the threads run; a correct kernel gives the same result for every seed.
        timeout: seconds until the run is stopped with TimeLimitError.
        workers: processes over which threadgroups are spread; default one per core.
        constants: values of function constants by index; missing ones are false.
        include_directories: where `#include` of the source looks.

    Returns:
        Report of counts and findings. It says nothing about speed.
    """
    launch = Launch(grid, threads, check, seed, timeout, workers, METAL_THREADGROUP_MEMORY)
    preprocessed = _preprocess(METAL, source, include_directories)
    translation = translate(preprocessed, entry, constants or {})
    bound = _bind(translation, arguments)
    text = Text(source, METAL.source_name, translation.text)
    with ThreadPoolExecutor(1) as beside:
        misuse = beside.submit(find_misuse, preprocessed, constants or {}, text.lines, text.name) if check else None
        program = toolchain.build(METAL, translation.text, check)
    report = run(program, bound, text, launch)
    found = misuse.result() if misuse else []
    return replace(report, findings=(*found, *report.findings), text_file=text.path) if found else report


def translate_msl(
    source: str,
    entry: str,
    constants: Mapping[int, object] | None = None,
    include_directories: Sequence[Path] = (),
) -> Translation:
    """Return the C++ text that the kernel is translated to, and its parameters."""
    return translate(_preprocess(METAL, source, include_directories), entry, constants or {})


def execute_hip(
    source: str,
    entry: str,
    arguments: Sequence,
    *,
    arch: str,
    grid: tuple[int, int, int],
    threads: tuple[int, int, int],
    dynamic_lds: int = 0,
    check: bool = True,
    seed: int = 0,
    timeout: float = 60.0,
    workers: int | None = None,
    include_directories: Sequence[Path] = (),
) -> Report:
    """Execute kernel `entry` of a HIP source text; outputs are written into `arguments` in place.

    Args:
        source: the text, as the code generator emitted it.
        entry: the name of a `__global__` function.
        arguments: one for each parameter, in order: torch CPU tensors or numpy arrays for pointers, numbers for the others.
        arch: the architecture, such as "gfx942": its waves, matrix instructions, fp8 flavour and LDS.
        grid: groups in x, y, z; with a zero nothing runs.
        threads: threads per group in x, y, z.
        dynamic_lds: bytes of `extern __shared__` memory.
        check: look for faults and count bytes; without it the run is about three times as fast.
        seed: order in which the threads run; a correct kernel gives the same result for every seed.
        timeout: seconds until the run is stopped with TimeLimitError.
        workers: processes over which groups are spread; default one a core.
        include_directories: where `#include` of the source looks; TileLang's texts need the folder above `tl_templates`.

    Returns:
        Report of counts and findings. It says nothing about speed.
    """
    architecture = find_architecture(arch)
    dialect = architecture.dialect
    launch = Launch(grid, threads, check, seed, timeout, workers, architecture.lds, dynamic_lds)
    translation = hip.translate(_preprocess(dialect, source, include_directories), entry, dialect.source_name)
    bound = _bind_hip(translation, arguments)
    text = Text(source, dialect.source_name, translation.text)
    return run(toolchain.build(dialect, translation.text, check), bound, text, launch)


def _preprocess(dialect: Dialect, source: str, include_directories: Sequence[Path]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source"
        path.write_text(f'#line 1 "{dialect.source_name}"\n{source}\n')
        return toolchain.preprocess(dialect, path, include_directories).replace(str(path), dialect.source_name)


def _bind(translation: Translation, arguments: Sequence) -> list[Argument]:
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
        bound.append(Argument(index, value, parameter.space == "constant", writable, parameter.name))
    return bound


def _bind_hip(translation: hip.Translation, arguments: Sequence) -> list[Argument]:
    parameters = translation.parameters
    if len(arguments) != len(parameters):
        names = ", ".join(p.name for p in parameters)
        raise ValueError(f"arguments: one for each of {names} is needed; got {len(arguments)}; pass them in order")
    if len(parameters) > MAX_BUFFERS:
        raise ValueError(f"source: at most {MAX_BUFFERS} parameters can be bound; got {len(parameters)}; join some")
    bound = []
    for index, (parameter, value) in enumerate(zip(parameters, arguments, strict=True)):
        is_number = isinstance(value, (bool, int, float))
        if is_number == parameter.is_pointer:
            kind = "a tensor or array" if parameter.is_pointer else "a number"
            raise TypeError(f"arguments[{index}]: {parameter.name} must be {kind}; got {type(value).__name__}; convert it")
        if is_number:
            number = _scalar_bytes(value)
            bound.append(Argument(index, number, constant=True, writable=False, name=parameter.name))
        else:
            bound.append(Argument(index, value, constant=False, writable=not parameter.is_const, name=parameter.name))
    return bound


def _scalar_bytes(value: bool | int | float) -> bytes:
    """Return a number as 8 bytes of an integer and 8 of a double, of which the parameter's type chooses one."""
    if isinstance(value, float):
        integer = int(value) if math.isfinite(value) and abs(value) < 2**63 else 0
        return struct.pack("<qd", integer, value)
    return struct.pack("<Qd", value % 2**64, float(value))
