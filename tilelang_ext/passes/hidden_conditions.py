"""Conditions are simplified by the pass list, and not once more behind it.

    Before  if_then_else(k * 2 + tx % 2 < groups, A[...], 0)    if by * 16 < rows: ...
    Within  if_then_else(condition_0, A[...], 0)                if condition_1: ...
    After   if_then_else(k * 2 + (tx & 1) < groups, A[...], 0)  if by * 16 < rows: ...

Upstream lowers divisions to shifts behind the pass list, and simplifies. Its rules know little of shifts, so that it asks the
solver about every comparison: of a kernel with guarded accesses that took a third of the time of lowering. The pass list
therefore ends with `hide_conditions`, which puts variables in place of conditions and keeps these in an attribute of the
function. `restore_conditions` puts them back where text is generated, and lowers their divisions.
"""

from __future__ import annotations

import tilelang
from tilelang.engine.lower import is_device_call, is_device_call_c_device
from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit, substitute

from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.passes.solver import linear_arithmetic

_CONDITIONS = "tilelang_ext.conditions"  # {variable: condition}; `program/lowered.py` reads it
_DEFINITIONS = "tilelang_ext.definitions"  # {variable: value} of the function whose conditions were hidden
_CHOICE = "tirx.if_then_else"


def hide_conditions(mod: IRModule) -> IRModule:
    """Put variables in place of the conditions of the functions that run on a device."""
    functions = {var: _hidden(func) if _is_on_device(func) else func for var, func in mod.functions.items()}
    return IRModule(functions, attrs=mod.attrs)


def restore_conditions(mod: IRModule) -> IRModule:
    """Put the conditions back that `hide_conditions` hid, with their intrinsics lowered as the rest is already."""
    functions = {var: _restored(func) for var, func in mod.functions.items()}
    with linear_arithmetic():
        return tilelang.transform.LowerIntrin()(IRModule(functions, attrs=mod.attrs))


def _is_on_device(func: tirx.PrimFunc) -> bool:
    return is_device_call(func) or is_device_call_c_device(func)


def _hidden(func: tirx.PrimFunc) -> tirx.PrimFunc:
    conditions: dict[tirx.Var, tirx.PrimExpr] = {}

    def variable_for(condition: tirx.PrimExpr) -> tirx.Var:
        variable = tirx.Var(f"condition_{len(conditions)}", condition.dtype)
        conditions[variable] = substitute(condition, conditions)  # a condition may read what stands under another one
        return variable

    def hidden(node):
        if isinstance(node, tirx.IfThenElse):
            return tirx.IfThenElse(variable_for(node.condition), node.then_case, node.else_case)
        if isinstance(node.op, Op) and node.op.name == _CHOICE:
            condition, *values = node.args
            return tirx.Call(node.dtype, node.op, [variable_for(condition), *values])
        return None

    body = rewritten(func.body, hidden, ["tirx.IfThenElse", "tirx.Call"])
    if not conditions:
        return func
    return func.with_body(body).with_attr(_CONDITIONS, conditions).with_attr(_DEFINITIONS, _definitions(func))


def _restored(func: tirx.PrimFunc) -> tirx.PrimFunc:
    attrs = func.attrs or {}
    if _CONDITIONS not in attrs:
        return func
    defined = _definitions(func)
    # Upstream inlines some variables, in the body alone.
    inlined = {var: value for var, value in attrs[_DEFINITIONS].items() if var not in defined}
    conditions = dict(attrs[_CONDITIONS])
    while inlined and any(_reads(condition, inlined) for condition in conditions.values()):
        conditions = {var: substitute(condition, inlined) for var, condition in conditions.items()}
    func = func.with_body(substitute(func.body, conditions))
    return func.without_attr(_CONDITIONS).without_attr(_DEFINITIONS)


def _definitions(func: tirx.PrimFunc) -> dict[tirx.Var, tirx.PrimExpr]:
    """Return the values of variables that statements bind, and the first values of those of loops."""
    definitions = {}

    def visit(node):
        if isinstance(node, tirx.Bind) and isinstance(node.value, tirx.PrimExpr):
            definitions[node.var] = node.value
        elif isinstance(node, tirx.For):
            definitions[node.loop_var] = node.min

    post_order_visit(func.body, visit)
    return definitions


def _reads(expression: tirx.PrimExpr, variables) -> bool:
    found = []
    post_order_visit(expression, lambda node: found.append(node) if isinstance(node, tirx.Var) and node in variables else None)
    return bool(found)
