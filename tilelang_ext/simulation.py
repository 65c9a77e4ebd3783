"""Run a kernel's generated text on the CPU, with numbers, counts and findings."""

from __future__ import annotations

from tilelang_ext.metal.program import as_program
from tilelang_ext.simulator import Report, execute_msl


def simulate(kernel, *arguments, target: str = "metal", check: bool = True, seed: int = 0, timeout: float = 60.0) -> Report:
    """Execute one launch of `kernel` from its Metal text and return counts and findings; outputs are written in place.

    `kernel` is a prim_func, a compiled tilelang kernel, or a `MetalProgram`; `arguments` are torch CPU tensors and numbers in
    the kernel's parameter order. `target` is "metal" or "metal4". `check` looks for out-of-bounds accesses, races,
    uninitialised reads and divergent barriers. `seed` orders the threads. `timeout` is in seconds.

    Says nothing of speed, registers or occupancy, nor whether Apple's compiler accepts the text.
    """
    program = as_program(kernel, target)
    launch = program.bind(arguments, device="cpu")
    bound = [*launch.buffers, launch.scalars] if launch.scalars else list(launch.buffers)
    return execute_msl(
        program.source,
        program.name,
        bound,
        grid=launch.grid,
        threads=launch.threads,
        check=check,
        seed=seed,
        timeout=timeout,
    )
