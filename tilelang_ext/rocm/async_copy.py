"""Make pipelined copies of 4 bytes per thread loads and stores: tilelang's asynchronous copy reads the wrong bytes.

    Before  ptx_cp_async(access_ptr(a_s, i), access_ptr(a, j), 4, in_bounds)        a of 8 bits
    After   if in_bounds: a_s[i : i + 4] = a[j : j + 4]
            else: a_s[i : i + 4] = 0

On gfx950 `tl::cp_async_gs<4>` gives the hardware one address per wave, and lane l reads 4 bytes at that address + 4 l. That is
correct only where the bytes of all lanes are contiguous, which they are not in a narrow tile, such as one of scales. tilelang's
copies of 8 and 16 bytes are loads and stores anyway. The pass runs after upstream's; the waits stay, with nothing to wait for.

A wait for all but so many groups as a run-time count says waits for all: the instruction takes a constant.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform
from tvm.tirx.transform import prim_func_pass

_COPY = Op.get("tl.ptx_cp_async")
_WAIT = Op.get("tirx.ptx_wait_group")
_ACCESS_PTR = Op.get("tirx.tvm_access_ptr")
_BYTES = 4


def _elements(pointer: tirx.Call, lanes: int) -> tuple[tirx.Buffer, list]:
    """Return a flat buffer over what an access pointer points into, and the indices of its first `lanes` elements."""
    annotation, data, offset = pointer.args[:3]
    # The generator ignores the extent; the variable names the memory.
    buffer = tirx.decl_buffer([1], annotation.dtype, data.name, data=data)
    return buffer, [offset if lanes == 1 else tirx.Ramp(offset, 1, lanes)]


def _copy(node: tirx.Evaluate) -> tirx.Stmt | None:
    call = node.value
    if not isinstance(call, tirx.Call) or not call.op.same_as(_COPY):
        return None
    to, source, count, *condition = call.args
    if not all(isinstance(p, tirx.Call) and p.op.same_as(_ACCESS_PTR) for p in (to, source)):
        return None
    dtype, lanes = to.args[0].dtype, int(count)
    if lanes * tirx.const(0, dtype).dtype.bits != 8 * _BYTES or source.args[0].dtype != dtype:
        return None
    buffer, at = _elements(to, lanes)
    copied = tirx.BufferStore(buffer, tirx.BufferLoad(*_elements(source, lanes)), at)
    if not condition:
        return copied
    zero = tirx.const(0, dtype)
    return tirx.IfThenElse(
        condition[0], copied, tirx.BufferStore(buffer, zero if lanes == 1 else tirx.Broadcast(zero, lanes), at)
    )


def _wait_for_all(call: tirx.Call) -> tirx.Call | None:
    if not call.op.same_as(_WAIT) or isinstance(call.args[0], tirx.IntImm):
        return None
    return tirx.Call(call.dtype, call.op, [tirx.const(0, call.args[0].dtype)])


def _copy_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    body = ir_transform(func.body, _copy, None, ["tirx.Evaluate"])
    return func.with_body(ir_transform(body, None, _wait_for_all, ["tirx.Call"]))


CopyWords = prim_func_pass(_copy_all, opt_level=0)
