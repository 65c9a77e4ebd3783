"""An atomic that gives each thread's own value to a buffer of one element is one by each thread.

    Before  tileop.atomicadd(A[t], region(C[0], 1))        one thread adds its value
    After   atomic_add_elem_op(access_ptr(C[0]), A[t])     each does

Given a buffer, upstream takes the atomic for a tile operator, whose elements it spreads over the threads: right for a value
that is the tile's, such as a number or an element of a fragment. Several elements take no values of threads; that is refused.
Runs on tile programs whose threads have been materialised.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.region_shapes import is_region
from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.passes.uniformity import int_of

_ELEMENT = {f"tl.tileop.atomic{name}": f"tl.atomic_{name}_elem_op" for name in ("add", "max", "min")}
_READ_AND_WRITE = 3


def SpellScalarAtomics(mod: IRModule) -> IRModule:
    """Rewrite the atomics of `mod`; see above."""
    return IRModule({name: _spell(func) for name, func in mod.functions_items()}, attrs=mod.attrs)


def _spell(func: tirx.PrimFunc) -> tirx.PrimFunc:
    differs: set[tirx.Var] = set()  # thread indices, and what is bound to values of threads

    def collect(node):
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            if node.node.thread_tag.startswith("threadIdx"):
                differs.add(node.node.var)
        elif isinstance(node, tirx.Bind):
            bindings.append(node)

    bindings: list[tirx.Bind] = []
    post_order_visit(func.body, collect)
    for binding in bindings:
        if _is_of_thread(binding.value, differs):
            differs.add(binding.var)

    def rewrite(call):
        name = call.op.name if isinstance(call.op, Op) else ""
        if name not in _ELEMENT or is_region(call.args[0]) or not _is_of_thread(call.args[0], differs):
            return None
        value, region = call.args[0], call.args[1]
        extents = [int_of(extent) for extent in region.args[2:]]
        if all(extent == 1 for extent in extents):
            pointer = tirx.Call("handle", Op.get("tl.access_ptr"), [region.args[0], 1, _READ_AND_WRITE])
            order = [call.annotations["memory_order"]] if "memory_order" in call.annotations else []
            return tirx.Call("handle", Op.get(_ELEMENT[name]), [pointer, value, *order])
        raise NotImplementedError(
            f"T.atomic_{name.removeprefix('tl.tileop.atomic')}: a thread's own value goes to one element; got the tile "
            f"{region.args[0].buffer.name} of shape {list(region.args[2:])}; name the element, or give a tile of values"
        )

    return func.with_body(rewritten(func.body, rewrite, ["tirx.Call"]))


def _is_of_thread(value: tirx.PrimExpr, differs: set[tirx.Var]) -> bool:
    """Whether a value is one of each thread's: of its index, or in its own array."""
    found = bool(differs & set(tirx.analysis.undefined_vars(value)))

    def visit(node):
        nonlocal found
        found = found or (isinstance(node, tirx.BufferLoad) and node.buffer.scope() in ("local", "local.var"))

    post_order_visit(value, visit)
    return found
