/*!
 * \file codegen_expression.cc
 * \brief How the Metal code generator spells memory accesses, conversions and operators.
 */
#include <tvm/arith/analyzer.h>
#include <tvm/tirx/analysis.h>

#include <cmath>
#include <cstdio>

#include "builtin.h"
#include "codegen.h"
#include "op/builtin.h"

namespace tilelang_ext {
namespace metal {

namespace {

std::string Number(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.9g", value);
  std::string out = text;
  if (out.find_first_of(".e") == std::string::npos) out += ".0";
  return out + "f";
}

}  // namespace

// ---- memory --------------------------------------------------------------------------------------------------

std::string CodeGenMetal::ScopeOf(const Var& data) {
  auto it = alloc_storage_scope_.find(data.get());
  return it != alloc_storage_scope_.end() ? it->second : std::string(GetPtrStorageScope(data));
}

std::string CodeGenMetal::SpaceOf(const PrimExpr& pointer) {
  if (const auto* var = pointer.as<VarNode>()) return AddressSpace(ScopeOf(ffi::GetRef<Var>(var)));
  if (const auto* cast = pointer.as<CastNode>()) return SpaceOf(cast->value);
  if (const auto* call = pointer.as<CallNode>()) {
    if (call->op.same_as(builtin::address_of())) {
      return AddressSpace(ScopeOf(Downcast<BufferLoad>(call->args[0])->buffer->data));
    }
    if (call->op.same_as(builtin::tvm_access_ptr())) return SpaceOf(call->args[1]);
    if (!call->args.empty()) return SpaceOf(call->args[0]);
  }
  TVM_FFI_THROW(InternalError) << "Metal: no address space for " << pointer;
  TVM_FFI_UNREACHABLE();
}

/*! \brief The buffer as a pointer to its scalar elements. */
Pointer CodeGenMetal::ElementsOf(const Buffer& buffer) {
  const VarNode* data = buffer->data.get();
  DataType element = buffer->dtype.element_of();
  std::string space = AddressSpace(ScopeOf(buffer->data));
  std::string text = GetVarID(data);
  auto declared = handle_data_type_.find(data);
  if (declared == handle_data_type_.end() || Type(declared->second) != Type(element)) {
    text = "((" + space + " " + Type(element) + "*)" + text + ")";
  }
  return {text, element, space};
}

/*! \brief A pointer expression; `address_of`, `tvm_access_ptr` and pointer variables are understood. */
Pointer CodeGenMetal::PointerTo(const PrimExpr& e) {
  if (const auto* call = e.as<CallNode>()) {
    if (call->op.same_as(builtin::address_of())) {
      const auto* load = call->args[0].as<BufferLoadNode>();
      TVM_FFI_ICHECK(load && load->indices.size() == 1)
          << "Metal: the address of one element of a flat buffer; got " << e;
      Pointer p = ElementsOf(load->buffer);
      PrimExpr index = load->indices[0];
      if (const auto* ramp = index.as<RampNode>()) index = ramp->base;
      if (load->buffer->dtype.lanes() > 1) index = index * make_const(index.dtype(), load->buffer->dtype.lanes());
      if (p.element.is_float4_e2m1fn()) index = index >> make_const(index.dtype(), 1);
      p.array = p.text;
      p.index = Print(analyzer_.Simplify(index));
      p.text = Add(p.array, p.index);
      return p;
    }
    if (call->op.same_as(builtin::tvm_access_ptr())) {
      DataType element = call->args[0].dtype().element_of();
      std::string space = SpaceOf(call->args[1]);
      PrimExpr offset = call->args[2];
      if (call->args[0].dtype().lanes() > 1)
        offset = offset * make_const(offset.dtype(), call->args[0].dtype().lanes());
      std::string base = "((" + space + " " + Type(element) + "*)" + Print(call->args[1]) + ")";
      std::string index = Print(analyzer_.Simplify(offset));
      return {Add(base, index), element, space, base, index};
    }
  }
  DataType element = DataType::Void();
  if (const auto* var = e.as<VarNode>()) {
    auto it = handle_data_type_.find(var);
    if (it != handle_data_type_.end()) element = it->second;
  }
  std::string text = Print(e);
  return {text, element, SpaceOf(e), text, "0"};
}

std::string CodeGenMetal::LoadVector(const Pointer& p, DataType t, const PrimExpr& base, bool aligned) {
  if (t.is_float4_e2m1fn()) {
    PrimExpr byte = analyzer_.Simplify(base >> make_const(base.dtype(), 1));
    std::string at = Print(byte);
    if (t.lanes() == 2) return p.text + "[" + at + "]";
    return "*(" + p.space + " " + Type(t) + "*)(" + Add(p.text, at) + ")";
  }
  if (!aligned || t.lanes() == 3) {
    std::string at = Temporary(Print(base), base.dtype());
    Texts elements;
    for (int i = 0; i < t.lanes(); ++i) elements.push_back(p.text + "[" + Add(at, std::to_string(i)) + "]");
    if (IsWideStruct(t)) prelude_.Use("wide");
    return FromElements(t, elements);
  }
  std::string at = Print(base);
  if (IsWideStruct(t)) {
    at = Temporary(at, base.dtype());
    prelude_.Use("wide");
    Texts chunks;
    for (int i = 0; i < t.lanes(); i += 4) {
      chunks.push_back(LoadVector(p, ChunkType(t), i == 0 ? base : base + make_const(base.dtype(), i), true));
    }
    return FromChunks(t, chunks);
  }
  if (t.is_bool()) {
    std::string bytes = "uchar" + std::to_string(t.lanes());
    return Type(t) + "(*(" + p.space + " " + bytes + "*)(" + Add(p.text, at) + "))";
  }
  return "*(" + p.space + " " + Type(t) + "*)(" + Add(p.text, at) + ")";
}

void CodeGenMetal::StoreVector(const Pointer& p, DataType t, const PrimExpr& base, const std::string& value,
                               bool aligned) {
  if (t.is_float4_e2m1fn()) {
    std::string at = Print(analyzer_.Simplify(base >> make_const(base.dtype(), 1)));
    PrintIndent();
    stream << "*(" << p.space << ' ' << Type(t) << "*)(" << Add(p.text, at) << ") = " << value << ";\n";
    return;
  }
  if (!aligned || t.lanes() == 3) {
    std::string v = Temporary(value, t);
    std::string at = Temporary(Print(base), base.dtype());
    for (int i = 0; i < t.lanes(); ++i) {
      PrintIndent();
      stream << p.text << '[' << Add(at, std::to_string(i)) << "] = " << Element(v, t, i) << ";\n";
    }
    return;
  }
  if (IsWideStruct(t)) {
    std::string v = Temporary(value, t);
    for (int i = 0; i < t.lanes(); i += 4) {
      StoreVector(p, ChunkType(t), i == 0 ? base : base + make_const(base.dtype(), i), Chunk(v, t, i / 4), true);
    }
    return;
  }
  std::string at = Print(base);
  std::string type = t.is_bool() ? "uchar" + std::to_string(t.lanes()) : Type(t);
  PrintIndent();
  stream << "*(" << p.space << ' ' << type << "*)(" << Add(p.text, at)
         << ") = " << (t.is_bool() ? type + "(" + value + ")" : value) << ";\n";
}

void CodeGenMetal::VisitExpr_(const BufferLoadNode* op, std::ostream& os) {
  TVM_FFI_ICHECK(op->indices.size() == 1 && !op->predicate.defined()) << "Metal: flat, unpredicated loads only";
  const PrimExpr& index = op->indices[0];
  DataType t = op->dtype;
  if (GetPtrStorageScope(op->buffer->data) == "local.var") {
    os << GetVarID(op->buffer->data.get());
    return;
  }
  if (op->buffer->dtype.lanes() > 1 && t.lanes() == op->buffer->dtype.lanes()) {
    os << GetBufferRef(t, op->buffer.get(), index);
    return;
  }
  Pointer p = ElementsOf(op->buffer);
  if (t.lanes() == 1) {
    if (t.is_float4_e2m1fn()) {
      std::string i = Temporary(Print(index), index.dtype());
      os << "uchar((" << p.text << '[' << i << " >> 1] >> ((" << i << " & 1) * 4)) & 15)";
    } else {
      os << p.text << '[' << Print(index) << ']';
    }
    return;
  }
  if (const auto* ramp = index.as<RampNode>(); ramp && is_one(ramp->stride)) {
    os << LoadVector(p, t, ramp->base, IsAligned(ramp->base, t.lanes()));
    return;
  }
  std::string at = Temporary(Print(index), index.dtype());
  Texts elements;
  for (int i = 0; i < t.lanes(); ++i) {
    std::string e = Element(at, index.dtype(), i);
    elements.push_back(t.is_float4_e2m1fn() ? "((" + p.text + "[" + e + " >> 1] >> ((" + e + " & 1) * 4)) & 15)"
                                            : p.text + "[" + e + "]");
  }
  if (IsWideStruct(t)) prelude_.Use("wide");
  os << FromElements(t, elements);
}

// ---- values --------------------------------------------------------------------------------------------------

std::string CodeGenMetal::BinaryText(const std::string& op, DataType out, const PrimExpr& a, const PrimExpr& b) {
  DataType t = a.dtype().element_of();
  if (const NarrowFloat* narrow = AsNarrowFloat(t)) {
    TVM_FFI_THROW(TypeError) << narrow->name << ": is stored on Metal, not computed with; got `" << op
                             << "` of two such values; cast them to float16 or float32 first";
  }
  bool function = std::isalpha(static_cast<unsigned char>(op[0]));
  return Chunked(out, {a, b}, [&](const Texts& x, DataType part) -> std::string {
    if (function) {
      if (!t.is_bfloat16()) return op + "(" + x[0] + ", " + x[1] + ")";
      std::string wide = Type(DataType::Float(32, part.lanes()));
      return Type(part) + "(" + op + "(" + wide + "(" + x[0] + "), " + wide + "(" + x[1] + ")))";
    }
    std::string text = "(" + x[0] + " " + op + " " + x[1] + ")";
    // C++ computes narrow scalars in int; TIR wraps at the type's own width.
    bool narrow_integer = (out.is_int() || out.is_uint()) && out.bits() < 32 && part.lanes() == 1;
    return narrow_integer ? Type(part) + text : text;
  });
}

/*! \brief A comparison. That of a float with itself asks for NaN, which Apple's compiler, with fast math, takes for
 * absent. */
void CodeGenMetal::Equality(const std::string& op, DataType out, const PrimExpr& a, const PrimExpr& b,
                            std::ostream& os) {
  DataType t = a.dtype().element_of();
  const auto* kept = b.as<CallNode>();
  const bool is_kept = kept && kept->op.same_as(keep());
  if (AsNarrowFloat(t) || !(t.is_float() || t.is_bfloat16()) || !ExprDeepEqual()(a, is_kept ? kept->args[0] : b)) {
    os << BinaryText(op, out, a, b);
    return;
  }
  os << (op == "==" ? "(!" : "") << Call_("is_nan", out, {a}) << (op == "==" ? ")" : "");
}

/*! \brief A conversion of at most four lanes. */
std::string CodeGenMetal::Convert(const std::string& value, DataType from, DataType to) {
  from = StoredType(from);
  to = StoredType(to);
  if (from == to) return value;
  int lanes = to.lanes();
  if (const NarrowFloat* f = AsNarrowFloat(from)) {
    std::string codes = value;
    if (from.is_float4_e2m1fn() && lanes > 1) {
      std::string unpack = "unpack_e2m1x" + std::to_string(lanes);
      prelude_.Use(unpack);
      codes = unpack + "(" + value + ")";
    }
    prelude_.Use(f->decode, lanes);
    DataType decoded = DataType::Float(std::string(f->decoded) == "half" ? 16 : 32, lanes);
    return Convert(std::string(f->decode) + "(" + codes + ")", decoded, to);
  }
  if (const NarrowFloat* f = AsNarrowFloat(to)) {
    prelude_.Use(f->encode, lanes);
    std::string codes = std::string(f->encode) + "(" + Convert(value, from, DataType::Float(32, lanes)) + ")";
    if (!to.is_float4_e2m1fn() || lanes == 1) return codes;
    std::string pack = "pack_e2m1x" + std::to_string(lanes);
    prelude_.Use(pack);
    return pack + "(" + codes + ")";
  }
  // bfloat converts from and to float only.
  bool through_float = (from.is_bfloat16() && to.bits() != 32) || (to.is_bfloat16() && from.bits() != 32) ||
                       (from.is_bfloat16() && !to.is_float()) || (to.is_bfloat16() && !from.is_float());
  if (through_float) {
    return Type(to) + "(" + Type(DataType::Float(32, lanes)) + "(" + value + "))";
  }
  return Type(to) + "(" + value + ")";
}

void CodeGenMetal::VisitExpr_(const SelectNode* op, std::ostream& os) {
  if (op->dtype.lanes() == 1) {
    CodeGenC::VisitExpr_(op, os);
    return;
  }
  DataType t = op->dtype;
  if (op->condition.dtype().lanes() == 1) {
    os << '(' << Print(op->condition) << " ? " << Print(op->true_value) << " : " << Print(op->false_value) << ')';
    return;
  }
  TVM_FFI_ICHECK(!t.is_float4_e2m1fn()) << "Metal: select of packed float4_e2m1fn values";
  os << Chunked(t, {op->false_value, op->true_value, op->condition}, [&](const Texts& x, DataType part) {
    if (!t.is_bfloat16()) return "select(" + x[0] + ", " + x[1] + ", " + x[2] + ")";
    std::string bits = "as_type<" + Type(DataType::UInt(16, part.lanes())) + ">(";
    return "as_type<" + Type(part) + ">(select(" + bits + x[0] + "), " + bits + x[1] + "), " + x[2] + "))";
  });
}

void CodeGenMetal::VisitExpr_(const RampNode* op, std::ostream& os) {
  std::string base = Temporary(Print(op->base), op->base.dtype());
  Texts elements;
  for (int i = 0; i < op->dtype.lanes(); ++i) {
    PrimExpr offset = analyzer_.Simplify(op->stride * make_const(op->stride.dtype(), i));
    elements.push_back(Add(base, Print(offset)));
  }
  if (IsWideStruct(op->dtype)) prelude_.Use("wide");
  os << FromElements(op->dtype, elements);
}

void CodeGenMetal::VisitExpr_(const BroadcastNode* op, std::ostream& os) {
  DataType t = op->dtype;
  std::string value = Print(op->value);
  if (t.is_float4_e2m1fn()) {
    if (t.lanes() == 2) {
      os << "uchar(" << value << " * 0x11)";
    } else {
      std::string chunk = "ushort(" + value + " * 0x1111)";
      os << (t.lanes() == 4 ? chunk : FromChunks(t, Texts(t.lanes() / 4, chunk)));
    }
    return;
  }
  if (t.lanes() <= 4) {
    os << Type(t) << '(' << value << ')';
    return;
  }
  std::string chunk = Type(ChunkType(t)) + "(" + Temporary(value, op->value.dtype()) + ")";
  if (IsWideStruct(t)) prelude_.Use("wide");
  os << FromChunks(t, Texts(t.lanes() / 4, chunk));
}

void CodeGenMetal::VisitExpr_(const ShuffleNode* op, std::ostream& os) {
  Texts elements;
  for (const PrimExpr& v : op->vectors) {
    std::string text = Print(v);
    if (v.dtype().lanes() > 1) text = Temporary(text, v.dtype());
    for (int i = 0; i < v.dtype().lanes(); ++i) elements.push_back(Element(text, v.dtype(), i));
  }
  Texts chosen;
  for (const PrimExpr& i : op->indices) chosen.push_back(elements.at(Downcast<IntImm>(i)->value));
  if (IsWideStruct(op->dtype)) prelude_.Use("wide");
  os << FromElements(op->dtype, chosen);
}

void CodeGenMetal::VisitExpr_(const IntImmNode* op, std::ostream& os) {
  if (op->dtype.is_bool() || (op->dtype.is_uint() && op->dtype.bits() == 1)) {
    os << (op->value ? "true" : "false");
  } else if (op->dtype == DataType::Int(32)) {
    if (op->value == INT32_MIN) {
      os << "(-2147483647 - 1)";
    } else {
      os << op->value;
    }
  } else if (op->dtype == DataType::Int(64) && op->value == INT64_MIN) {
    os << "(-9223372036854775807L - 1)";
  } else {
    std::string suffix = op->dtype.is_uint() && op->dtype.bits() >= 32 ? "u" : "";
    if (op->dtype.bits() == 64) suffix += "l";
    os << Type(op->dtype) << '(' << op->value << suffix << ')';
  }
}

void CodeGenMetal::VisitExpr_(const FloatImmNode* op, std::ostream& os) {
  DataType t = op->dtype;
  if (const NarrowFloat* narrow = AsNarrowFloat(t)) {
    os << "uchar(" << EncodeNarrow(*narrow, op->value) << ')';
    return;
  }
  std::string text = std::isnan(op->value)   ? "NAN"
                     : std::isinf(op->value) ? (op->value < 0 ? "-INFINITY" : "INFINITY")
                                             : Number(op->value);
  os << (t.bits() == 32 ? text : Type(t) + "(" + text + ")");
}

}  // namespace metal
}  // namespace tilelang_ext
