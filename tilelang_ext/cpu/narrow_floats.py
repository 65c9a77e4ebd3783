"""Store floats that C lacks as their codes: fp8, e8m0, bfloat16 and float16.

    Before  A (64,) "float8_e4m3fn"                  After  A (64,) "uint8"
            y = Cast("float32", A[i])                       y = decode_float8_e4m3fn(A[i])
            A[i] = Cast("float8_e4m3fn", y)                 A[i] = encode_float8_e4m3fn(y)
            h[i] + h[j]  (float16)                          decode_float16(encode_float16(decode(h[i]) + decode(h[j])))

Each operation is computed in float and rounded to its own type, as hardware that has the type does. A float holds the sum,
product and quotient of two such numbers so precisely that rounding twice gives the same as rounding once. A code that is only
moved, selected or reinterpreted keeps its bits. The pass runs last, on flat device functions.
"""

from __future__ import annotations

import functools
import math
import struct
from pathlib import Path

import tvm_ffi
from tvm import IRModule, tirx
from tvm.ir import CallingConv, Op, PointerType, PrimType, register_op_attr
from tvm.tirx import PyStmtExprMutator
from tvm.tirx.functor import mutator

from tilelang_ext import formats
from tilelang_ext.formats import E8M0, FloatFormat

_HALF = FloatFormat("binary16", "float16", "float16", 5, 10, 15, inf_codes=(0x7C00, 0xFC00), nan_codes=(0x7E00,))
_BFLOAT = FloatFormat("bfloat16", "bfloat16", "bfloat16", 8, 7, 127, inf_codes=(0x7F80, 0xFF80), nan_codes=(0x7FC0,))
_IEEE = (_HALF, _BFLOAT)  # values that are too large become infinity; in the other formats, the largest number
_FORMATS = {format.dtype: format for format in (*formats.FP8_OPERANDS, E8M0, *_IEEE)}
_FORMATS["float8_e4m3"] = formats.E4M3  # torch's float8_e4m3fn reaches TIR under either name
_NAMESPACE = "tilelang_ext"
_C_TYPES = {
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float32": "float",
    "float64": "double",
}
_PURE = 1  # tirx::CallEffectKind::kPure
_HEADER = Path(__file__).with_name("narrow_floats.h")


CARRIED = tuple(_FORMATS)


def is_carried(dtype) -> bool:
    """Whether values of this scalar dtype are stored as codes."""
    return str(dtype) in _FORMATS


def storage_dtype(dtype) -> str:
    """Return the integer dtype of the codes of a dtype that is stored as codes."""
    return f"uint{_FORMATS[str(dtype)].bits}"


# --- the functions of the header ---------------------------------------------------------------------------------------


def _register(name: str, spelling: str | None = None) -> None:
    """Register an operator that the code generator spells `tilelang_ext::<spelling>(...)`, its name if not given."""
    if f"{_NAMESPACE}.{name}" not in Op.list_op_names():
        tvm_ffi.get_global_func("ir.RegisterOp")(f"{_NAMESPACE}.{name}", f"`{name}` of narrow_floats.h")
        register_op_attr(f"{_NAMESPACE}.{name}", "TGlobalSymbol", f"{_NAMESPACE}::{spelling or name}")
        register_op_attr(f"{_NAMESPACE}.{name}", "TCallEffectKind", tirx.IntImm("int32", _PURE))


def call(name: str, dtype: str, *args) -> tirx.Call:
    """Call a function of narrow_floats.h."""
    return tirx.Call(dtype, Op.get(f"{_NAMESPACE}.{name}"), list(args))


def register() -> None:
    """Register the operators; idempotent."""
    for format in _FORMATS.values():
        _register(f"decode_{format.dtype}")
        _register(f"encode_{format.dtype}")
    for dtype, spelling in _C_TYPES.items():
        _register(f"bit_cast_{dtype}", f"bit_cast<{spelling}>")
    _register("round_to_odd")
    _register("workspace")


@functools.cache
def _definition(format: FloatFormat) -> str:
    """Return the C++ text of decode_<dtype> and encode_<dtype>."""
    storage = f"uint{format.bits}_t"
    if format is E8M0:
        encode = "encode_power_of_two(x)"
    else:
        top = format.inf_codes[0] if format in _IEEE else format.values.index(format.max)
        arguments = (
            format.mantissa_bits, format.bias, hex(top), hex(format.nan_codes[0]), hex(format.sign_mask),
            str(format.has_negative_zero).lower(),
        )  # fmt: skip
        encode = f"{storage}(encode<{', '.join(map(str, arguments))}>(x))"
    text = f"inline {storage} encode_{format.dtype}(float x) {{ return {encode}; }}\n"
    if format in _IEEE:  # computed in the header
        return text
    rows = [format.values[i : i + 8] for i in range(0, 256, 8)]
    table = ",\n  ".join(", ".join(map(_spell, row)) for row in rows)
    return (
        f"static const float values_of_{format.dtype}[256] = {{\n  {table}}};\n"
        f"inline float decode_{format.dtype}(uint8_t code) {{ return values_of_{format.dtype}[code]; }}\n{text}"
    )


def _spell(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    significand, exponent = value.hex().split("p")
    return f"{significand.rstrip('0').rstrip('.') if value else significand}p{exponent}f"


def prelude(dtypes: set[str]) -> str:
    """Return the text that stands before a kernel that uses these dtypes."""
    chosen = {_FORMATS[dtype].dtype: _FORMATS[dtype] for dtype in sorted(dtypes)}
    body = "".join(map(_definition, chosen.values()))
    return _HEADER.read_text() + f"\nnamespace {_NAMESPACE} {{\n\n{body}\n}}  // namespace {_NAMESPACE}\n\n"


# --- the pass ------------------------------------------------------------------------------------------------------------

_ROUNDED = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div)
_EXACT = (tirx.Min, tirx.Max)
_SINGLE_FROM = ("float32", "int8", "uint8", "int16", "uint16", "bool")  # a float holds each of their values


def _element(dtype) -> str:
    return str(dtype).split("x")[0]


def _refusal(expr) -> NotImplementedError:
    return NotImplementedError(
        f"target c: one {_element(expr.dtype)} at a time can be moved, compared, cast, added, subtracted, multiplied, divided "
        f"and given to a function; got {expr}; cast to float32"
    )


def _check_one_thread(call: tirx.Call) -> None:
    name = call.op.name if isinstance(call.op, Op) else ""
    if name.startswith(("tl.", "tirx.ptx_", "tirx.tvm_warp_")) and name != "tl.clamp":
        raise NotImplementedError(
            f"target c: blocks have one thread, without GPU instructions; got {name}; use tile operators (T.copy, T.gemm, "
            "T.reduce_*) and T.Parallel"
        )


def _compare(self, op):
    return type(op)(self.value(op.a), self.value(op.b))


@mutator
class _Carry(PyStmtExprMutator):
    """Rewrites one function. Of an expression that is stored as a code, `value` is the float32 and `code` the integer."""

    def __init__(self, renamed: dict[tirx.Var, tirx.Var]):
        super().__init__()
        self.renamed = renamed  # pointers to codes that were pointers to floats
        self.buffers: dict[tirx.Buffer, tirx.Buffer] = {}
        self.floats: dict[tirx.Var, tirx.Var] = {}  # bound variables, now float32
        self.dtypes: set[str] = set()

    # carried expressions

    def value(self, expr):
        if not is_carried(expr.dtype):
            return self.visit_expr(expr)
        if isinstance(expr, tirx.Var):
            return self.floats[expr]
        if isinstance(expr, _EXACT):
            return type(expr)(self.value(expr.a), self.value(expr.b))
        return self._decode(expr.dtype, self.code(expr))

    def code(self, expr):
        dtype = str(expr.dtype)
        if isinstance(expr, tirx.BufferLoad):
            return self._load(expr)
        if isinstance(expr, tirx.FloatImm):
            if math.isinf(expr.value) and _FORMATS[dtype].inf_codes:  # a cast of it saturates
                return tirx.IntImm(storage_dtype(dtype), _FORMATS[dtype].inf_codes[expr.value < 0])
            return self._encode(dtype, self._as_float(tirx.FloatImm("float64", expr.value)))
        if isinstance(expr, tirx.Cast):
            return self._encode(dtype, self._as_float(expr.value))
        if isinstance(expr, tirx.Select):
            return tirx.Select(self.visit_expr(expr.condition), self.code(expr.true_value), self.code(expr.false_value))
        if isinstance(expr, _ROUNDED):
            return self._encode(dtype, type(expr)(self.value(expr.a), self.value(expr.b)))
        if isinstance(expr, tirx.Call):
            name = expr.op.name if isinstance(expr.op, Op) else ""
            if name == "tirx.reinterpret":
                return self._bit_cast(expr.args[0], storage_dtype(dtype))
            if name == "tirx.if_then_else":
                condition, *cases = expr.args
                return tirx.Call(storage_dtype(dtype), expr.op, [self.visit_expr(condition), *map(self.code, cases)])
            _check_one_thread(expr)
            return self._encode(dtype, tirx.Call("float32", expr.op, [self.value(argument) for argument in expr.args]))
        if isinstance(expr, (tirx.Var, *_EXACT)):
            return self._encode(dtype, self.value(expr))
        raise _refusal(expr)

    def _as_float(self, source):
        """Return a float32 that rounds to any narrow dtype as `source` does."""
        if is_carried(source.dtype):
            return self.value(source)
        if isinstance(source, tirx.FloatImm) and _is_single(source.value):
            source = tirx.FloatImm("float32", source.value)
        source = self.visit_expr(source)
        if str(source.dtype) == "float32":
            return source
        if str(source.dtype) in _SINGLE_FROM:
            return tirx.Cast("float32", source)
        wide = source if str(source.dtype) == "float64" else tirx.Cast("float64", source)
        return call("round_to_odd", "float32", wide)

    def _bit_cast(self, source, dtype):
        bits = self.code(source) if is_carried(source.dtype) else self.visit_expr(source)
        return bits if str(bits.dtype) == dtype else call(f"bit_cast_{dtype}", dtype, bits)

    def _load(self, op):
        return tirx.BufferLoad(self._buffer(op.buffer), [self.visit_expr(index) for index in op.indices])

    def _decode(self, dtype, code):
        self.dtypes.add(str(dtype))
        return call(f"decode_{_FORMATS[str(dtype)].dtype}", "float32", code)

    def _encode(self, dtype, value):
        self.dtypes.add(str(dtype))
        return call(f"encode_{_FORMATS[str(dtype)].dtype}", storage_dtype(dtype), value)

    # where carried expressions meet others

    visit_eq_ = visit_ne_ = visit_lt_ = visit_le_ = visit_gt_ = visit_ge_ = _compare

    def visit_cast_(self, op):
        if _element(op.dtype) in _FORMATS:
            raise _refusal(op)
        if is_carried(op.value.dtype):
            value = self.value(op.value)
            return value if str(op.dtype) == "float32" else tirx.Cast(op.dtype, value)
        return tirx.Cast(op.dtype, self.visit_expr(op.value))

    def visit_call_(self, op):
        _check_one_thread(op)
        name = op.op.name if isinstance(op.op, Op) else ""
        if name == "tirx.reinterpret":
            return self._bit_cast(op.args[0], str(op.dtype))
        if name == "tirx.address_of":
            return tirx.Call(op.dtype, op.op, [self._load(op.args[0])])
        return tirx.Call(op.dtype, op.op, [self.value(arg) if isinstance(arg, tirx.PrimExpr) else arg for arg in op.args])

    def visit_buffer_load_(self, op):
        if is_carried(op.buffer.dtype):  # a vector: one element is taken by `value` and `code`
            raise _refusal(op)
        return self._load(op)

    def visit_buffer_store_(self, op):
        if is_carried(op.buffer.dtype) and not is_carried(op.value.dtype):  # a vector
            raise _refusal(op.value)
        value = self.code(op.value) if is_carried(op.buffer.dtype) else self.visit_expr(op.value)
        return tirx.BufferStore(self._buffer(op.buffer), value, [self.visit_expr(index) for index in op.indices])

    def visit_bind_(self, op):
        if not is_carried(op.var.dtype):
            return tirx.Bind(op.var, self.visit_expr(op.value))
        self.floats[op.var] = tirx.Var(op.var.name, "float32")
        return tirx.Bind(self.floats[op.var], self.value(op.value))

    def visit_var_(self, op):
        return self.renamed.get(op, op)

    def visit_float_imm_(self, op):
        """The code generator prints seven digits of a constant; one that needs more is given by its bits."""
        printed = float(f"{op.value:.6e}")
        if str(op.dtype) == "float32" and math.isfinite(op.value) and _single(printed) != _single(op.value):
            (bits,) = struct.unpack("<I", struct.pack("<f", op.value))
            return call("bit_cast_float32", "float32", tirx.IntImm("uint32", bits))
        if str(op.dtype) == "float64" and math.isfinite(op.value) and printed != op.value:
            (bits,) = struct.unpack("<Q", struct.pack("<d", abs(op.value)))
            magnitude = call("bit_cast_float64", "float64", tirx.IntImm("uint64", bits))
            return magnitude if op.value > 0 else tirx.FloatImm("float64", 0.0) - magnitude
        return op

    # buffers

    def _buffer(self, buffer):
        data = self.renamed.get(buffer.data, buffer.data)
        if not is_carried(buffer.dtype) and data.same_as(buffer.data):
            return buffer
        if buffer not in self.buffers:
            dtype = storage_dtype(buffer.dtype) if is_carried(buffer.dtype) else buffer.dtype
            self.buffers[buffer] = tirx.decl_buffer(
                buffer.shape, dtype, buffer.name, data=data, strides=buffer.strides, elem_offset=buffer.elem_offset,
                scope=buffer.scope(), data_alignment=buffer.data_alignment, offset_factor=buffer.offset_factor,
            )  # fmt: skip
        return self.buffers[buffer]

    def visit_alloc_buffer_(self, op):
        if is_carried(op.buffer.dtype):
            self.renamed[op.buffer.data] = _pointer_to_codes(op.buffer.data, op.buffer.dtype)
        return tirx.AllocBuffer(self._buffer(op.buffer), op.annotations)

    def visit_decl_buffer_(self, op):
        return tirx.DeclBuffer(self._buffer(op.buffer))


def _is_single(value: float) -> bool:
    return not math.isfinite(value) or (abs(value) < 2.0**128 and float(_single(value)) == value)


def _single(value: float) -> float:
    """`value` rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _pointer_to_codes(pointer: tirx.Var, dtype) -> tirx.Var:
    """`dtype` is what it points to: of a tile that is viewed as another type, its annotation may name the other."""
    return tirx.Var(pointer.name, PointerType(PrimType(storage_dtype(dtype)), pointer.type_annotation.storage_scope))


def is_device(func: tirx.PrimFunc) -> bool:
    """Whether `func` is a kernel for target `c`, not the host function that calls one."""
    attrs = func.attrs
    return attrs["target"].kind.name == "c" and attrs.get("calling_conv") != CallingConv.C_PACKED_FUNC


def CarryNarrowFloats(mod: IRModule) -> IRModule:
    """Rewrite the device functions of `mod`; see above."""
    functions = {name: _carry(func) if is_device(func) else func for name, func in mod.functions_items()}
    return IRModule(functions, attrs=mod.attrs)


def _carry(func: tirx.PrimFunc) -> tirx.PrimFunc:
    renamed = {}
    for param in func.params:
        element = getattr(getattr(param.type_annotation, "element_type", None), "dtype", None)
        # A half parameter stays one: upstream's caller passes a pointer to its half type, and codes are read through a cast.
        if element is not None and is_carried(element) and str(element) != "float16":
            renamed[param] = _pointer_to_codes(param, element)
    carry = _Carry(renamed)
    body = carry.visit_stmt(func.body)
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(prelude(carry.dtypes)), body)
    params = [renamed.get(param, param) for param in func.params]
    return tirx.PrimFunc(params, body, func.ret_type, func.buffer_map, func.attrs)
