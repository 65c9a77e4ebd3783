"""From a prim_func to a plan: lower and assemble it, and read from the lowered host function how its kernels are launched.

TileLang's host function computes what a launch needs from the shapes of its tensors: grids, parameters, TMA descriptors. Read
once, that is data (`plan` has its form), and no host code is left to run. What is not understood is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import tilelang
import torch
from tilelang import tvm
from tilelang.backend.target import determine_target
from tvm import tirx
from tvm.target import Target

from tilelang_ext.launch import expression
from tilelang_ext.launch.cache import cached
from tilelang_ext.launch.device import target_of
from tilelang_ext.launch.expression import Expression
from tilelang_ext.launch.plan import Launcher, Plan, launcher

ALIGNMENT = 16  # bytes: of the widest loads and of TMA
_CREATE_TILED, _SET_DEVICE = "__tvm_tensormap_create_tiled", "__tvm_set_device"
_DYNAMIC_SHARED_MEMORY = "use_dyn_shared_memory"
_DEPENDENT_LAUNCH = "use_programtic_dependent_launch"  # as TVM spells it; has no size
_BINARY = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.FloorMod: "%",
    tirx.Div: "//",  # of sizes, which are not negative
    tirx.Mod: "%",
    tirx.Min: "min",
    tirx.Max: "max",
    tirx.EQ: "==",
    tirx.NE: "!=",
    tirx.LT: "<",
    tirx.LE: "<=",
    tirx.And: "and",
    tirx.Or: "or",
}
_REVERSED = {tirx.GT: "<", tirx.GE: "<="}


@dataclass(frozen=True)
class Lowered:
    """A prim_func that was lowered for one architecture: what its plan must know, and the CUDA source of its kernels."""

    name: str
    arguments: list[dict]
    variant: dict
    source: str

    def plan(self, cubin: bytes, at: Launcher | None = None) -> Plan:
        """Return the plan of this prim_func alone, of launcher `at` or the process's."""
        plan = (at or launcher()).plan({"name": self.name, "arguments": self.arguments, "key": [], "size": 0})
        plan.add(self.variant, [cubin])
        return plan


def prepare(
    prim_func: tirx.PrimFunc,
    arch: str | None = None,
    pass_configs: Mapping | None = None,
    alignment: int | Mapping[str, int] = ALIGNMENT,
) -> Plan:
    """Compile a prim_func for NVIDIA GPUs and return its plan: call it with a torch tensor for every parameter, in order.

    `arch` is as "sm_90a"; None takes the current device's. `pass_configs` are tilelang.compile's. `alignment` is the multiple
    of bytes at which tensors start, of all or by name: less is only for kernels whose loads allow it.

    Raises NotImplementedError for prim_funcs whose launches are not data: host loops, cooperative launches, im2col.
    """
    if arch is None:
        name = str(prim_func.attrs["global_symbol"])
        if not torch.cuda.is_available():
            raise RuntimeError(f'{name}: arch must be given without a GPU; got None; pass arch="sm_90a" for an H200')
        arch = target_of(name, torch.device("cuda", torch.cuda.current_device())).arch
    key = "prim_func", prim_func.script(), arch, sorted((pass_configs or {}).items()), alignment
    lowered, cubin = compile_cached(key, lambda: prim_func, arch, pass_configs, alignment)
    return lowered.plan(cubin)


def compile_cached(
    key: tuple,
    make: Callable[[], tirx.PrimFunc],
    arch: str,
    pass_configs: Mapping | None = None,
    alignment: int | Mapping[str, int] = ALIGNMENT,
) -> tuple[Lowered, bytes]:
    """Return make(), a prim_func, lowered, and its cubin; `key` tells it apart from all others (see `cache`)."""

    def build() -> tuple[dict, bytes]:
        lowered = lower(make(), arch, pass_configs, alignment)
        return asdict(lowered), assemble(lowered.source, arch, pass_configs)

    lowered, cubin = cached(key, build)
    return Lowered(**lowered), cubin


def assemble(source: str, arch: str, pass_configs: Mapping | None = None) -> bytes:
    """Return the cubin of CUDA source, by the compiler and with the options that tilelang uses."""
    target = _target(arch)
    with tvm.transform.PassContext(opt_level=3, config=dict(pass_configs or {})) as context:
        return bytes(tvm.get_global_func("tilelang_callback_cuda_compile")(source, target, context.config))


def _target(arch: str) -> Target:
    return Target(determine_target({"kind": "cuda", "arch": arch}))


def lower(
    prim_func: tirx.PrimFunc,
    arch: str,
    pass_configs: Mapping | None = None,
    alignment: int | Mapping[str, int] = ALIGNMENT,
) -> Lowered:
    """Lower a prim_func and read how it is launched, as `prepare` does; needs no compiler and no GPU."""
    name, target = str(prim_func.attrs["global_symbol"]), _target(arch)
    with tvm.transform.PassContext(opt_level=3, config=dict(pass_configs or {})), target:
        lowered = tilelang.lower(prim_func, target=target)
    host = _only_function(name, lowered.host_mod)
    kernels = {str(kernel.attrs["global_symbol"]): kernel for kernel in lowered.device_mod.functions.values()}
    symbols = _Symbols(name, prim_func)
    tensors = [parameter for parameter in symbols.parameters if parameter.buffer is not None]
    aligned = dict.fromkeys((tensor.name for tensor in tensors), ALIGNMENT)
    aligned |= dict.fromkeys(aligned, alignment) if isinstance(alignment, int) else alignment
    variant = {
        "key": [],
        "sizes": [0, 0],
        "target": arch,
        "tensors": [symbols.tensor_rule(tensor, aligned[tensor.name]) for tensor in tensors],
        "requirements": [],
        "workspace": [],
        "constants": [],
        "steps": _read_steps(name, host, kernels, symbols),
    }
    arguments = [{"name": parameter.name, "type": parameter.type_of(name)} for parameter in symbols.parameters]
    return Lowered(name, arguments, variant, lowered.kernel_source)


def _only_function(name: str, module: tvm.IRModule) -> tirx.PrimFunc:
    functions = list(module.functions.values())
    if len(functions) != 1:
        raise NotImplementedError(f"{name}: must lower to one host function; got {len(functions)}; pass a single prim_func")
    return functions[0]


# --- parameters and symbols of a prim_func --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    name: str
    buffer: tirx.Buffer | None  # None: a scalar
    dtype: str

    def type_of(self, name: str) -> str:
        """Return the type of the plan's argument."""
        kind = "tensor" if self.buffer is not None else self.dtype.rstrip("0123456789")
        if kind not in ("tensor", "int", "uint", "float", "bool"):
            raise NotImplementedError(
                f"{name}: scalars must be integers or floats; got {self.name} {self.dtype}; pass a tensor"
            )
        return kind if kind in ("tensor", "float") else "int"


class _Symbols:
    """Where the variables of a lowered host function come from: a parameter, a tensor's extent or its stride."""

    def __init__(self, name: str, prim_func: tirx.PrimFunc):
        self.name = name
        self.parameters = [
            _Parameter(buffer.name, buffer, str(buffer.dtype))
            if (buffer := prim_func.buffer_map.get(parameter)) is not None
            else _Parameter(parameter.name, None, str(parameter.dtype))
            for parameter in prim_func.params
        ]
        self._values: list[tuple[tirx.Var, Expression]] = []
        self._scalars = {
            parameter.name: expression.fact("value", parameter.name)
            for parameter in self.parameters
            if parameter.buffer is None
        }
        tensors = [parameter for parameter in self.parameters if parameter.buffer is not None]
        extents = [(extent, expression.shape(t.name, i)) for t in tensors for i, extent in enumerate(t.buffer.shape)]
        strides = [(extent, expression.stride(t.name, i)) for t in tensors for i, extent in enumerate(t.buffer.strides)]
        for value, fact in (*extents, *strides):
            self._define(value, fact)
        for value, fact in extents:
            if isinstance(value, tirx.Mul) and isinstance(value.b, tirx.IntImm):  # the rule of this extent checks the rest
                self._define(value.a, fact // int(value.b.value))

    def _define(self, variable: tirx.PrimExpr, value: Expression) -> None:
        if isinstance(variable, tirx.Var) and self._find(variable) is None and variable.name not in self._scalars:
            self._values.append((variable, value))

    def _find(self, variable: tirx.Var) -> Expression | None:
        return next((value for known, value in self._values if known.same_as(variable)), None)

    def value(self, variable: tirx.Var) -> Expression:
        """Return the value of a variable. Lowering keeps the variables of shapes, and the names of scalars."""
        found = self._find(variable)
        if found is None:
            found = self._scalars.get(variable.name)
        if found is None:
            raise NotImplementedError(
                f"{self.name}: every symbol must be a parameter, a stride, or an extent up to a factor; got {variable.name}; "
                "give a tensor that extent"
            )
        return found

    def tensor(self, variable: tirx.Var) -> str:
        """Return the name of the tensor whose data a variable points to."""
        names = [parameter.name for parameter in self.parameters if parameter.buffer is not None]
        if variable.name not in names:
            raise NotImplementedError(
                f"{self.name}: kernels must be given memory of parameters; got {variable.name}; pass it as a tensor"
            )
        return variable.name

    def tensor_rule(self, parameter: _Parameter, alignment: int) -> dict:
        """Return the rule of a tensor: None for what any value may have, since the value defines a symbol."""
        buffer = parameter.buffer
        if buffer.dtype.bits % 8:
            raise NotImplementedError(
                f"{self.name}: tensors must have elements of whole bytes; got {parameter.name} {buffer.dtype}; pass uint8"
            )
        shape = [self._rule(value, expression.shape(parameter.name, i)) for i, value in enumerate(buffer.shape)]
        if buffer.strides:
            strides = [self._rule(value, expression.stride(parameter.name, i)) for i, value in enumerate(buffer.strides)]
        else:
            extents = [
                expression.shape(parameter.name, i) if recipe is None else Expression(recipe) for i, recipe in enumerate(shape)
            ]
            strides = [expression.recipe_of(stride) for stride in expression.contiguous_strides(extents)]
        return {"name": parameter.name, "dtype": parameter.dtype, "shape": shape, "strides": strides, "alignment": alignment}

    def _rule(self, value: tirx.PrimExpr, own: Expression):
        recipe = read_recipe(value, self)
        return None if recipe == own.recipe else recipe


def read_recipe(value: tirx.PrimExpr | int, symbols: _Symbols) -> expression.Recipe:
    """Return the recipe of an integer expression of TIR."""
    return expression.recipe_of(read_expression(value, symbols))


def read_expression(value: tirx.PrimExpr | int, symbols: _Symbols) -> Expression | int:
    """Return an integer expression of TIR as one of a plan."""
    if isinstance(value, int):
        return value
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    if isinstance(value, tirx.Var):
        return symbols.value(value)
    if isinstance(value, tirx.Cast):
        return read_expression(value.value, symbols)
    kind = type(value)
    if kind in _BINARY:
        return expression.apply(_BINARY[kind], read_expression(value.a, symbols), read_expression(value.b, symbols))
    if kind in _REVERSED:
        return expression.apply(_REVERSED[kind], read_expression(value.b, symbols), read_expression(value.a, symbols))
    if isinstance(value, tirx.Not):
        return expression.apply("not", read_expression(value.a, symbols))
    if isinstance(value, tirx.Select):
        return expression.select(
            *(read_expression(part, symbols) for part in (value.condition, value.true_value, value.false_value))
        )
    if isinstance(value, tirx.Call):
        return _read_call(value, symbols)
    raise NotImplementedError(f"{symbols.name}: sizes must be integer arithmetic; got {value}; compute it before the call")


def _read_call(call: tirx.Call, symbols: _Symbols) -> Expression | int:
    operator = str(call.op.name).rpartition(".")[2]
    operands = [read_expression(operand, symbols) for operand in call.args]
    if operator == "if_then_else":
        return expression.select(*operands)
    if operator in ("shift_left", "shift_right") and isinstance(operands[1], int):
        return expression.apply("*" if operator == "shift_left" else "//", operands[0], 1 << operands[1])
    raise NotImplementedError(f"{symbols.name}: sizes must be integer arithmetic; got {call}; compute it before the call")


# --- launches -------------------------------------------------------------------------------------------------------


def _read_steps(name: str, host: tirx.PrimFunc, kernels: Mapping[str, tirx.PrimFunc], symbols: _Symbols) -> list[dict]:
    calls = []

    def visit(node) -> None:
        if isinstance(node, (tirx.For, tirx.While, tirx.IfThenElse)):
            raise NotImplementedError(f"{name}: launches must not depend on the host; got a {type(node).__name__}; take it out")
        if isinstance(node, tirx.Call) and str(node.op.name).rpartition(".")[2] == "tvm_call_packed":
            calls.append((str(node.args[0].value), list(node.args[1:])))

    tirx.stmt_functor.post_order_visit(host.body, visit)
    steps, descriptors = [], []
    for called, arguments in calls:
        if called in kernels:
            steps.append(_read_launch(called, arguments, kernels[called], descriptors, symbols))
        elif called == _CREATE_TILED:
            descriptors.append((arguments[0], _read_tensor_map(arguments[1:], symbols)))
        elif called != _SET_DEVICE:
            raise NotImplementedError(
                f"{name}: the host must launch kernels and make TMA descriptors alone; got {called}; take it out"
            )
    if not steps:
        raise NotImplementedError(f"{name}: must launch a kernel; got a prim_func without one; use T.Kernel")
    return steps


def _read_tensor_map(arguments: list, symbols: _Symbols) -> dict:
    """Arguments: dtype, rank, address, extents, strides in bytes, box, element strides, interleave, swizzle, L2, fill."""
    dtype, rank, address, *rest = arguments
    rank = int(rank)
    extents, strides, box, element_strides = (rest[i * rank : (i + 1) * rank] for i in range(4))
    interleave, swizzle, l2_promotion, fill = (int(value) for value in rest[4 * rank :])
    return {
        "of": symbols.tensor(address),
        "offset": 0,
        "dtype": int(dtype),
        "extents": [read_recipe(value, symbols) for value in extents],
        "strides": [read_recipe(value, symbols) for value in strides[1:]],  # the first is an element
        "box": [int(value) for value in box],
        "element_strides": [int(value) for value in element_strides],
        "interleave": interleave,
        "swizzle": swizzle,
        "l2_promotion": l2_promotion,
        "fill": fill,
    }


def _read_launch(called: str, arguments: list, kernel: tirx.PrimFunc, descriptors: list, symbols: _Symbols) -> dict:
    attributes = dict(kernel.attrs.items())
    if attributes.get("use_cooperative_groups"):
        raise NotImplementedError(f"{symbols.name}: launches must not be cooperative; got {called}; use two kernels")
    tags = next(list(map(str, value)) for key, value in attributes.items() if str(key).endswith("kernel_launch_params"))
    tags = [tag for tag in tags if not tag.endswith(_DEPENDENT_LAUNCH)]
    given, sizes = arguments[: len(kernel.params)], arguments[len(kernel.params) :]
    if len(given) + len(tags) != len(arguments):
        raise NotImplementedError(
            f"{symbols.name}: a launch must have {len(tags)} sizes; got {len(sizes)}; use a known tilelang"
        )
    launch = {"launch": called, "cubin": 0, "grid": [1, 1, 1], "block": [1, 1, 1], "shared_bytes": 0}
    cluster = [1, 1, 1]
    for tag, size in zip(tags, sizes, strict=True):
        recipe = read_recipe(size, symbols)
        dimension = "xyz".find(tag[-1])
        if tag.startswith("blockIdx."):
            launch["grid"][dimension] = recipe
        elif tag.startswith("threadIdx."):
            launch["block"][dimension] = _constant(symbols.name, "threads of a block", recipe)
        elif "cluster_dim_" in tag:
            cluster[dimension] = _constant(symbols.name, "blocks of a cluster", recipe)
        elif tag.endswith(_DYNAMIC_SHARED_MEMORY):
            launch["shared_bytes"] = recipe
        else:
            raise NotImplementedError(f"{symbols.name}: a launch must have sizes that are known here; got {tag}; leave it out")
    if cluster != [1, 1, 1]:
        launch["cluster"] = cluster
    # Only a kernel that waits for the launch ahead may begin before its end.
    launch["pdl"] = int(bool(attributes.get("has_cuda_pdl_sync")))
    launch["parameters"] = [
        _read_parameter(parameter, argument, descriptors, symbols)
        for parameter, argument in zip(kernel.params, given, strict=True)
    ]
    return launch


def _constant(name: str, what: str, recipe) -> int:
    if not isinstance(recipe, int):
        raise NotImplementedError(f"{name}: {what} must be constant; got {recipe}; fix them")
    return recipe


def _read_parameter(parameter: tirx.Var, argument, descriptors: list, symbols: _Symbols) -> list:
    dtype = str(parameter.dtype)
    if dtype != "handle":
        kind = {"bool": "int32", "uint8": "int8", "uint16": "int16", "uint32": "int32", "uint64": "int64"}.get(dtype, dtype)
        return [kind, read_recipe(argument, symbols)]
    for variable, tensor_map in descriptors:
        if variable.same_as(argument):
            return ["tensor_map", tensor_map]
    if not isinstance(argument, tirx.Var):
        raise NotImplementedError(f"{symbols.name}: kernels must be given whole tensors; got {argument}; pass a view")
    return ["pointer", symbols.tensor(argument), 0]
