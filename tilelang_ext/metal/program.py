"""A compiled Metal kernel as data: its text, what to bind where, and how many threads to start."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import tilelang
import torch
from tilelang import language as T
from tvm import arith, tirx
from tvm.target import Target

from tilelang_ext.metal.parameter_order import SOURCES

_SLOT_BYTES = 8
_SLOT_FORMAT = {"bool": "?", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}
_SLOT_FORMAT |= {"int64": "q", "uint64": "Q", "float16": "e", "float32": "f"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's function: a tensor (with a shape, symbolic extents allowed) or a scalar."""

    name: str
    dtype: str
    shape: tuple | None  # None for a scalar
    var: tirx.Var  # by which shapes and grids refer to a scalar


@dataclass(frozen=True)
class Binding:
    """One parameter of the device kernel: the user's parameter, or (with an axis) an extent of its shape."""

    var: tirx.Var
    parameter: int
    axis: int | None

    @property
    def is_tensor(self) -> bool:
        return self.var.dtype == "handle"


@dataclass(frozen=True)
class Launch:
    """One launch with everything bound: buffers in binding order, the bytes of the scalar struct, the grid."""

    buffers: tuple[torch.Tensor, ...]
    scalars: bytes  # one 8-byte slot a scalar; empty when there is none
    grid: tuple[int, int, int]  # threadgroups
    threads: tuple[int, int, int]  # threads of one threadgroup


@dataclass(frozen=True)
class MetalProgram:
    """A prim_func lowered to Metal text, ready for torch, MLX or the simulator.

    `source` is the whole file, `name` its kernel, `parameters` the user's parameters, `bindings` the device parameters in
    [[buffer(i)]] order (tensors, then scalars that share one struct). `written` are the indices of the parameters that the
    kernel writes, `read_and_written` of those among them whose old values it may read.
    """

    source: str
    name: str
    parameters: tuple[Parameter, ...]
    bindings: tuple[Binding, ...]
    written: frozenset[int]
    read_and_written: frozenset[int]
    grid: tuple
    threads: tuple[int, int, int]

    def get_kernel_source(self, kernel_only: bool = True) -> str:
        """Return the kernel's text, with `kernel_only=False` the includes, helpers and argument struct too."""
        start = self.source.find("kernel void ") if kernel_only else 0
        return self.source[max(start, 0) :]

    def bind(self, arguments: Sequence, *, device: str) -> Launch:
        """Check torch `arguments` (the user's order) against the parameters and return what to launch.

        Raises TypeError for a wrong count, kind or dtype and ValueError for a wrong shape, stride or device.
        """
        if len(arguments) != len(self.parameters):
            names = ", ".join(p.name for p in self.parameters)
            raise TypeError(
                f"{self.name}: takes {len(self.parameters)} arguments ({names}); got {len(arguments)}; pass one each"
            )
        for parameter, argument in zip(self.parameters, arguments, strict=True):
            if parameter.shape is not None:
                _check_tensor(self.name, parameter, argument, device)
        shapes = [None if p.shape is None else tuple(a.shape) for p, a in zip(self.parameters, arguments, strict=True)]
        scalars = [a if p.shape is None else None for p, a in zip(self.parameters, arguments, strict=True)]
        values = self.resolve(shapes, scalars)
        buffers = tuple(arguments[binding.parameter] for binding in self.bindings if binding.is_tensor)
        return Launch(buffers, self.slots(values), self.launch_grid(values), self.threads)

    def resolve(self, shapes: Sequence[tuple[int, ...] | None], scalars: Sequence) -> dict[tirx.Var, object]:
        """Return the value of every scalar and symbolic extent, on the user's side and the device's; raise where shapes
        disagree. A tensor whose shape is None (an output yet to be made) has extents that the others determine.
        """
        values: dict[tirx.Var, object] = {}
        for parameter, shape, scalar in zip(self.parameters, shapes, scalars, strict=True):
            if parameter.shape is None:
                values[parameter.var] = _check_scalar(self.name, parameter, scalar)
            elif shape is not None:
                _bind_shape(self.name, parameter, shape, values)
        for parameter, shape in zip(self.parameters, shapes, strict=True):
            if shape is not None and self.shape(parameter, values) != tuple(shape):
                raise ValueError(
                    f"{self.name}: {parameter.name} must have shape {self.shape(parameter, values)}; "
                    f"got {tuple(shape)}; pass that shape"
                )
        for binding in self.bindings:
            parameter = self.parameters[binding.parameter]
            if binding.axis is not None:
                values[binding.var] = self.shape(parameter, values)[binding.axis]
            elif not binding.is_tensor:
                values[binding.var] = values[parameter.var]
        return values

    def shape(self, parameter: Parameter, values: dict[tirx.Var, object]) -> tuple[int, ...]:
        """Return the shape of a tensor parameter under `values`."""
        return tuple(_evaluate(self.name, extent, values) for extent in parameter.shape)

    def launch_grid(self, values: dict[tirx.Var, object]) -> tuple[int, int, int]:
        """Return the number of threadgroups along each axis under `values`."""
        return tuple(_evaluate(self.name, extent, values) for extent in self.grid)

    def slots(self, values: dict[tirx.Var, object]) -> bytes:
        """Return the bytes of the scalar struct: one 8-byte slot a scalar, in binding order; empty when there is none."""
        return b"".join(_slot(values[b.var], str(b.var.dtype)) for b in self.bindings if not b.is_tensor)


def as_program(kernel, target: str | Target = "metal") -> MetalProgram:
    """Return the Metal program of a prim_func, a compiled tilelang kernel or a program."""
    if isinstance(kernel, MetalProgram):
        return kernel
    func = kernel if isinstance(kernel, tirx.PrimFunc) else getattr(kernel, "prim_func", None)
    if not isinstance(func, tirx.PrimFunc):
        raise TypeError(
            "tilelang_ext: a kernel must be a prim_func, a compiled tilelang kernel or a MetalProgram; "
            f"got {type(kernel).__name__}; pass the function decorated with @T.prim_func"
        )
    return lower(func, target)


def lower(func: tirx.PrimFunc, target: str | Target = "metal") -> MetalProgram:
    """Lower one prim_func with one `T.Kernel` to Metal text; no Mac, GPU or Metal compiler is needed."""
    artifact = tilelang.lower(func, target=metal_target(target))
    kernels = [f for _, f in artifact.device_mod.functions_items()]
    if len(kernels) != 1:
        raise NotImplementedError(
            f"metal.lower: a prim_func must hold exactly one T.Kernel; got {len(kernels)}; split it into one prim_func a kernel"
        )
    return _program(func, kernels[0], artifact.kernel_source)


def metal_target(target: str | Target) -> Target | dict:
    """Return the target for "metal" (simdgroup matrices), "metal4" (tensor operations too) or a Target; no device is asked."""
    if isinstance(target, Target):
        return target
    if target not in ("metal", "metal4"):
        raise ValueError(f'metal.lower: target must be "metal", "metal4" or a Target; got {target!r}; pass one of these')
    return {"kind": "metal", "keys": ["metal", "gpu", "metal4"] if target == "metal4" else ["metal", "gpu"]}


def _program(func: tirx.PrimFunc, kernel: tirx.PrimFunc, source: str) -> MetalProgram:
    extents = kernel.attrs["thread_extent"]
    read_only = {int(i) for i in kernel.attrs.get("tl.readonly_param_indices", [])}
    bindings = []
    for var, text in zip(kernel.params, kernel.attrs[SOURCES], strict=True):
        parameter, _, axis = str(text).partition(".")
        bindings.append(Binding(var, int(parameter), int(axis) if axis else None))
    parameters = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            shape = tuple(int(e) if isinstance(e, tirx.IntImm) else e for e in buffer.shape)
            parameters.append(Parameter(buffer.name, str(buffer.dtype), shape, param))
        else:
            parameters.append(Parameter(param.name, str(param.dtype), None, param))
    read = _read_tensors(kernel)
    written = {b for i, b in enumerate(bindings) if b.is_tensor and i not in read_only}
    return MetalProgram(
        source=source,
        name=str(kernel.attrs["global_symbol"]),
        parameters=tuple(parameters),
        bindings=tuple(bindings),
        written=frozenset(b.parameter for b in written),
        read_and_written=frozenset(b.parameter for b in written if b.var in read),
        grid=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"),
        threads=tuple(int(extents.get(f"threadIdx.{axis}", 1)) for axis in "xyz"),
    )


def _read_tensors(kernel: tirx.PrimFunc) -> set[tirx.Var]:
    read = set()

    def visit(node):
        if isinstance(node, tirx.BufferLoad):  # loads, and addresses that atomics take
            read.add(node.buffer.data)

    tirx.stmt_functor.post_order_visit(kernel.body, visit)
    return read


def _check_scalar(kernel: str, parameter: Parameter, argument):
    if isinstance(argument, torch.Tensor) or not isinstance(argument, (bool, int, float)):
        raise TypeError(
            f"{kernel}: {parameter.name} must be a {parameter.dtype} scalar; got {type(argument).__name__}; pass a number"
        )
    if not parameter.dtype.startswith("float") and isinstance(argument, float):
        raise TypeError(f"{kernel}: {parameter.name} must be {parameter.dtype}; got the float {argument}; pass an int")
    try:
        _slot(argument, parameter.dtype)
    except (struct.error, OverflowError):
        raise ValueError(
            f"{kernel}: {parameter.name} must fit {parameter.dtype}; got {argument}; pass a value in its range"
        ) from None
    return argument


def _check_tensor(kernel: str, parameter: Parameter, argument, device: str) -> torch.Tensor:
    if not isinstance(argument, torch.Tensor):
        raise TypeError(f"{kernel}: {parameter.name} must be a torch tensor; got {type(argument).__name__}; convert it")
    expected = T.dtype(parameter.dtype).as_torch()
    if argument.dtype != expected:
        raise TypeError(f"{kernel}: {parameter.name} must be {expected}; got {argument.dtype}; convert it with .to({expected})")
    if argument.device.type != device:
        raise ValueError(f"{kernel}: {parameter.name} must be on {device}; got {argument.device}; move it with .to({device!r})")
    if not argument.is_contiguous():
        raise ValueError(f"{kernel}: {parameter.name} must be contiguous; got strides {argument.stride()}; call .contiguous()")
    return argument


def _bind_shape(kernel: str, parameter: Parameter, shape: tuple[int, ...], values: dict[tirx.Var, object]) -> None:
    if len(shape) != len(parameter.shape):
        raise ValueError(
            f"{kernel}: {parameter.name} must have {len(parameter.shape)} dimensions; got shape {tuple(shape)}; reshape it"
        )
    for axis, (extent, size) in enumerate(zip(parameter.shape, shape, strict=True)):
        if isinstance(extent, tirx.Var) and values.setdefault(extent, size) != size:
            raise ValueError(
                f"{kernel}: {parameter.name} must have shape[{axis}] = {extent.name} = {values[extent]}; "
                f"got {size}; all tensors must agree on {extent.name}"
            )


def _slot(value, dtype: str) -> bytes:
    return struct.pack("<" + _SLOT_FORMAT[dtype], value).ljust(_SLOT_BYTES, b"\0")


def _evaluate(kernel: str, expression, values: dict[tirx.Var, object]) -> int:
    if isinstance(expression, int):
        return expression
    unknown = tirx.analysis.undefined_vars(expression)
    missing = [var.name for var in unknown if var not in values]
    if missing:
        raise ValueError(
            f"{kernel}: extent {expression} must follow from the shapes given; got no value for {', '.join(missing)}; "
            f"add a tensor that has {missing[0]} as an extent, or pass it as a scalar"
        )
    bound = tirx.stmt_functor.substitute(expression, {var: tirx.const(values[var], var.dtype) for var in unknown})
    return int(arith.Analyzer().simplify(bound))
