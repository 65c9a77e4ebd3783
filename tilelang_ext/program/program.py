"""A lowered function as data, for any target: its text, what each parameter of its kernels is, and what one call launches.

A user's function has parameters, tensors and scalars. Each `T.Kernel` in it becomes a kernel with parameters of its own: those
tensors, memory that the function allocates (`T.alloc_global`), those scalars, and the extents of symbolic shapes, in an order
that the target decides. Which is which is settled by identity (`host_calls`), since tracing may give two variables one name. A
call resolves every symbolic extent once (`resolve`); the grids, the kernels' numbers and the checks of shapes read that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tvm import tirx

from tilelang_ext.program.arguments import (
    Parameter,
    Values,
    bind_sizes,
    check_scalar,
    check_tensor,
    evaluate,
    packed,
    torch_dtype,
    unpacked,
)


@dataclass(frozen=True)
class Binding:
    """One parameter of a kernel and its source.

    The source of a tensor is its index among the user's parameters and, behind them, the function's scratch memory; that of a
    number is an expression of the user's scalars and symbolic extents.
    """

    var: tirx.Var
    source: int | tirx.PrimExpr

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.source, int)


@dataclass(frozen=True)
class Kernel:
    """One `T.Kernel` of a function: its parameters in its order, the tensors that it reads and writes, and its launch.

    `read` and `written` are indices as `Binding` has them. `grid` may hold expressions of the kernel's numbers.
    `dynamic_shared_bytes` is shared memory per block that the launch asks for.
    """

    name: str
    bindings: tuple[Binding, ...]
    read: frozenset[int]
    written: frozenset[int]
    grid: tuple
    threads: tuple[int, int, int]
    dynamic_shared_bytes: int

    @property
    def tensors(self) -> tuple[int, ...]:
        """The sources of the kernel's tensors, in its order."""
        return tuple(binding.source for binding in self.bindings if binding.is_tensor)

    def numbers(self, values: Values) -> tuple[int | float, ...]:
        """Return the kernel's scalars and extents under `values`, in its order."""
        return tuple(evaluate(self.name, b.source, values) for b in self.bindings if not b.is_tensor)

    def launch_grid(self, values: Values) -> tuple[int, int, int]:
        """Return the number of blocks along each axis under `values`."""
        own = {b.var: evaluate(self.name, b.source, values) for b in self.bindings if not b.is_tensor}
        return tuple(evaluate(self.name, extent, {**values, **own}) for extent in self.grid)


@dataclass(frozen=True)
class Launch:
    """One launch with everything bound: tensors and numbers in the kernel's order, and blocks of the grid."""

    kernel: Kernel
    arguments: tuple[torch.Tensor | int | float, ...]
    grid: tuple[int, int, int]

    @property
    def threads(self) -> tuple[int, int, int]:
        """Threads per block along each axis."""
        return self.kernel.threads

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

    `source` is the whole text, `parameters` the user's parameters, `scratch` memory that a call allocates, `kernels` the
    kernels in the order in which a call launches them. `returned` are the indices of the parameters that a caller may leave
    out, since the function returns them (`out_idx`, or `T.empty` in an eager function).
    """

    source: str
    parameters: tuple[Parameter, ...]
    scratch: tuple[Parameter, ...]
    kernels: tuple[Kernel, ...]
    returned: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the first kernel, by which messages name the function."""
        return self.kernels[0].name

    @property
    def written(self) -> frozenset[int]:
        """The indices of the parameters that a kernel writes."""
        return frozenset(i for kernel in self.kernels for i in kernel.written if i < len(self.parameters))

    @property
    def read_and_written(self) -> frozenset[int]:
        """The indices of the written parameters whose values before the call may be read."""
        first = {i: next(k for k in self.kernels if i in k.read | k.written) for i in self.written}
        return frozenset(i for i, kernel in first.items() if i in kernel.read)

    def with_outputs(self, arguments: Sequence, *, device: str) -> tuple[tuple, tuple[torch.Tensor, ...]]:
        """Return all arguments of a call, with new tensors for those that it leaves out and returns, and those tensors."""
        if not self.returned or len(arguments) != len(self.parameters) - len(self.returned):
            return tuple(arguments), ()
        rest = iter(arguments)
        given = [None if i in self.returned else next(rest) for i in range(len(self.parameters))]
        values = self.resolve(
            [tuple(a.shape) if isinstance(a, torch.Tensor) else None for a in given],
            [a if p.shape is None else None for p, a in zip(self.parameters, given, strict=True)],
        )
        for i in self.returned:
            given[i] = self._empty(self.parameters[i], values, device)
        return tuple(given), tuple(given[i] for i in self.returned)

    def bind(self, arguments: Sequence, *, device: str) -> tuple[Launch, ...]:
        """Check torch `arguments` (the user's order) against the parameters and return what to launch, in order.

        Raises TypeError for a wrong count, kind or dtype and ValueError for a wrong shape, stride or device.
        """
        if len(arguments) != len(self.parameters):
            names = ", ".join(p.name for p in self.parameters)
            raise TypeError(
                f"{self.name}: takes {len(self.parameters)} arguments ({names}); got {len(arguments)}; pass one each"
            )
        for parameter, argument in zip(self.parameters, arguments, strict=True):
            if parameter.shape is not None:
                check_tensor(self.name, parameter, argument, device)
        given = list(zip(self.parameters, arguments, strict=True))
        values = self.resolve(
            [None if p.shape is None else tuple(a.shape) for p, a in given],
            [a if p.shape is None else None for p, a in given],
            [None if p.strides is None else a.stride() for p, a in given],
        )
        tensors = [self._memory(p, a, values) if p.shape is not None else None for p, a in given]
        tensors += [self._empty(parameter, values, device) for parameter in self.scratch]
        return tuple(self._launch(kernel, tensors, values) for kernel in self.kernels)

    def _launch(self, kernel: Kernel, tensors: Sequence[torch.Tensor], values: Values) -> Launch:
        numbers = iter(kernel.numbers(values))
        arguments = tuple(tensors[b.source] if b.is_tensor else next(numbers) for b in kernel.bindings)
        return Launch(kernel, arguments, kernel.launch_grid(values))

    def resolve(
        self,
        shapes: Sequence[tuple[int, ...] | None],
        scalars: Sequence,
        strides: Sequence[tuple[int, ...] | None] | None = None,
    ) -> Values:
        """Return the number of every scalar and symbolic extent of the user's function.

        One shape per tensor, that of what is passed, its strides where the function declares some, and one number per scalar,
        None elsewhere, in the user's order. A tensor whose shape is None (an output yet to be made) has extents that the others
        determine. Raises ValueError where shapes disagree.
        """
        shapes = [unpacked(p, shape) for p, shape in zip(self.parameters, shapes, strict=True)]
        strides = strides or [None] * len(shapes)
        values: dict[tirx.Var, object] = {}
        for parameter, scalar in zip(self.parameters, scalars, strict=True):
            if parameter.shape is None:
                values[parameter.var] = check_scalar(self.name, parameter, scalar)
        # Plain variables first, so that an expression of two has one unknown.
        sized = [(p, "shape", s) for p, s in zip(self.parameters, shapes, strict=True) if s is not None]
        sized += [(p, "strides", s) for p, s in zip(self.parameters, strides, strict=True) if s is not None]
        for _ in range(2):
            for parameter, what, sizes in sized:
                bind_sizes(self.name, parameter, what, sizes, values)
        for parameter, shape in zip(self.parameters, shapes, strict=True):
            if shape is not None and self.shape(parameter, values) != tuple(shape):
                wanted, given = self.passed_shape(parameter, values), packed(parameter, shape)
                raise ValueError(f"{self.name}: {parameter.name} must have shape {wanted}; got {given}; pass that shape")
        return values

    def shape(self, parameter: Parameter, values: Values) -> tuple[int, ...]:
        """Return the shape of a tensor parameter under `values`."""
        return tuple(evaluate(self.name, extent, values) for extent in parameter.shape)

    def passed_shape(self, parameter: Parameter, values: Values) -> tuple[int, ...]:
        """Return the shape of the tensor that is passed for a parameter under `values`: of FP4 codes, that of their bytes."""
        return packed(parameter, self.shape(parameter, values))

    def _empty(self, parameter: Parameter, values: Values, device: str) -> torch.Tensor:
        return torch.empty(self.passed_shape(parameter, values), dtype=torch_dtype(parameter), device=device)

    def _memory(self, parameter: Parameter, argument: torch.Tensor, values: Values) -> torch.Tensor:
        """Return `argument` as the kernel takes it, one piece of memory; ValueError for other strides than the declared."""
        if parameter.strides is None:
            return argument
        wanted = tuple(evaluate(self.name, stride, values) for stride in parameter.strides)
        if any(size > 1 and a != b for size, a, b in zip(argument.shape, wanted, argument.stride(), strict=True)):
            raise ValueError(
                f"{self.name}: {parameter.name} must have strides {wanted}; got {argument.stride()}; pass a view that has them"
            )
        last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        return argument.as_strided((last + 1 if argument.numel() else 0,), (1,))
