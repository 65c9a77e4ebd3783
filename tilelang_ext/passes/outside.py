"""Upstream's guards of global accesses, with a mark where the guard fails, so that the simulator can count what they hide.

    Before  Y[i + 1, j] = X[i, j + 1]
    After   if i + 1 < 64 or TL_OUTSIDE("Y", "stores", "(64, 64)", 1, false):
                Y[i + 1, j] = if_then_else(j + 1 < 64 or TL_OUTSIDE("X", "reads", "(64, 64)", 1, false), X[i, j + 1], 0)

LegalizeSafeMemoryAccess guards each access whose indices it cannot prove to be in bounds. `GuardAccesses` runs it, and marks
what it has put in, and nothing else: not the tails of `T.copy`, not the conditions of the kernel, and not the reads of a tensor
that has a safe value other than zero, which were meant. The marks stand in the other branches until loops have become vectors,
where they are in nobody's way; then `PlaceMarks` moves them into the conditions, each with the number of elements that it
stands for. For a compiler of a GPU a mark is the last of its arguments.
"""

from __future__ import annotations

import tilelang
from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

MARK = "TL_OUTSIDE"
DEFINITION = f"""\
#ifndef {MARK}  // the simulator counts; anywhere else it is the value alone
#define {MARK}(tensor, accesses, shape, lanes, ...) (__VA_ARGS__)
#endif
"""
_LANES, _VALUE = 4, 5  # among the arguments of a mark, after its name
_KEPT = "tilelang_ext.kept"
_IF_THEN_ELSE, _EXTERN = Op.get("tirx.if_then_else"), Op.get("tirx.call_extern")


def GuardAccesses(mod: IRModule) -> IRModule:
    """Guard global accesses as upstream does, and mark the guards."""
    mod = _each_body(mod, lambda body: rewritten(body, _keep, ["tirx.Call", "tirx.IfThenElse"]))
    mod = tilelang.transform.LegalizeSafeMemoryAccess()(mod)
    return _each_body(mod, lambda body: rewritten(body, _mark, ["tirx.Call", "tirx.IfThenElse"]))


def _each_body(mod: IRModule, rewrite) -> IRModule:
    return IRModule({name: f.with_body(rewrite(f.body)) for name, f in mod.functions_items()}, attrs=mod.attrs)


def is_call_of(node, name: str) -> bool:
    """Whether a node is a call of the external function `name`."""
    return isinstance(node, tirx.Call) and node.op.same_as(_EXTERN) and node.args[0].value == name


def _is_conditional(node) -> bool:
    return isinstance(node, tirx.Call) and node.op.same_as(_IF_THEN_ELSE)


def _keep(node):
    """Tell a condition that was there before from those that upstream puts in, which have neither another branch nor this."""
    if _is_conditional(node):
        condition, value, otherwise = node.args
        return tirx.Call(node.dtype, node.op, [condition, value, _extern(otherwise.dtype, _KEPT, otherwise)])
    if isinstance(node, tirx.IfThenElse) and node.else_case is None:
        return tirx.IfThenElse(node.condition, node.then_case, tirx.Evaluate(_extern("int32", _KEPT)))
    return None


def _mark(node):
    if _is_conditional(node):
        condition, value, otherwise = node.args
        if is_call_of(otherwise, _KEPT):
            return tirx.Call(node.dtype, node.op, [condition, value, otherwise.args[1]])
        access = _guarded(value)
        if access is None or not _is_zero(otherwise):
            return None
        mark = _outside(access, "reads", otherwise)
        return tirx.Call(node.dtype, node.op, [_without_marks(condition), value, mark])
    if isinstance(node, tirx.IfThenElse):
        if isinstance(node.else_case, tirx.Evaluate) and is_call_of(node.else_case.value, _KEPT):
            return tirx.IfThenElse(node.condition, node.then_case, None)
        access = _guarded(node.then_case) if node.else_case is None else None
        if access is None:
            return None
        verb = "stores" if isinstance(access, tirx.BufferStore) else "updates"
        dropped = tirx.Evaluate(_outside(access, verb, tirx.IntImm("int32", 0)))
        return tirx.IfThenElse(_without_marks(node.condition), node.then_case, dropped)
    return None


def _without_marks(condition: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return a guard that upstream made of an access's indices; what these read is counted where they are used."""

    def value(node):
        return node.args[_VALUE] if is_call_of(node, MARK) else None

    return rewritten(tirx.Evaluate(condition), value, ["tirx.Call"]).value


def _guarded(node) -> tirx.BufferLoad | tirx.BufferStore | None:
    """Return the access that a chain of upstream's guards is around."""
    while True:
        if _is_conditional(node):
            node = node.args[1]
        elif isinstance(node, tirx.IfThenElse):
            node = node.then_case
        else:
            break
    if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)):
        return node
    found = []

    def visit(part):
        if isinstance(part, tirx.BufferLoad) and part.buffer.scope() == "global":
            found.append(part)

    if isinstance(node, tirx.Evaluate):  # an atomic operation, or a function of the kernel's author
        post_order_visit(node.value, visit)
    return found[0] if found else None


def _is_zero(value: tirx.PrimExpr) -> bool:
    return isinstance(value, (tirx.IntImm, tirx.FloatImm)) and value.value == 0


def _outside(access, accesses: str, value: tirx.PrimExpr) -> tirx.Call:
    extents = [str(extent) for extent in access.buffer.shape]
    shape = f"({extents[0]},)" if len(extents) == 1 else f"({', '.join(extents)})"
    return _extern(value.dtype, MARK, access.buffer.name, accesses, shape, tirx.IntImm("int32", 1), value)


def _extern(dtype, name: str, *arguments) -> tirx.Call:
    named = [tirx.StringImm(a) if isinstance(a, str) else a for a in (name, *arguments)]
    return tirx.Call(dtype, _EXTERN, named)


def _place(node):
    if _is_conditional(node):
        condition, value, otherwise = node.args
        mark = otherwise.value if isinstance(otherwise, tirx.Broadcast) else otherwise
        if not is_call_of(mark, MARK):
            return None
        lanes, safe = value.dtype.lanes, mark.args[_VALUE]
        safe = tirx.Broadcast(safe, lanes) if lanes > 1 else safe
        return tirx.Call(node.dtype, node.op, [tirx.Or(condition, _counted(mark, lanes)), value, safe])
    otherwise = node.else_case if isinstance(node, tirx.IfThenElse) else None
    mark = otherwise.value if isinstance(otherwise, tirx.Evaluate) else None
    if not is_call_of(mark, MARK):
        return None
    access = _guarded(node.then_case)
    lanes = access.value.dtype.lanes if isinstance(access, tirx.BufferStore) else 1
    return tirx.IfThenElse(tirx.Or(node.condition, _counted(mark, lanes)), node.then_case, None)


def _counted(mark: tirx.Call, lanes: int) -> tirx.Call:
    return tirx.Call("bool", mark.op, [*mark.args[:_LANES], tirx.IntImm("int32", lanes), tirx.const(False, "bool")])


def _place_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _place, ["tirx.Call", "tirx.IfThenElse"]))


PlaceMarks = prim_func_pass(_place_all, opt_level=0, name="tilelang_ext.PlaceMarks")
