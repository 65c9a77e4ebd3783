"""Run a kernel's generated text on the CPU, with numbers, counts and findings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tilelang
from tilelang.jit import JITImpl
from tvm.target import Target

from tilelang_ext.metal import program as metal
from tilelang_ext.program import Launch
from tilelang_ext.rocm import program as rocm
from tilelang_ext.simulator import ARCHITECTURES, Report, execute_hip, execute_msl

_TEMPLATES = Path(tilelang.__file__).parent / "src"  # of what HIP texts include


def simulate(
    kernel,
    *arguments,
    target: str | Target | Mapping = "metal",
    check: bool = True,
    strict: bool = False,
    seed: int = 0,
    timeout: float = 60.0,
) -> Report:
    """Execute one call of `kernel` from its Metal or HIP text and return counts and findings; outputs are written in place.

    `kernel` is a prim_func, a compiled tilelang kernel, an eager `@tilelang.jit` function, a `MetalProgram` or a `HipProgram`;
    `arguments` are torch CPU tensors and numbers in the kernel's parameter order. Tensors that the kernel returns (`out_idx`,
    `T.empty`) may be left out, and are in the report's `outputs`. Several `T.Kernel`s are launched in their order. `target` is
    "metal", "metal4", or an AMD architecture as "hip -mcpu=gfx942", tilelang's `{"kind": "hip", "mcpu": "gfx942"}` or a Target;
    ValueError for any other. `check` looks for out-of-bounds accesses, races, uninitialised reads and divergent barriers. An
    access of the kernel outside a tensor is masked when the text is generated: a read gives 0, a store is dropped. The report
    counts these in `notes`; with `strict` they are findings. The tails of `T.copy` are not counted. `seed` orders the threads.
    `timeout` is in seconds.

    The report says nothing about speed, registers or occupancy, nor whether Apple's or AMD's compiler accepts the text.
    """
    options = {"check": check, "seed": seed, "timeout": timeout}
    _check_target(target)
    is_hip = isinstance(kernel, rocm.HipProgram) or _is_hip(target)
    tensors = _tensors_of_call(kernel, arguments)
    program = (rocm if is_hip else metal).as_program(kernel, target, arguments)
    given, outputs = program.with_outputs(tensors, device="cpu")
    execute = _execute_hip if is_hip else _execute_metal
    reports = [execute(program, launch, options) for launch in program.bind(given, device="cpu")]
    report = Report.of_launches(reports, outputs)
    return report.strict() if strict else report


def _execute_metal(program: metal.MetalProgram, launch: Launch, options: Mapping) -> Report:
    bound = list(launch.tensors)
    if launch.numbers:
        bound.append(metal.slots(launch.kernel, launch.numbers))
    return execute_msl(program.source, launch.kernel.name, bound, grid=launch.grid, threads=launch.threads, **options)


def _execute_hip(program: rocm.HipProgram, launch: Launch, options: Mapping) -> Report:
    return execute_hip(
        program.source,
        launch.kernel.name,
        launch.arguments,
        arch=program.arch,
        grid=launch.grid,
        threads=launch.threads,
        dynamic_lds=launch.kernel.dynamic_shared_bytes,
        include_directories=(_TEMPLATES,),
        **options,
    )


def _tensors_of_call(kernel, arguments: tuple) -> tuple:
    """Return what the kernel of a call takes: of an eager function of `@tilelang.jit`, not the constants of its program."""
    if not isinstance(kernel, JITImpl):
        return arguments
    if kernel.initialize_jit_mode(*arguments) != "eager":
        raise TypeError(
            "simulate: a @tilelang.jit function that returns a prim_func must be called first; got the function; pass what "
            "its .get_tir(...) returns"
        )
    return tuple(kernel.func.parse_args(*arguments)[1].values())


def _kind(target: str | Target | Mapping) -> str:
    if isinstance(target, str):
        return next(iter(target.split(maxsplit=1)), "")
    return str(target.kind.name if isinstance(target, Target) else target.get("kind"))


def _is_hip(target: str | Target | Mapping) -> bool:
    return _kind(target) == "hip"


_ELSEWHERE = {
    "cuda": "run a CUDA kernel on an NVIDIA GPU",
    "c": 'run a kernel for the CPU with tilelang.compile(kernel, target="c")',
}


def _check_target(target: str | Target | Mapping) -> None:
    kind = _kind(target)
    if kind in ("metal", "metal4", "hip"):
        return
    architectures = ", ".join(ARCHITECTURES)
    advice = f"; or {_ELSEWHERE[kind]}" if kind in _ELSEWHERE else ""
    raise ValueError(
        f'simulate: target must be "metal", "metal4" or "hip -mcpu=" with one of {architectures}; got {target!r}; '
        f"pass one of these{advice}"
    )
