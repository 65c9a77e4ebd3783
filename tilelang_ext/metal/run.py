"""Run a Metal kernel on a Mac: through torch's MPS device or as an MLX custom kernel, from the same text and launch.

Nothing here runs without a Mac, and says so elsewhere; the tests cover the text, the launch shape and the order of arguments.
"""

from __future__ import annotations

import platform
import re
import struct
from collections.abc import Callable, Sequence

import torch

from tilelang_ext.metal.program import MetalProgram, as_program, slots
from tilelang_ext.program import Kernel, Parameter

_MLX_CONSTANT_ELEMENTS = 8  # MLX binds an input with fewer elements in the constant address space
_KERNEL = re.compile(
    r"(?P<attribute>\[\[max_total_threads_per_threadgroup\(\d+\)\]\]\n)?(?P<text>kernel void (?P<name>\w+)\(\n.*?\n\}\n)",
    re.DOTALL,
)
_PARAMETER = re.compile(r"^\s*(?P<type>.*?[*&\s])(?P<name>\w+)\s*\[\[\s*(?P<attribute>[\w()]+)\s*\]\][,)]?\s*$")


def to_torch(kernel) -> Callable:
    """Return `run(*arguments)` that launches `kernel` on the MPS stream; tensors on "mps", outputs written in place.

    Unlike upstream's adapter it checks the arguments, takes scalars of every type and sizes symbolic grids. Several `T.Kernel`s
    are launched in their order. Tensors that the kernel returns (`out_idx`) may be left out, and are returned.
    """
    _check_mac("to_torch", torch.backends.mps.is_available())
    program = as_program(kernel)
    _check_runs("to_torch", program)
    library = None

    def run(*arguments):
        nonlocal library
        given, outputs = program.with_outputs(arguments, device="mps")
        launches = program.bind(given, device="mps")
        if library is None:
            library = torch.mps.compile_shader(program.source)
        for launch in launches:
            if 0 in launch.grid:
                continue
            numbers = [_slot_values(launch.kernel, launch.numbers)] if launch.numbers else []
            threads = [groups * size for groups, size in zip(launch.grid, launch.threads, strict=True)]
            function = getattr(library, launch.kernel.name)
            function(*launch.tensors, *numbers, threads=threads, group_size=list(launch.threads))
        return outputs[0] if len(outputs) == 1 else outputs or None

    return run


def to_mlx(kernel, *, init_value: float | None = None) -> Callable:
    """Return `run(*inputs)` on `mx.array`s that gives the kernel's written tensors as new arrays, lazily as MLX does.

    `inputs` are the parameters that the kernel does not write, in its order (fp8 tensors as uint8 arrays, numbers for
    scalars). One output is returned by itself, several as a list in the kernel's order. `init_value` fills the outputs first; a
    kernel that reads what it writes (an atomic sum, for example) needs it, since MLX gives outputs fresh memory. Of several
    `T.Kernel`s each takes what the ones before it wrote; a tensor may be written by one of them.
    """
    mx = _import_mlx()
    program = as_program(kernel)
    _check_runs("to_mlx", program)
    inputs = [i for i in range(len(program.parameters)) if i not in program.written]
    outputs = sorted(program.written)
    _check_writes(program, init_value)
    launches = [_mlx_launch(mx, program, kernel, init_value) for kernel in program.kernels]

    def run(*arguments):
        if len(arguments) != len(inputs):
            wanted = ", ".join(program.parameters[i].name for i in inputs)
            raise TypeError(f"{program.name}: takes {len(inputs)} inputs ({wanted}); got {len(arguments)}; pass one each")
        arrays = dict(zip(inputs, arguments, strict=True))
        shapes, scalars = [None] * len(program.parameters), [None] * len(program.parameters)
        for i, argument in arrays.items():
            if program.parameters[i].shape is None:
                scalars[i] = argument
            else:
                _check_array(mx, program.name, program.parameters[i], argument)
                shapes[i] = tuple(argument.shape)
        values = program.resolve(shapes, scalars)
        for launch in launches:
            arrays.update(launch(arrays, values))
        ordered = [arrays[i] for i in outputs]
        return ordered[0] if len(ordered) == 1 else ordered

    return run


def _check_writes(program: MetalProgram, init_value: float | None) -> None:
    """Refuse what MLX's outputs, which are new arrays, cannot be."""
    tensors = [*program.parameters, *program.scratch]
    if init_value is None and program.read_and_written:
        changed = ", ".join(program.parameters[i].name for i in sorted(program.read_and_written))
        raise ValueError(
            f"to_mlx: {changed} is read and written, and MLX outputs start undefined; got init_value=None; pass one"
        )
    for i, tensor in enumerate(tensors):
        writers = [kernel.name for kernel in program.kernels if i in kernel.written]
        if len(writers) > 1:
            raise NotImplementedError(
                f"to_mlx: a tensor may be written by one T.Kernel, since MLX gives outputs fresh memory; got {tensor.name}, "
                f"which {' and '.join(writers)} write; write another tensor, or use to_torch"
            )


def _mlx_launch(mx, program: MetalProgram, kernel: Kernel, init_value: float | None) -> Callable:
    """Return `launch(arrays, values)` of one kernel, which gives the arrays that it writes by their index."""
    header, body, names = _split(program, kernel)
    sources = kernel.tensors
    tensors = [*program.parameters, *program.scratch]
    has_scalars = len(sources) < len(kernel.bindings)
    read = [i for i in sources if i not in kernel.written]
    written = [i for i in sources if i in kernel.written]
    name_of = dict(zip(sources, names, strict=True))
    compiled = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=[name_of[i] for i in read] + ["argument_slots"] * has_scalars,
        output_names=[name_of[i] for i in written],
        header=header,
        source=body,
    )

    def launch(arrays, values):
        bound = [_at_least_constant_size(mx, arrays[i]) for i in read]
        if has_scalars:
            bound.append(mx.array(_slot_values(kernel, kernel.numbers(values)), dtype=mx.int64))
        grid = kernel.launch_grid(values)
        made = {
            "output_shapes": [program.passed_shape(tensors[i], values) for i in written],
            "output_dtypes": [getattr(mx, _mlx_dtype(tensors[i].dtype)) for i in written],
        }
        if 0 in grid:
            results = [mx.full(shape, init_value or 0, dtype=dtype) for shape, dtype in zip(*made.values(), strict=True)]
        else:
            threads = tuple(groups * size for groups, size in zip(grid, kernel.threads, strict=True))
            results = compiled(inputs=bound, grid=threads, threadgroup=kernel.threads, init_value=init_value, **made)
        return dict(zip(written, results, strict=True))

    return launch


def _check_mac(function: str, has_metal: bool) -> None:
    if not has_metal:
        raise RuntimeError(
            f"{function}: needs a Mac, whose GPU runs the kernel; got {platform.system()} without Metal; "
            "run the same text here with tilelang_ext.simulate(kernel, *tensors)"
        )


def _import_mlx():
    try:
        import mlx.core as mx
    except ImportError:
        _check_mac("to_mlx", platform.system() == "Darwin")
        raise ImportError("to_mlx: needs MLX; got none installed; run `pip install mlx`") from None
    _check_mac("to_mlx", mx.metal.is_available())
    return mx


def _check_runs(function: str, program: MetalProgram) -> None:
    """Refuse what the text holds for the simulator alone; as a Mac's compiler does, which meets an #error."""
    for word, operator in (("TL_ASSERT(", "T.device_assert"), ("debug_print_", "T.print")):
        if word in program.source:
            raise NotImplementedError(
                f"{function}: {operator} works in the simulator only; got a kernel that has it; "
                f"run it with tilelang_ext.simulate, or take {operator} out"
            )


def _slot_values(kernel: Kernel, numbers: Sequence[int | float]) -> list[int]:
    """Return the slots of the struct of scalars as int64, the one type of 8 bytes that both libraries pass."""
    packed = slots(kernel, numbers)
    return list(struct.unpack(f"<{len(packed) // 8}q", packed))


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


def _split(program: MetalProgram, kernel: Kernel) -> tuple[str, str, list[str]]:
    """Split a program's text into what stands before its kernels, the body of one of them for MLX, which writes the signature
    itself, and the names of that kernel's tensors in binding order.

    MLX declares the buffers under the names we give and every attribute that the body mentions under its own name.
    """
    header = _KERNEL.sub("", program.source)
    text = next(match["text"] for match in _KERNEL.finditer(program.source) if match["name"] == kernel.name)
    opening = text.index(") {\n")
    prologue, names = [], []
    for line in text[text.index("(") + 1 : opening + 1].splitlines():
        match = _PARAMETER.match(line)
        if not match:
            continue
        kind, name, attribute = match["type"].strip(), match["name"], match["attribute"]
        if not attribute.startswith("buffer("):
            prologue.append(f"const {kind} {name} = {attribute};")
        elif kind.endswith("&"):  # the struct of scalars
            struct_name = kind.removesuffix("&").split()[-1]
            scalars = sum(not binding.is_tensor for binding in kernel.bindings)
            space = "constant" if scalars < _MLX_CONSTANT_ELEMENTS else "device"
            prologue.append(f"const {struct_name} {name} = *(const {space} {struct_name}*)argument_slots;")
        else:
            names.append(name)
    return header, "".join(f"  {line}\n" for line in prologue) + text[opening + len(") {\n") : text.rindex("}")], names
