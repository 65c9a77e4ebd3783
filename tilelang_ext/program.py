"""A lowered kernel as data, for any target: its text, what each parameter of the kernel is, and what one call launches.

A user's function has parameters, tensors and scalars; the kernel that it becomes has parameters of its own: those tensors,
those scalars, and the extents of symbolic shapes, in an order that the target decides. Which is which is settled by identity
(`parameter_sources`), since tracing may give two variables one name. A call resolves every symbolic extent once (`resolve`),
and the grid, the kernel's numbers and the checks of shapes all read that.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tilelang import language as T
from tvm import DataType, IRModule, arith, tirx
from tvm.ir import GlobalVar

_SCALAR_FORMATS = {"bool": "?", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}
_SCALAR_FORMATS |= {"int64": "q", "uint64": "Q", "float16": "e", "float32": "f", "float64": "d"}

Values = Mapping[tirx.Var, object]  # the number that each scalar and symbolic extent has in one call


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's function: a tensor (with a shape, symbolic extents allowed) or a scalar."""

    name: str
    dtype: str
    shape: tuple | None  # None for a scalar
    var: tirx.Var  # by which shapes and grids refer to a scalar
    strides: tuple | None = None  # in elements, as the function declares them; None for a contiguous tensor

    @property
    def per_element(self) -> int:
        """How many of the shape's elements one element of the tensor that is passed holds: a byte is two FP4 codes."""
        return max(1, 8 // DataType(self.dtype).bits) if self.dtype != "bool" else 1


class Source(NamedTuple):
    """Where a parameter of the kernel comes from: the user's parameter, or (with an axis) an extent of its shape."""

    parameter: int
    axis: int | None = None


@dataclass(frozen=True)
class Binding:
    """One parameter of the kernel and its source."""

    var: tirx.Var
    parameter: int
    axis: int | None

    @property
    def is_tensor(self) -> bool:
        return self.var.dtype == "handle"


@dataclass(frozen=True)
class Launch:
    """One launch with everything bound: tensors and numbers in the kernel's order, blocks of the grid, threads of a block."""

    arguments: tuple[torch.Tensor | int | float, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors among the arguments, in the kernel's order."""
        return tuple(argument for argument in self.arguments if isinstance(argument, torch.Tensor))

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """The numbers among the arguments, in the kernel's order."""
        return tuple(argument for argument in self.arguments if not isinstance(argument, torch.Tensor))


@dataclass(frozen=True)
class Program:
    """A prim_func lowered to the text of one target.

    `source` is the whole text, `name` its kernel, `parameters` the user's parameters, `bindings` the kernel's parameters in
    its order. `written` are the indices of the parameters that the kernel writes, `read_and_written` of those among them whose
    old values it may read. `grid` may hold expressions of scalars and symbolic extents.
    """

    source: str
    name: str
    parameters: tuple[Parameter, ...]
    bindings: tuple[Binding, ...]
    written: frozenset[int]
    read_and_written: frozenset[int]
    grid: tuple
    threads: tuple[int, int, int]

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
        tensors = {
            i: self._memory(parameter, arguments[i], values) for i, parameter in enumerate(self.parameters) if parameter.shape
        }
        bound = tuple(tensors.get(b.parameter, arguments[b.parameter]) if b.is_tensor else values[b.var] for b in self.bindings)
        return Launch(bound, self.launch_grid(values), self.threads)

    def resolve(self, shapes: Sequence[tuple[int, ...] | None], scalars: Sequence) -> Values:
        """Return the number of every scalar and symbolic extent, of the user's function and of the kernel.

        One shape per tensor, that of what is passed, and one number per scalar, None elsewhere, in the user's order. A tensor
        whose shape is None (an output yet to be made) has extents that the others determine. Raises ValueError where shapes
        disagree.
        """
        shapes = [_unpacked(p, shape) for p, shape in zip(self.parameters, shapes, strict=True)]
        values: dict[tirx.Var, object] = {}
        for parameter, shape, scalar in zip(self.parameters, shapes, scalars, strict=True):
            if parameter.shape is None:
                values[parameter.var] = _check_scalar(self.name, parameter, scalar)
            elif shape is not None:
                _bind_shape(self.name, parameter, shape, values)
        for parameter, shape in zip(self.parameters, shapes, strict=True):
            if shape is not None and self.shape(parameter, values) != tuple(shape):
                wanted, given = self.passed_shape(parameter, values), _packed(parameter, shape)
                raise ValueError(f"{self.name}: {parameter.name} must have shape {wanted}; got {given}; pass that shape")
        for binding in self.bindings:
            parameter = self.parameters[binding.parameter]
            if binding.axis is not None:
                values[binding.var] = self.shape(parameter, values)[binding.axis]
            elif not binding.is_tensor:
                values[binding.var] = values[parameter.var]
        return values

    def shape(self, parameter: Parameter, values: Values) -> tuple[int, ...]:
        """Return the shape of a tensor parameter under `values`."""
        return tuple(_evaluate(self.name, extent, values) for extent in parameter.shape)

    def passed_shape(self, parameter: Parameter, values: Values) -> tuple[int, ...]:
        """Return the shape of the tensor that is passed for a parameter under `values`: of FP4 codes, that of their bytes."""
        return _packed(parameter, self.shape(parameter, values))

    def _memory(self, parameter: Parameter, argument: torch.Tensor, values: Values) -> torch.Tensor:
        """Return `argument` as the kernel takes it, one piece of memory; ValueError for other strides than the declared."""
        if parameter.strides is None:
            return argument
        wanted = tuple(_evaluate(self.name, stride, values) for stride in parameter.strides)
        if any(size > 1 and a != b for size, a, b in zip(argument.shape, wanted, argument.stride(), strict=True)):
            raise ValueError(
                f"{self.name}: {parameter.name} must have strides {wanted}; got {argument.stride()}; pass a view that has them"
            )
        last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        return argument.as_strided((last + 1 if argument.numel() else 0,), (1,))

    def launch_grid(self, values: Values) -> tuple[int, int, int]:
        """Return the number of blocks along each axis under `values`."""
        return tuple(_evaluate(self.name, extent, values) for extent in self.grid)

    def numbers(self, values: Values) -> tuple[int | float, ...]:
        """Return the kernel's scalars and extents under `values`, in its order."""
        return tuple(values[binding.var] for binding in self.bindings if not binding.is_tensor)


def prim_func_of(kernel, program: str) -> tirx.PrimFunc:
    """Return the prim_func of what a user calls a kernel; TypeError, which names the class `program`, for anything else."""
    func = kernel if isinstance(kernel, tirx.PrimFunc) else getattr(kernel, "prim_func", None)
    if not isinstance(func, tirx.PrimFunc):
        raise TypeError(
            f"tilelang_ext: a kernel must be a prim_func, a compiled tilelang kernel or a {program}; "
            f"got {type(kernel).__name__}; pass the function decorated with @T.prim_func"
        )
    return func


def only_kernel(device_mod: IRModule, caller: str) -> tirx.PrimFunc:
    """Return the one kernel of a lowered module; NotImplementedError, in the name of `caller`, where it holds several."""
    kernels = [func for _, func in device_mod.functions_items()]
    if len(kernels) != 1:
        raise NotImplementedError(
            f"{caller}: a prim_func must hold exactly one T.Kernel; got {len(kernels)}; split it into one prim_func per kernel"
        )
    return kernels[0]


def parameter_sources(mod: IRModule) -> dict[str, list[Source]]:
    """Return the source of every parameter of every kernel, by the kernel's name, from a module right after SplitHostDevice.

    There the host still calls its kernels with its own variables, so each argument is a parameter of the host, or an extent
    of one, by identity.
    """
    sources: dict[str, list[Source]] = {}
    for _, host in mod.functions_items():

        def collect(node, host=host):
            if isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar):
                arguments = node.args[: len(mod[node.op].params)]
                sources[node.op.name_hint] = [_source(node.op.name_hint, host, argument) for argument in arguments]

        tirx.stmt_functor.post_order_visit(host.body, collect)
    return sources


def _source(kernel: str, host: tirx.PrimFunc, argument: tirx.PrimExpr) -> Source:
    for index, param in enumerate(host.params):
        given = host.buffer_map[param].data if param in host.buffer_map else param
        if given.same_as(argument):
            return Source(index)
    for index, param in enumerate(host.params):
        if param in host.buffer_map:
            for axis, extent in enumerate(host.buffer_map[param].shape):
                if extent.same_as(argument):
                    return Source(index, axis)
    raise NotImplementedError(
        f"{kernel}: what a kernel uses must be a parameter or an extent of a tensor's shape; got {argument}; "
        "add it as a scalar parameter"
    )


def read_program(func: tirx.PrimFunc, kernel: tirx.PrimFunc, source: str, sources: Sequence[Source]) -> Program:
    """Return the program of the user's `func`, whose device function `kernel` became the text `source`."""
    parameters = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            shape = tuple(int(e) if isinstance(e, tirx.IntImm) else e for e in buffer.shape)
            parameters.append(Parameter(buffer.name, str(buffer.dtype), shape, param, _declared_strides(buffer)))
        else:
            parameters.append(Parameter(param.name, str(param.dtype), None, param))
    bindings = [Binding(var, *source) for var, source in zip(kernel.params, sources, strict=True)]
    read_only = {int(i) for i in kernel.attrs.get("tl.readonly_param_indices", [])}
    written = [b for i, b in enumerate(bindings) if b.is_tensor and i not in read_only]
    read = _read_tensors(kernel)
    extents = kernel.attrs["thread_extent"]
    return Program(
        source=source,
        name=str(kernel.attrs["global_symbol"]),
        parameters=tuple(parameters),
        bindings=tuple(bindings),
        written=frozenset(b.parameter for b in written),
        read_and_written=frozenset(b.parameter for b in written if b.var in read),
        grid=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"),
        threads=tuple(int(extents.get(f"threadIdx.{axis}", 1)) for axis in "xyz"),
    )


def _declared_strides(buffer: tirx.Buffer) -> tuple | None:
    """Return the strides of a buffer, None where they are those of a contiguous tensor."""
    analyzer, contiguous = arith.Analyzer(), True
    step = tirx.const(1)
    for extent, stride in zip(reversed(buffer.shape), reversed(buffer.strides), strict=True) if buffer.strides else ():
        contiguous = contiguous and analyzer.can_prove_equal(stride, step)
        step = step * extent
    return None if contiguous else tuple(int(s) if isinstance(s, tirx.IntImm) else s for s in buffer.strides)


def _unpacked(parameter: Parameter, shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the shape in the function's elements of a tensor that is passed."""
    return (*shape[:-1], shape[-1] * parameter.per_element) if shape else shape


def _packed(parameter: Parameter, shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // parameter.per_element) if shape else tuple(shape)


def _read_tensors(kernel: tirx.PrimFunc) -> set[tirx.Var]:
    read = set()

    def visit(node):
        if isinstance(node, tirx.BufferLoad):  # loads, and addresses that atomics take
            read.add(node.buffer.data)

    tirx.stmt_functor.post_order_visit(kernel.body, visit)
    return read


def pack_scalar(value: int | float, dtype: str) -> bytes:
    """Return the bytes of a number of `dtype`, little-endian; struct.error or OverflowError where it does not fit."""
    return struct.pack("<" + _SCALAR_FORMATS[dtype], value)


def _check_scalar(kernel: str, parameter: Parameter, argument):
    if parameter.dtype not in _SCALAR_FORMATS:
        raise TypeError(
            f"{kernel}: {parameter.name} must have one of the dtypes {', '.join(_SCALAR_FORMATS)}; got {parameter.dtype}; "
            "pass a float32 and cast it in the kernel"
        )
    if isinstance(argument, torch.Tensor) or not isinstance(argument, (bool, int, float)):
        raise TypeError(
            f"{kernel}: {parameter.name} must be a {parameter.dtype} scalar; got {type(argument).__name__}; pass a number"
        )
    if not parameter.dtype.startswith("float") and isinstance(argument, float):
        raise TypeError(f"{kernel}: {parameter.name} must be {parameter.dtype}; got the float {argument}; pass an int")
    try:
        pack_scalar(argument, parameter.dtype)
    except (struct.error, OverflowError):
        raise ValueError(
            f"{kernel}: {parameter.name} must fit {parameter.dtype}; got {argument}; pass a value in its range"
        ) from None
    return argument


def _check_tensor(kernel: str, parameter: Parameter, argument, device: str) -> torch.Tensor:
    if not isinstance(argument, torch.Tensor):
        raise TypeError(f"{kernel}: {parameter.name} must be a torch tensor; got {type(argument).__name__}; convert it")
    expected = T.dtype(parameter.dtype).as_torch()
    is_bytes_of_codes = parameter.per_element > 1 and argument.dtype in (torch.uint8, torch.int8)
    if argument.dtype != expected and not is_bytes_of_codes:
        raise TypeError(f"{kernel}: {parameter.name} must be {expected}; got {argument.dtype}; convert it with .to({expected})")
    if argument.device.type != device:
        raise ValueError(f"{kernel}: {parameter.name} must be on {device}; got {argument.device}; move it with .to({device!r})")
    if parameter.strides is None and not argument.is_contiguous():
        raise ValueError(f"{kernel}: {parameter.name} must be contiguous; got strides {argument.stride()}; call .contiguous()")
    return argument


def _bind_shape(kernel: str, parameter: Parameter, shape: tuple[int, ...], values: dict[tirx.Var, object]) -> None:
    if len(shape) != len(parameter.shape):
        raise ValueError(
            f"{kernel}: {parameter.name} must have {len(parameter.shape)} dimensions; got shape {_packed(parameter, shape)}; "
            "reshape it"
        )
    for axis, (extent, size) in enumerate(zip(parameter.shape, shape, strict=True)):
        if isinstance(extent, tirx.Var) and values.setdefault(extent, size) != size:
            raise ValueError(
                f"{kernel}: {parameter.name} must have shape[{axis}] = {extent.name} = {values[extent]}; "
                f"got {size}; all tensors must agree on {extent.name}"
            )


def _evaluate(kernel: str, expression, values: Values) -> int:
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
