"""`T.cumsum` and `T.cummax` on one thread: a loop over the elements of each row.

    Before  cumsum(region(s), region(d), dim=1, reverse=False)
    After   for i in m: for k in n:
                total[0] = cast(s[i, k]) if k == 0 else total[0] + cast(s[i, k])
                d[i, k] = cast(total[0])

16-bit and 8-bit floats are summed in float32, and each sum is rounded once.

Runs on tile programs, before their memory is that of one thread.
"""

from __future__ import annotations

from tvm import DataType, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten, with_buffers

_COMBINE = {"tl.tileop.cumsum": lambda total, value: total + value, "tl.tileop.cummax": tirx.max}


def _scan(stmt) -> tirx.Call | None:
    call = stmt.value if isinstance(stmt, tirx.Evaluate) else None
    return call if isinstance(call, tirx.Call) and isinstance(call.op, Op) and call.op.name in _COMBINE else None


def has_scans(func: tirx.PrimFunc) -> bool:
    """Whether a function has a scan."""
    found = []
    post_order_visit(func.body, lambda node: found.append(_scan(node) is not None))
    return any(found)


def _loops(call: tirx.Call, held: list[tirx.Buffer]) -> tirx.Stmt:
    (source, _, *extents), (destination, *_) = call.args[0].args, call.args[1].args
    dim, reverse = int(call.args[2]), bool(call.args[3])
    dtype = str(destination.buffer.dtype)
    narrow = "float" in dtype and DataType(dtype).bits < 32
    total = tirx.decl_buffer((1,), "float32" if narrow else dtype, "total", scope="local")
    held.append(total)
    variables = [tirx.Var(f"i{axis}", extent.dtype) for axis, extent in enumerate(extents)]
    step = variables[dim]
    places = [extents[dim] - 1 - step if reverse and axis == dim else var for axis, var in enumerate(variables)]

    def at(operand) -> list:
        return [first + place for first, place in zip(operand.indices, places, strict=True)]

    value = tirx.Cast(total.dtype, tirx.BufferLoad(source.buffer, at(source)))
    held_total = tirx.BufferLoad(total, [0])
    combined = tirx.Select(step == 0, value, _COMBINE[call.op.name](held_total, value))
    body: tirx.Stmt = tirx.SeqStmt(
        [
            tirx.BufferStore(total, combined, [0]),
            tirx.BufferStore(destination.buffer, tirx.Cast(dtype, held_total), at(destination)),
        ]
    )
    for axis in [dim, *(axis for axis in reversed(range(len(extents))) if axis != dim)]:
        body = tirx.For(variables[axis], tirx.const(0, extents[axis].dtype), extents[axis], tirx.ForKind.SERIAL, body)
    return body


def _spell(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    held: list[tirx.Buffer] = []

    def replace(stmt):
        call = _scan(stmt)
        return None if call is None else _loops(call, held)

    if not has_scans(func):
        return func
    return func.with_body(with_buffers(rewritten(func.body, replace, ["tirx.Evaluate"]), held))


SpellScans = prim_func_pass(_spell, opt_level=0, name="tilelang_ext.cpu.SpellScans")
