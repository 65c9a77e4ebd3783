"""Run a Metal kernel on a Mac: through torch's MPS device or as an MLX custom kernel, from the same text and launch.

Nothing here runs without a Mac; the tests cover the text, the launch shape and the order of arguments.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence

import torch

from tilelang_ext.metal.program import MetalProgram, as_program
from tilelang_ext.program import Parameter

_MLX_CONSTANT_ELEMENTS = 8  # MLX binds an input with fewer elements in the constant address space
_PARAMETER = re.compile(r"^\s*(?P<type>.*?[*&\s])(?P<name>\w+)\s*\[\[\s*(?P<attribute>[\w()]+)\s*\]\][,)]?\s*$")


def to_torch(kernel) -> Callable:
    """Return `run(*arguments)` that launches `kernel` on the MPS stream; tensors on "mps", outputs written in place.

    Unlike upstream's adapter it checks the arguments, takes scalars of every type and sizes symbolic grids.
    """
    program = as_program(kernel)
    function = None

    def run(*arguments) -> None:
        nonlocal function
        launch = program.bind(arguments, device="mps")
        if function is None:
            function = getattr(torch.mps.compile_shader(program.source), program.name)
        slots = [_slot_values(program, launch.numbers)] if launch.numbers else []
        threads = [groups * size for groups, size in zip(launch.grid, launch.threads, strict=True)]
        function(*launch.tensors, *slots, threads=threads, group_size=list(launch.threads))

    return run


def to_mlx(kernel, *, init_value: float | None = None) -> Callable:
    """Return `run(*inputs)` on `mx.array`s that gives the kernel's written tensors as new arrays, lazily as MLX does.

    `inputs` are the parameters that the kernel does not write, in its order (fp8 tensors as uint8 arrays, numbers for
    scalars). One output is returned by itself, several as a list in the kernel's order. `init_value` fills the outputs first; a
    kernel that reads what it writes (an atomic sum, for example) needs it, since MLX gives outputs fresh memory.
    """
    import mlx.core as mx

    program = as_program(kernel)
    header, body, names = _split(program)
    inputs = [i for i in range(len(program.parameters)) if i not in program.written]
    outputs = sorted(program.written)
    if init_value is None and program.read_and_written:
        changed = ", ".join(program.parameters[i].name for i in sorted(program.read_and_written))
        raise ValueError(
            f"to_mlx: {changed} is read and written, and MLX outputs start undefined; got init_value=None; pass one"
        )
    tensors = [(name, b.parameter) for name, b in zip(names, (b for b in program.bindings if b.is_tensor), strict=True)]
    bound_inputs = [i for _, i in tensors if i not in program.written]
    bound_outputs = [i for _, i in tensors if i in program.written]
    has_scalars = len(tensors) < len(program.bindings)
    compiled = mx.fast.metal_kernel(
        name=program.name,
        input_names=[name for name, i in tensors if i not in program.written] + ["argument_slots"] * has_scalars,
        output_names=[name for name, i in tensors if i in program.written],
        header=header,
        source=body,
    )

    def run(*arguments):
        if len(arguments) != len(inputs):
            wanted = ", ".join(program.parameters[i].name for i in inputs)
            raise TypeError(f"{program.name}: takes {len(inputs)} inputs ({wanted}); got {len(arguments)}; pass one each")
        given = dict(zip(inputs, arguments, strict=True))
        shapes, scalars = [None] * len(program.parameters), [None] * len(program.parameters)
        for i, argument in given.items():
            if program.parameters[i].shape is None:
                scalars[i] = argument
            else:
                _check_array(mx, program.name, program.parameters[i], argument)
                shapes[i] = tuple(argument.shape)
        values = program.resolve(shapes, scalars)
        bound = [_at_least_constant_size(mx, given[i]) for i in bound_inputs]
        if has_scalars:
            bound.append(mx.array(_slot_values(program, program.numbers(values)), dtype=mx.int64))
        results = compiled(
            inputs=bound,
            grid=tuple(groups * size for groups, size in zip(program.launch_grid(values), program.threads, strict=True)),
            threadgroup=program.threads,
            output_shapes=[program.passed_shape(program.parameters[i], values) for i in bound_outputs],
            output_dtypes=[getattr(mx, _mlx_dtype(program.parameters[i].dtype)) for i in bound_outputs],
            init_value=init_value,
        )
        by_parameter = dict(zip(bound_outputs, results, strict=True))
        ordered = [by_parameter[i] for i in outputs]
        return ordered[0] if len(ordered) == 1 else ordered

    return run


def _slot_values(program: MetalProgram, numbers: Sequence[int | float]) -> list[int]:
    """Return the slots of the struct of scalars as int64, the one type of 8 bytes that both libraries pass."""
    slots = program.slots(numbers)
    return list(struct.unpack(f"<{len(slots) // 8}q", slots))


def _mlx_dtype(dtype: str) -> str:
    if dtype.startswith("float8") or dtype.startswith("float4"):
        return "uint8"
    return "bool_" if dtype == "bool" else dtype


def _check_array(mx, kernel: str, parameter: Parameter, array) -> None:
    if not isinstance(array, mx.array):
        raise TypeError(f"{kernel}: {parameter.name} must be an mx.array; got {type(array).__name__}; convert it with mx.array")
    if parameter.strides is not None:
        raise NotImplementedError(
            f"{kernel}: {parameter.name} must be contiguous for MLX, whose arrays have no strides of their own; got declared "
            f"strides {parameter.strides}; declare a T.Tensor"
        )
    expected = getattr(mx, _mlx_dtype(parameter.dtype))
    if array.dtype != expected:
        raise TypeError(f"{kernel}: {parameter.name} must be {expected}; got {array.dtype}; convert it with .astype or .view")


def _at_least_constant_size(mx, array):
    if array.size >= _MLX_CONSTANT_ELEMENTS:
        return array
    return mx.concatenate([array.reshape(-1), mx.zeros((_MLX_CONSTANT_ELEMENTS - array.size,), dtype=array.dtype)])


def _split(program: MetalProgram) -> tuple[str, str, list[str]]:
    """Split a kernel's text into what stands before it, a body for MLX, which writes the signature itself, and the names
    of the tensors in binding order.

    MLX declares the buffers under the names we give and every attribute that the body mentions under its own name.
    """
    start = program.source.index("kernel void ")
    opening = program.source.index(") {\n", start)
    header = program.source[:start].rpartition("[[max_total_threads_per_threadgroup")[0] or program.source[:start]
    prologue, names = [], []
    for line in program.source[program.source.index("(", start) + 1 : opening + 1].splitlines():
        match = _PARAMETER.match(line)
        if not match:
            continue
        kind, name, attribute = match["type"].strip(), match["name"], match["attribute"]
        if not attribute.startswith("buffer("):
            prologue.append(f"const {kind} {name} = {attribute};")
        elif kind.endswith("&"):  # the struct of scalars
            struct_name = kind.removesuffix("&").split()[-1]
            scalars = sum(not binding.is_tensor for binding in program.bindings)
            space = "constant" if scalars < _MLX_CONSTANT_ELEMENTS else "device"
            prologue.append(f"const {struct_name} {name} = *(const {space} {struct_name}*)argument_slots;")
        else:
            names.append(name)
    body = program.source[opening + len(") {\n") : program.source.rindex("}")]
    return header, "".join(f"  {line}\n" for line in prologue) + body, names
