"""Integer expressions of TIR in numbers, over arrays of values of their variables."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Op

_BINARY = {
    tirx.Add: np.add, tirx.Sub: np.subtract, tirx.Mul: np.multiply, tirx.Min: np.minimum, tirx.Max: np.maximum,
    tirx.FloorDiv: np.floor_divide, tirx.FloorMod: np.mod, tirx.EQ: np.equal, tirx.NE: np.not_equal, tirx.LT: np.less,
    tirx.LE: np.less_equal, tirx.GT: np.greater, tirx.GE: np.greater_equal, tirx.And: np.logical_and, tirx.Or: np.logical_or,
    tirx.Mod: np.fmod,
}  # fmt: skip
_CALLS = {
    "tirx.bitwise_and": np.bitwise_and,
    "tirx.bitwise_or": np.bitwise_or,
    "tirx.bitwise_xor": np.bitwise_xor,
    "tirx.shift_left": np.left_shift,
    "tirx.shift_right": np.right_shift,
}


class Unknown(Exception):
    """The expression holds what is no integer arithmetic, or a variable without values."""


def evaluate(expr: tirx.PrimExpr, values: dict[tirx.Var, np.ndarray]) -> np.ndarray:
    """Return the values of an expression of integers, as int64 or bool; raise Unknown where it has others.

    Numbers are taken for exact: what overflows in the expression's own type does not here.
    """
    if isinstance(expr, tirx.IntImm):
        return np.asarray(int(expr.value))
    if isinstance(expr, tirx.Var) and expr in values:
        return values[expr]
    if type(expr) in _BINARY:
        return _BINARY[type(expr)](evaluate(expr.a, values), evaluate(expr.b, values))
    if isinstance(expr, tirx.Div):
        a, b = evaluate(expr.a, values), evaluate(expr.b, values)
        return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    if isinstance(expr, tirx.Not):
        return np.logical_not(evaluate(expr.a, values))
    if isinstance(expr, tirx.Cast) and expr.dtype.startswith(("int", "uint", "bool")):
        return evaluate(expr.value, values)
    if isinstance(expr, tirx.Select):
        return np.where(*(evaluate(part, values) for part in (expr.condition, expr.true_value, expr.false_value)))
    if isinstance(expr, tirx.Call) and isinstance(expr.op, Op):
        if expr.op.name in _CALLS:
            return _CALLS[expr.op.name](*(evaluate(argument, values) for argument in expr.args))
        if expr.op.name == "tirx.if_then_else":
            return np.where(*(evaluate(argument, values) for argument in expr.args))
    raise Unknown
