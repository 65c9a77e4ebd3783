"""Functions of CUDA that are arithmetic elsewhere: rules that spell them as operators and functions of every target."""

from __future__ import annotations

from tvm import DataType, tirx
from tvm.ir import Op

from tilelang_ext.passes.operators import Rule, only_to_nearest

_OPERATORS = {
    "add": tirx.Add, "sub": tirx.Sub, "mul": tirx.Mul, "fmul": tirx.Mul, "fdiv": tirx.Div, "max": tirx.Max, "min": tirx.Min,
}  # fmt: skip


def arithmetic(target: str) -> dict[str, Rule]:
    """Return the rules of `T.ieee_*`, which refuse modes that `target` has not, and of `T.fma`, `T.fmul` and `T.fast_rcp`."""
    rules: dict[str, Rule] = {name: _checked(check) for name, check in only_to_nearest(target).items()}
    return {**rules, **{f"tl.{name}": _spell for name in ("ieee_frsqrt", "fma", "fmul", "fast_rcp")}}


def pairs() -> dict[str, Rule]:
    """Return the rules of `T.add2` and its like."""
    return {f"tl.{name}2": _spell for name in ("add", "sub", "mul", "max", "min", "fma", "abs")}


def likely(call: tirx.Call) -> tirx.PrimExpr:
    """`T.likely` is its condition."""
    return call.args[0]


def fast_functions() -> dict[str, Rule]:
    """Return the rules of `T.__exp` and its like: the function itself, which targets spell as fast as they have it."""
    names = ("exp", "exp10", "log", "log2", "log10", "sin", "cos", "tan")
    return {f"tl.__{name}": _function(name) for name in names}


def _function(name: str) -> Rule:
    return lambda call: tirx.Call(call.dtype, Op.get(f"tirx.{name}"), call.args)


def plain_copies() -> dict[str, Rule]:
    """Return the rules of waits for `T.async_copy` where it is a plain copy: nothing is done."""
    return dict.fromkeys(("tirx.ptx_commit_group", "tirx.ptx_wait_group"), lambda call: tirx.const(0))


def wide_nextafter(call: tirx.Call) -> None:
    """`T.nextafter` has no function of halves on any target; by way of float32 it would return its operand."""
    if DataType(call.dtype).bits < 32:
        raise NotImplementedError(f"T.nextafter: must be of float32 or wider; got {call.dtype}; cast the operands")


def unsigned_bits(call: tirx.Call) -> tirx.PrimExpr:
    """`T.popcount` of an unsigned integer of 32 or 64 bits."""
    bits = DataType(call.args[0].dtype).bits
    unsigned = "uint64" if bits == 64 else "uint32"
    operand = call.args[0]
    if bits < 32 and str(operand.dtype).startswith("int"):  # whose sign would be counted
        operand = tirx.Cast(_of_lanes(f"uint{bits}", operand), operand)
    count = tirx.Call(_of_lanes(unsigned, operand), call.op, [tirx.Cast(_of_lanes(unsigned, operand), operand)])
    return tirx.Cast(call.dtype, count)


def _of_lanes(dtype: str, like: tirx.PrimExpr) -> str:
    lanes = DataType(like.dtype).lanes
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _checked(check: Rule) -> Rule:
    def rule(call: tirx.Call) -> tirx.PrimExpr:
        check(call)
        return _spell(call)

    return rule


def _spell(call: tirx.Call) -> tirx.PrimExpr:
    """To nearest, which is how operators and functions round."""
    name = call.op.name.removeprefix("tl.").removeprefix("ieee_").removesuffix("2")
    operands = [operand for operand in call.args if not isinstance(operand, tirx.StringImm)]
    if name in _OPERATORS:
        return _OPERATORS[name](*operands)
    if name in ("fma", "fmaf"):
        dtype = DataType(call.dtype)
        if dtype.bits == 16:  # the exact product of halves fits float32
            wide = [tirx.Cast(_of_lanes("float32", operand), operand) for operand in operands]
            return tirx.Cast(call.dtype, wide[0] * wide[1] + wide[2])
        return tirx.call_pure_extern(call.dtype, "fma" if dtype.bits == 64 else "fmaf", *operands)
    if name == "abs":
        return tirx.Call(call.dtype, Op.get("tirx.fabs"), operands)
    root = tirx.Call(call.dtype, Op.get("tirx.sqrt"), operands)
    if name == "fsqrt":
        return root
    return tirx.Div(tirx.const(1.0, call.dtype), operands[0] if name in ("frcp", "fast_rcp") else root)
