"""A kernel lowered to HIP text as data: what to bind where, how many threads to start, and how much LDS to add."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tilelang
from tilelang.rocm.target import target_get_mcpu, with_rocm_target_attrs
from tvm import tirx
from tvm.target import Target

from tilelang_ext.metal.program import Binding, MetalProgram, Parameter


@dataclass(frozen=True)
class HipLaunch:
    """One launch with everything bound: tensors and numbers in the kernel's order, the grid, the threads of a group."""

    arguments: tuple
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]


@dataclass(frozen=True)
class HipProgram:
    """A prim_func lowered to HIP text for one architecture; `dynamic_lds` is in bytes a group.

    `launchable` checks and binds arguments, which HIP does as Metal does.
    """

    source: str
    name: str
    arch: str
    dynamic_lds: int
    launchable: MetalProgram

    def get_kernel_source(self) -> str:
        """Return the whole text."""
        return self.source

    def bind(self, arguments: Sequence) -> HipLaunch:
        """Check torch CPU tensors and numbers in the user's order, and return what to launch; raises as Metal's does."""
        program = self.launchable
        launch = program.bind(arguments, device="cpu")
        shapes = [None if p.shape is None else tuple(a.shape) for p, a in zip(program.parameters, arguments, strict=True)]
        scalars = [a if p.shape is None else None for p, a in zip(program.parameters, arguments, strict=True)]
        values = program.resolve(shapes, scalars)
        bound = tuple(arguments[b.parameter] if b.is_tensor else values[b.var] for b in program.bindings)
        return HipLaunch(bound, launch.grid, launch.threads)


def hip_target(target: str | Target | Mapping) -> Target:
    """Return the target of an architecture: "hip -mcpu=gfx942", tilelang's dict or a Target; no device is asked."""
    if isinstance(target, str):
        match = re.fullmatch(r"hip\s+-+mcpu[=\s](gfx\w+)", target.strip())
        target = {"kind": "hip", "mcpu": match[1]} if match else target
    if not isinstance(target, str):
        target = target if isinstance(target, Target) else Target(dict(target))
        if target.kind.name == "hip" and target_get_mcpu(target) is not None:
            return with_rocm_target_attrs(target)
    raise ValueError(f'hip_target: must name an architecture; got {target}; pass "hip -mcpu=gfx942", or another mcpu')


def as_program(kernel, target: str | Target | Mapping) -> HipProgram:
    """Return the HIP program of a prim_func, of a compiled tilelang kernel, or a program as it is."""
    if isinstance(kernel, HipProgram):
        return kernel
    func = kernel if isinstance(kernel, tirx.PrimFunc) else getattr(kernel, "prim_func", None)
    if not isinstance(func, tirx.PrimFunc):
        raise TypeError(
            "tilelang_ext: a kernel must be a prim_func, a compiled tilelang kernel or a HipProgram; "
            f"got {type(kernel).__name__}; pass the function decorated with @T.prim_func"
        )
    return lower(func, target)


def lower(func: tirx.PrimFunc, target: str | Target | Mapping) -> HipProgram:
    """Lower one prim_func with one `T.Kernel` to HIP text; no GPU, ROCm or HIP compiler is needed."""
    target = hip_target(target)
    with target:
        artifact = tilelang.lower(func, target=target)
    kernels = [f for _, f in artifact.device_mod.functions_items()]
    if len(kernels) != 1:
        raise NotImplementedError(
            f"rocm.lower: a prim_func must hold exactly one T.Kernel; got {len(kernels)}; split it into one prim_func a kernel"
        )
    (kernel,) = kernels
    name, source = str(kernel.attrs["global_symbol"]), artifact.kernel_source
    dynamic = int(kernel.attrs.get("dyn_shared_memory_buf", 0))
    return HipProgram(source, name, target_get_mcpu(target), dynamic, _launchable(func, kernel, name, source))


def _launchable(func: tirx.PrimFunc, kernel: tirx.PrimFunc, name: str, source: str) -> MetalProgram:
    parameters, places = [], {}  # the user's parameters; a variable's name -> its parameter, and axis of a shape
    for i, param in enumerate(func.params):
        if param not in func.buffer_map:
            parameters.append(Parameter(param.name, str(param.dtype), None, param))
            places[param.name] = (i, None)
            continue
        buffer = func.buffer_map[param]
        shape = tuple(int(e) if isinstance(e, tirx.IntImm) else e for e in buffer.shape)
        parameters.append(Parameter(buffer.name, str(buffer.dtype), shape, param))
        places[buffer.data.name] = (i, None)
        for axis, extent in enumerate(shape):
            if isinstance(extent, tirx.Var):
                places.setdefault(extent.name, (i, axis))
    extents = kernel.attrs["thread_extent"]
    bindings = tuple(Binding(var, *places[var.name]) for var in kernel.params)
    read_only = {int(i) for i in kernel.attrs.get("tl.readonly_param_indices", [])}
    written = frozenset(b.parameter for i, b in enumerate(bindings) if b.is_tensor and i not in read_only)
    return MetalProgram(
        source=source,
        name=name,
        parameters=tuple(parameters),
        bindings=bindings,
        written=written,
        read_and_written=written,
        grid=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"),
        threads=tuple(int(extents.get(f"threadIdx.{axis}", 1)) for axis in "xyz"),
    )
