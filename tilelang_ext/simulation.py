"""Run a kernel's generated text on the CPU, with numbers, counts and findings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tilelang
from tvm.target import Target

from tilelang_ext.metal import program as metal
from tilelang_ext.rocm import program as rocm
from tilelang_ext.simulator import Report, execute_hip, execute_msl

_TEMPLATES = Path(tilelang.__file__).parent / "src"  # of what HIP texts include


def simulate(
    kernel,
    *arguments,
    target: str | Target | Mapping = "metal",
    check: bool = True,
    seed: int = 0,
    timeout: float = 60.0,
) -> Report:
    """Execute one launch of `kernel` from its Metal or HIP text and return counts and findings; outputs are written in place.

    `kernel` is a prim_func, a compiled tilelang kernel, a `MetalProgram` or a `HipProgram`; `arguments` are torch CPU tensors
    and numbers in the kernel's parameter order. `target` is "metal", "metal4", or an AMD architecture as "hip -mcpu=gfx942",
    tilelang's `{"kind": "hip", "mcpu": "gfx942"}` or a Target. `check` looks for out-of-bounds accesses, races,
    uninitialised reads and divergent barriers. `seed` orders the threads. `timeout` is in seconds.

    The report says nothing about speed, registers or occupancy, nor whether Apple's or AMD's compiler accepts the text.
    """
    options = {"check": check, "seed": seed, "timeout": timeout}
    if isinstance(kernel, rocm.HipProgram) or _is_hip(target):
        program = rocm.as_program(kernel, target)
        launch = program.bind(arguments, device="cpu")
        return execute_hip(
            program.source,
            program.name,
            launch.arguments,
            arch=program.arch,
            grid=launch.grid,
            threads=launch.threads,
            dynamic_lds=program.dynamic_lds,
            include_directories=(_TEMPLATES,),
            **options,
        )
    program = metal.as_program(kernel, target)
    launch = program.bind(arguments, device="cpu")
    bound = [*launch.tensors, program.slots(launch.numbers)] if launch.numbers else list(launch.tensors)
    return execute_msl(program.source, program.name, bound, grid=launch.grid, threads=launch.threads, **options)


def _is_hip(target: str | Target | Mapping) -> bool:
    if isinstance(target, str):
        return target.split(maxsplit=1)[:1] == ["hip"]
    return (target.kind.name if isinstance(target, Target) else target.get("kind")) == "hip"
