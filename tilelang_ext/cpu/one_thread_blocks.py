"""Turn a GPU's tile program into one that a single thread runs, block after block.

    Before  A_s = alloc_buffer((32, 64), scope="shared.dyn")      After  ... scope="local"
            C_f = alloc_buffer((32, 32), scope="local.fragment")         ... scope="local"
            "layout_map": {A_s: ...}                                     -

Layouts are about banks and lanes, and one thread has neither: every tile becomes an array of its own, in row-major order. The
rest of the program keeps its meaning, except for instructions that communicate with other threads; those are refused.
"""

from __future__ import annotations

import math

from tvm import IRModule, tirx
from tvm.ir import Op, PointerType
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.cpu.narrow_floats import is_carried
from tilelang_ext.cpu.scans import has_scans
from tilelang_ext.passes.wide_indices import is_large

_TILES = ("shared", "shared.dyn", "local.fragment")
_TILE_OPERATORS = ("copy", "async_copy", "fill", "gemm", "reduce", "transpose", "atomicadd", "atomicmax", "atomicmin")
# Fast math functions and their exact versions.
_EXACT = {f"tl.__{name}": Op.get(f"tirx.{name}") for name in ("exp", "exp10", "log", "log2", "log10", "sin", "cos", "tan")}

# Functions that upstream's generator has for scalars only.
_FUNCTIONS = {
    *(f"tirx.{name}" for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "call_pure_extern", "ceil", "copysign", "cos", "cosh",
        "erf", "exp", "exp10", "exp2", "fabs", "floor", "fmod", "hypot", "isnan", "ldexp", "log", "log10", "log1p", "log2",
        "nearbyint", "nextafter", "pow", "reinterpret", "round", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
        "trunc",
    )),
    *_EXACT,
}  # fmt: skip

_COMPUTED = ("float32", "float64", "int32", "int64", "uint32", "uint64")  # types whose vectors upstream adds and multiplies


def _name(node) -> str:
    """Return the operator's name of a call, "" for any other node."""
    return node.op.name if isinstance(node, tirx.Call) and isinstance(node.op, Op) else ""


def needs_one_thread_blocks(func: tirx.PrimFunc) -> bool:
    """Whether upstream's lowering for `c` would refuse `func`, or get its indices wrong: it has fragments, fp8, bfloat16,
    several dynamic shared buffers, a fill of shared memory, a scan, a function of halves, or a tensor of more elements than 32
    bits count."""
    buffers = [*func.buffer_map.values()]
    dtypes = set()
    filled, half_functions = [], []

    def visit(node):
        if isinstance(node, tirx.SBlock):
            buffers.extend(node.alloc_buffers)
        if isinstance(node, tirx.Cast):
            dtypes.add(str(node.dtype))
        if isinstance(node, tirx.Call) and str(node.dtype) == "float16" and _name(node) in _FUNCTIONS:
            half_functions.append(node)
        if _name(node) == "tl.tileop.fill":
            filled.append(node.args[0].args[0].buffer.scope())

    tirx.stmt_functor.post_order_visit(func.body, visit)
    dtypes.update(str(buffer.dtype) for buffer in buffers)
    scopes = [buffer.scope() for buffer in buffers]
    return (
        "local.fragment" in scopes
        or bool(half_functions)
        or has_scans(func)
        or scopes.count("shared.dyn") > 1
        or any(scope.startswith("shared") for scope in filled)
        or any(is_large(buffer) for buffer in buffers)
        or any(is_carried(dtype) and dtype != "float16" for dtype in dtypes)
    )


def needs_scalars(mod: IRModule) -> bool:
    """Whether upstream's generator cannot print vectors of `mod`: its vectors have + - * / and copies of one type, no more."""
    found = []

    def visit(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, Op):
            found.append(node.op.name in _FUNCTIONS or _converts(node))
        elif isinstance(node, tirx.BufferLoad | tirx.BufferStore):
            found.append(str(node.buffer.dtype) == "bool")
        elif isinstance(node, tirx.For) and node.kind in (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED):
            found.append(_stores_what_has_no_vector(node))

    for func in mod.functions.values():
        tirx.stmt_functor.post_order_visit(func.body, visit)
    return any(found)


def _converts(call: tirx.Call) -> bool:
    """Whether a copy converts."""
    if call.op.name != "tl.tileop.copy":
        return False
    source, destination = (str(region.args[0].buffer.dtype) for region in call.args[:2])
    return source != destination


def _stores_what_has_no_vector(loop: tirx.For) -> bool:
    variables, stores = set(), []

    def visit(node):
        if isinstance(node, tirx.For):
            variables.add(node.loop_var)
        elif isinstance(node, tirx.BufferStore):
            stores.append(node)

    tirx.stmt_functor.post_order_visit(loop, visit)
    return not all(_has_vector(store.value, str(store.buffer.dtype), variables) for store in stores)


def _has_vector(value: tirx.PrimExpr, dtype: str, variables: set) -> bool:
    """Whether upstream prints a vector of such values, where `variables` are those of the loop."""
    if str(value.dtype) != dtype:
        return False
    if isinstance(value, tirx.BufferLoad):
        return not any(isinstance(index, tirx.BufferLoad) for index in value.indices)
    if isinstance(value, tirx.Add | tirx.Sub | tirx.Mul | tirx.Div):
        return dtype in _COMPUTED and all(_has_vector(operand, dtype, variables) for operand in (value.a, value.b))
    if isinstance(value, tirx.Var):
        return value not in variables
    return isinstance(value, tirx.IntImm | tirx.FloatImm)


def _check_thread_indices(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    indices = []

    def visit(node):
        if isinstance(node, tirx.For) and node.thread_binding is not None:  # 0.1.14
            if node.thread_binding.thread_tag.startswith("threadIdx"):
                indices.append(node.loop_var)
        elif isinstance(node, tirx.Bind) and _name(node.value) == "tl.launch_thread_idx":
            indices.append(node.var)

    def check(node):
        if isinstance(node, tirx.Var) and any(node.same_as(index) for index in indices):
            raise NotImplementedError(
                f"target c: blocks have one thread; got thread index {node.name} in T.Kernel's body (T.print uses it too); use "
                "tile operators and T.Parallel"
            )

    tirx.stmt_functor.post_order_visit(func.body, visit)
    tirx.stmt_functor.post_order_visit(func.body, check)
    return func


def _serialize(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    for param in func.params:
        if is_carried(param.dtype):
            raise NotImplementedError(
                f"target c: scalar arguments must be float32, float64 or integers; got {param.name} of {param.dtype}; "
                "pass it as float32"
            )
    local: dict[tirx.Var, tirx.Var] = {}
    allocated: set[tirx.Buffer] = set()
    views: dict[tirx.Buffer, tirx.Buffer] = {}

    def collect(node):
        namespace, _, operator = _name(node).rpartition(".")
        if namespace == "tl.tileop" and operator not in _TILE_OPERATORS:
            raise NotImplementedError(
                f"target c: tile operators must be {', '.join(_TILE_OPERATORS)}; got {operator}; "
                "write it with these and T.Parallel or T.serial"
            )
        if isinstance(node, tirx.SBlock):
            for buffer in node.alloc_buffers:
                allocated.add(buffer)
                if buffer.scope() in _TILES:
                    element = buffer.data.type_annotation.element_type
                    local[buffer.data] = tirx.Var(buffer.data.name, PointerType(element, "local"))

    def view(buffer):
        """Return a view of a tile (`T.reshape`, `T.view`) over the tile's new memory, which substitution leaves alone."""
        if buffer not in views:
            views[buffer] = tirx.decl_buffer(
                buffer.shape, buffer.dtype, buffer.name, data=local[buffer.data], strides=buffer.strides, scope="local"
            )
        return views[buffer]

    def adapt(node):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)):
            if node.buffer.data not in local or node.buffer in allocated:
                return None
            if isinstance(node, tirx.BufferLoad):
                return tirx.BufferLoad(view(node.buffer), node.indices)
            return tirx.BufferStore(view(node.buffer), node.value, node.indices)
        if isinstance(node, tirx.Call):
            name = _name(node)
            if name == "tl.infinity":  # which 0.1.14 does not lower for C
                return tirx.FloatImm(node.dtype, math.inf)
            if name in _EXACT:
                return tirx.Call(node.dtype, _EXACT[name], node.args)
            if name == "tl.tileop.reduce" and "batch" in node.annotations:  # the number of values per barrier
                annotations = {key: value for key, value in node.annotations.items() if key != "batch"}
                return tirx.Call(node.dtype, node.op, node.args, annotations)
            return None
        if "layout_map" not in node.annotations:
            return None
        annotations = {key: value for key, value in node.annotations.items() if key != "layout_map"}
        return tirx.SBlock(
            node.iter_vars, node.reads, node.writes, node.name_hint, node.body, node.init, node.alloc_buffers,
            node.match_buffers, annotations,
        )  # fmt: skip

    tirx.stmt_functor.post_order_visit(func.body, collect)
    body = tirx.stmt_functor.ir_transform(
        func.body, None, adapt, ["tirx.SBlock", "tirx.Call", "tirx.BufferLoad", "tirx.BufferStore"]
    )
    return func.with_body(tirx.stmt_functor.substitute(body, local))


# Runs first, where thread indices still have names.
RefuseThreadIndices = prim_func_pass(_check_thread_indices, opt_level=0, name="tilelang_ext.RefuseThreadIndices")
OneThreadBlocks = prim_func_pass(_serialize, opt_level=0, name="tilelang_ext.OneThreadBlocks")
