"""Conversions and arithmetic of an fp8 type that is not the chip's: by the bits of the type.

    Before  Cast("float32", x), x float8_e4m3fn, on gfx942      After  tilelang_ext::float_of_e4m3fn(x)
            Cast("float8_e4m3fn", y)                                   tilelang_ext::e4m3fn_of_float(y)
            x + z                                                      the sum of both as floats, converted

Upstream's generator has one type for E4M3 and one for E5M2: FNUZ on gfx940 to gfx942 and OCP elsewhere, whatever the program
says. Read as the other flavour a byte is worth half or twice as much, and other bytes are NaN. Moves and selections keep their
bits and stay as they are. Runs where text is generated, on vectors too.
"""

from __future__ import annotations

from tilelang.rocm.target import target_get_mcpu
from tvm import IRModule, tirx

from tilelang_ext.formats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ
from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.rocm.device_text import fp8_code_name, fp8_conversion_text, fp8_value_name

_FNUZ_CHIPS = ("gfx940", "gfx941", "gfx942")
_OCP, _FNUZ = (E4M3.dtype, E5M2.dtype), (E4M3_FNUZ.dtype, E5M2_FNUZ.dtype)
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max)
_COMPARISONS = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)


class _Conversions:
    """Rewrites one function of a chip; `used` are the types whose conversions it calls."""

    def __init__(self, arch: str):
        self.foreign = _OCP if arch in _FNUZ_CHIPS else _FNUZ
        self.used: set[str] = set()

    def rewrite(self, node: tirx.PrimExpr) -> tirx.PrimExpr | None:
        if isinstance(node, tirx.Cast):
            if not self._is_foreign(node) and not self._is_foreign(node.value):
                return None
            return self._converted(node.value, node.dtype)
        if not self._is_foreign(node.a):
            return None
        value = type(node)(self._as_float(node.a), self._as_float(node.b))
        return value if isinstance(node, _COMPARISONS) else self._converted(value, node.dtype)

    def _is_foreign(self, expr: tirx.PrimExpr) -> bool:
        return _element(expr.dtype) in self.foreign

    def _converted(self, value: tirx.PrimExpr, dtype) -> tirx.PrimExpr:
        value = self._as_float(value)
        if _element(dtype) in self.foreign:
            return self._call(fp8_code_name(_element(dtype)), dtype, value)
        return value if str(value.dtype) == str(dtype) else tirx.Cast(dtype, value)

    def _as_float(self, value: tirx.PrimExpr) -> tirx.PrimExpr:
        dtype = str(value.dtype).replace(_element(value.dtype), "float32", 1)
        if self._is_foreign(value):
            return self._call(fp8_value_name(_element(value.dtype)), dtype, value)
        return value if str(value.dtype) == dtype else tirx.Cast(dtype, value)

    def _call(self, name: str, dtype, value: tirx.PrimExpr) -> tirx.Call:
        self.used.add(_element(value.dtype) if self._is_foreign(value) else _element(dtype))
        return tirx.call_pure_extern(dtype, name, value)


def _element(dtype) -> str:
    name, _, lanes = str(dtype).rpartition("x")
    return name if name and lanes.isdigit() else str(dtype)


def ConvertByFormat(mod: IRModule) -> IRModule:
    """Rewrite the device functions of `mod`; see above."""
    kinds = [f"tirx.{kind.__name__}" for kind in (tirx.Cast, *_ARITHMETIC, *_COMPARISONS)]
    functions = {}
    for name, func in mod.functions_items():
        conversions = _Conversions(target_get_mcpu(func.attrs["target"]))
        body = rewritten(func.body, conversions.rewrite, kinds)
        for dtype in sorted(conversions.used):
            text = tirx.StringImm(fp8_conversion_text(dtype))
            body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", text, body)
        functions[name] = func.with_body(body)
    return IRModule(functions, attrs=mod.attrs)
