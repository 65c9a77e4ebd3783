"""Put above a kernel what our passes, or upstream's generator, call in it and upstream's templates do not define."""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes import outside
from tilelang_ext.rocm.device_text import ASSERT, NAMESPACE, all_reduce_text, assert_text, atomic_text

_TEXTS = {f"{NAMESPACE}::all_reduce<": all_reduce_text, outside.MARK: lambda: outside.DEFINITION, ASSERT: assert_text}

_OPERATORS = {f"tl.atomic_{name}_ret_elem_op": name for name in ("max", "min")}


def define_functions(mod: IRModule) -> IRModule:
    """Put the definitions above the functions that call them."""
    return IRModule({name: _define(func) for name, func in mod.functions_items()}, attrs=mod.attrs)


def _define(func: tirx.PrimFunc) -> tirx.PrimFunc:
    called = set()

    def visit(node):
        if isinstance(node, tirx.StringImm):
            called.update(start for start in _TEXTS if node.value.startswith(start))
        elif isinstance(node, tirx.Call) and getattr(node.op, "name", "") in _OPERATORS:
            called.add(node.op.name)

    post_order_visit(func.body, visit)
    body = func.body
    for name in sorted(called):
        text = atomic_text(_OPERATORS[name]) if name in _OPERATORS else _TEXTS[name]()
        body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(text), body)
    return func.with_body(body)
