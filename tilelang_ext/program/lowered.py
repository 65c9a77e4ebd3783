"""What a lowered module says: which kernels the host calls, in which order, and with which of the user's parameters.

def f(A: Tensor((n * 4,)), C: Tensor((n * 4,))):       f_kernel(A, S, n)          first call: A, scratch S, the number n
    S = alloc_global((n * 4,)); two T.Kernel           f_kernel_1(C, S, n)        second call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tilelang
from tvm import IRModule, arith, tirx
from tvm.ir import GlobalVar
from tvm.ir.instrument import pass_instrument
from tvm.ir.transform import PassContext

from tilelang_ext.program.arguments import Parameter
from tilelang_ext.program.program import Binding, Kernel

_CONDITIONS = "tilelang_ext.conditions"  # an attribute: what `passes/hidden_conditions.py` took out of the body


@dataclass(frozen=True)
class HostCalls:
    """The calls that a function makes of its kernels.

    `scratch` is memory that the function allocates for a call (`T.alloc_global`). `arguments` has, by the name of each kernel
    and in order of the calls, one entry per argument: the index of a tensor among the parameters and the scratch memory behind
    them, or a number as an expression of the user's scalars and symbolic extents.
    """

    scratch: tuple[Parameter, ...]
    arguments: Mapping[str, tuple[int | tirx.PrimExpr, ...]]


def lower_function(
    func: tirx.PrimFunc,
    target,
    order: Callable[[tirx.PrimFunc, HostCalls], HostCalls] | None = None,
    kernel=None,
) -> dict[str, object]:
    """Lower the user's `func` and return the fields of its `Program`.

    `order` says in which order a target's pass list gives kernels their arguments; `kernel` is what the user had `func` from,
    which may return some of its parameters.
    """
    split = _AfterSplit()
    with split.context():
        artifact = tilelang.lower(func, target=target)
    calls = host_calls(split.module, func)
    return {
        "source": artifact.kernel_source,
        "parameters": read_parameters(func),
        "scratch": calls.scratch,
        "kernels": read_kernels(artifact.device_mod, order(func, calls) if order else calls),
        "returned": _returned(func, kernel),
    }


@pass_instrument
class _AfterSplit:
    """Keeps the module as a pass list has it right after SplitHostDevice, for `host_calls`."""

    def __init__(self) -> None:
        self.module: IRModule | None = None

    def run_after_pass(self, mod: IRModule, info) -> None:
        if info.name == "tl.SplitHostDevice":
            self.module = mod

    def context(self) -> PassContext:
        """Return the caller's pass context with this instrument."""
        current = PassContext.current()
        return PassContext(
            current.opt_level,
            required_pass=list(current.required_pass),
            disabled_pass=list(current.disabled_pass),
            instruments=[*(current.instruments or []), self],
            config=dict(current.config),
        )


def _returned(func: tirx.PrimFunc, kernel) -> tuple[int, ...]:
    """Return the indices of the parameters that the function returns: `out_idx`, or `T.empty` of an eager function."""
    if func.attrs and "tilelang_out_idx" in func.attrs:
        indices = [int(i) for i in func.attrs["tilelang_out_idx"]]
    else:
        given = getattr(kernel, "out_idx", None)
        indices = [given] if isinstance(given, int) else list(given or ())
    return tuple(sorted(i % len(func.params) for i in indices))


def function_of(kernel, program: str, arguments: tuple = ()) -> tirx.PrimFunc:
    """Return the prim_func of what a user calls a kernel; TypeError, which names the class `program`, for anything else.

    An eager function of `@tilelang.jit` has one for the `arguments` of a call.
    """
    func = kernel
    if not isinstance(kernel, tirx.PrimFunc):
        func = kernel.get_tir(*arguments) if hasattr(kernel, "get_tir") else getattr(kernel, "prim_func", None)
    if not isinstance(func, tirx.PrimFunc):
        raise TypeError(
            f"tilelang_ext: a kernel must be a prim_func, a compiled tilelang kernel, a @tilelang.jit function or a {program}; "
            f"got {type(kernel).__name__}; pass the function decorated with @T.prim_func"
        )
    return func


def read_parameters(func: tirx.PrimFunc) -> tuple[Parameter, ...]:
    """Return the parameters of the user's function."""
    parameters = []
    for param in func.params:
        if param in func.buffer_map:
            parameters.append(_tensor(func.buffer_map[param], param))
        else:
            parameters.append(Parameter(param.name, str(param.dtype), None, param))
    return tuple(parameters)


def host_calls(mod: IRModule, func: tirx.PrimFunc) -> HostCalls:
    """Return what the host of the user's `func` calls, from a module right after SplitHostDevice.

    There the host still calls its kernels with its own variables, so each argument is settled by identity. Raises
    NotImplementedError where a kernel is launched in a loop or under a condition of the host.
    """
    host = next(f for name, f in mod.functions_items() if name.name_hint == func.attrs["global_symbol"])
    reader = _HostReader(host)
    reader.visit(host.body)
    renamed = _renamed_variables(host, func)
    arguments = {}
    for call in reader.calls:
        name = call.op.name_hint
        given = call.args[: len(mod[call.op].params)]
        arguments[name] = tuple(reader.source(argument, renamed) for argument in given)
    scratch = [_tensor(buffer, buffer.data, renamed) for buffer in reader.scratch]
    return HostCalls(tuple(scratch), arguments)


class _HostReader:
    """Collects the calls of kernels, the memory and the bound variables of a host function."""

    def __init__(self, host: tirx.PrimFunc):
        self.host, self.calls, self.scratch = host, [], []
        self.bound: dict[tirx.Var, tirx.PrimExpr] = {}

    def visit(self, stmt: tirx.Stmt) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for part in stmt:
                self.visit(part)
        elif isinstance(stmt, tirx.AttrStmt):
            self.visit(stmt.body)
        elif isinstance(stmt, tirx.AllocBuffer):
            self.scratch.append(stmt.buffer)
        elif isinstance(stmt, tirx.Bind):
            self.bound[stmt.var] = tirx.stmt_functor.substitute(stmt.value, self.bound)
        elif isinstance(stmt, tirx.Evaluate) and _is_kernel_call(stmt.value):
            self.calls.append(stmt.value)
        else:
            tirx.stmt_functor.post_order_visit(stmt, self._refuse)

    def _refuse(self, node) -> None:
        if _is_kernel_call(node):
            raise NotImplementedError(
                f"{node.op.name_hint}: a T.Kernel must stand at the top of the prim_func; got one in a loop or under a "
                "condition; put the loop or the condition into the kernel"
            )

    def source(self, argument: tirx.PrimExpr, renamed: Mapping) -> int | tirx.PrimExpr:
        tensors = [self.host.buffer_map[p].data if p in self.host.buffer_map else None for p in self.host.params]
        for index, data in enumerate([*tensors, *(buffer.data for buffer in self.scratch)]):
            if data is not None and data.same_as(argument):
                return index
        return tirx.stmt_functor.substitute(tirx.stmt_functor.substitute(argument, self.bound), renamed)


def _is_kernel_call(node) -> bool:
    return isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar)


def _renamed_variables(host: tirx.PrimFunc, func: tirx.PrimFunc) -> dict[tirx.Var, tirx.Var]:
    """Return the user's variable for each variable of the lowered host function, where a pass has made another of it."""
    renamed = {}
    for ours, theirs in zip(host.params, func.params, strict=True):
        pairs = [(ours, theirs)]
        if ours in host.buffer_map:
            a, b = host.buffer_map[ours], func.buffer_map[theirs]
            pairs += [*zip(a.shape, b.shape, strict=True), *zip(a.strides, b.strides, strict=False)]
        for a, b in pairs:
            for x, y in zip(_variables(a), _variables(b), strict=False):
                if not x.same_as(y):
                    renamed[x] = y
    return renamed


def _variables(expression: tirx.PrimExpr) -> list[tirx.Var]:
    found = []
    tirx.stmt_functor.post_order_visit(expression, lambda node: found.append(node) if isinstance(node, tirx.Var) else None)
    return found


def read_kernels(device_mod: IRModule, calls: HostCalls) -> tuple[Kernel, ...]:
    """Return the kernels of a lowered module in the order of their calls."""
    kernels = {str(func.attrs["global_symbol"]): func for _, func in device_mod.functions_items()}
    return tuple(_read_kernel(kernels[name], arguments) for name, arguments in calls.arguments.items())


def _read_kernel(kernel: tirx.PrimFunc, arguments: tuple[int | tirx.PrimExpr, ...]) -> Kernel:
    bindings = tuple(Binding(var, argument) for var, argument in zip(kernel.params, arguments, strict=True))
    read_only = {int(i) for i in kernel.attrs.get("tl.readonly_param_indices", [])}
    read = _read_tensors(kernel)
    tensors = [(i, binding) for i, binding in enumerate(bindings) if binding.is_tensor]
    extents = kernel.attrs["thread_extent"]
    return Kernel(
        name=str(kernel.attrs["global_symbol"]),
        bindings=bindings,
        read=frozenset(binding.source for i, binding in tensors if i in read_only or binding.var in read),
        written=frozenset(binding.source for i, binding in tensors if i not in read_only),
        grid=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"),
        threads=tuple(int(extents.get(f"threadIdx.{axis}", 1)) for axis in "xyz"),
        dynamic_shared_bytes=int(kernel.attrs.get("dyn_shared_memory_buf", 0)),
    )


def _read_tensors(kernel: tirx.PrimFunc) -> set[tirx.Var]:
    read = set()

    def visit(node):
        if isinstance(node, tirx.BufferLoad):  # loads, and addresses that atomics take
            read.add(node.buffer.data)

    tirx.stmt_functor.post_order_visit(kernel.body, visit)
    for condition in kernel.attrs.get(_CONDITIONS, {}).values():
        tirx.stmt_functor.post_order_visit(condition, visit)
    return read


def _tensor(buffer: tirx.Buffer, var: tirx.Var, renamed: Mapping | None = None) -> Parameter:
    def extent(expression):
        if isinstance(expression, tirx.IntImm):
            return int(expression)
        return tirx.stmt_functor.substitute(expression, renamed) if renamed else expression

    shape = tuple(extent(e) for e in buffer.shape)
    return Parameter(buffer.name, str(buffer.dtype), shape, var, _declared_strides(buffer))


def _declared_strides(buffer: tirx.Buffer) -> tuple | None:
    """Return the strides of a buffer, None where they are those of a contiguous tensor."""
    analyzer, contiguous = arith.Analyzer(), True
    step = tirx.const(1)
    for extent, stride in zip(reversed(buffer.shape), reversed(buffer.strides), strict=True) if buffer.strides else ():
        contiguous = contiguous and analyzer.can_prove_equal(stride, step)
        step = step * extent
    return None if contiguous else tuple(int(s) if isinstance(s, tirx.IntImm) else s for s in buffer.strides)
