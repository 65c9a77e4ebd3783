#include "spelling.h"

#include <tvm/ffi/error.h>

#include <cmath>
#include <iterator>
#include <map>
#include <sstream>

namespace tilelang_ext {
namespace metal {

DataType StoredType(DataType t) {
  bool is_custom = static_cast<int>(t.code()) >= DataType::kCustomBegin;
  return is_custom && t.bits() == 32 ? DataType::Float(32, t.lanes()) : t;
}

const NarrowFloat* AsNarrowFloat(DataType t) {
  static const NarrowFloat e4m3fn{"float8_e4m3fn", "e4m3fn_to_half", "half", "float_to_e4m3fn", 3, 7, 0x7e, false};
  static const NarrowFloat e5m2{"float8_e5m2", "e5m2_to_half", "half", "float_to_e5m2", 2, 15, 0x7b, false, 0x7c};
  static const NarrowFloat e4m3fnuz{
      "float8_e4m3fnuz", "e4m3fnuz_to_half", "half", "float_to_e4m3fnuz", 3, 8, 0x7f, true};
  static const NarrowFloat e5m2fnuz{
      "float8_e5m2fnuz", "e5m2fnuz_to_half", "half", "float_to_e5m2fnuz", 2, 16, 0x7f, true};
  static const NarrowFloat e8m0{"float8_e8m0fnu", "e8m0_to_float", "float", "float_to_e8m0", 0, 127, 0xfe, false};
  static const NarrowFloat e2m1{"float4_e2m1fn", "e2m1_to_half", "half", "float_to_e2m1", 1, 1, 7, false};
  // torch's float8_e4m3fn reaches TIR under either name.
  if (t.is_float8_e4m3fn() || t.is_float8_e4m3()) return &e4m3fn;
  if (t.is_float8_e5m2()) return &e5m2;
  if (t.is_float8_e4m3fnuz()) return &e4m3fnuz;
  if (t.is_float8_e5m2fnuz()) return &e5m2fnuz;
  if (t.is_float8_e8m0fnu()) return &e8m0;
  if (t.is_float4_e2m1fn()) return &e2m1;
  return nullptr;
}

int EncodeNarrow(const NarrowFloat& f, double value) {
  const bool e8m0 = f.mantissa == 0;
  const bool e2m1 = f.mantissa == 1;
  if (std::isnan(value)) return e8m0 ? 0xff : f.fnuz ? 0x80 : 0x7f;
  double a = std::fabs(value);
  int code = 0;
  if (e8m0) {
    code = a <= std::ldexp(1.0, -127) ? 0 : std::isinf(a) ? 255 : static_cast<int>(std::ilogb(a)) + 127;
    if (a > 0 && code > 0 && code < 254 && std::ldexp(a, 127 - code) >= 1.5) ++code;
    return code;
  }
  if (std::isinf(a)) {
    code = f.infinity ? f.infinity : f.max_code;
  } else if (a > 0) {
    // In units of the last place of the value's binade; a carry moves into the exponent by itself.
    int exponent = std::max(std::ilogb(a), 1 - f.bias);
    int units = static_cast<int>(std::nearbyint(std::ldexp(a, f.mantissa - std::min(exponent, 100))));
    code = units + ((exponent + f.bias - 1) << f.mantissa);
    if (exponent > 100 || code > f.max_code) code = f.max_code;
  }
  int sign = std::signbit(value) && !(f.fnuz && code == 0) ? (e2m1 ? 8 : 0x80) : 0;
  return code | sign;
}

namespace {

std::string ScalarName(DataType t) {
  t = StoredType(t);
  if (t.is_bool() || (t.is_uint() && t.bits() == 1)) return "bool";
  if (AsNarrowFloat(t)) return "uchar";
  if (t.is_float16()) return "half";
  if (t.is_bfloat16()) return "bfloat";
  if (t.is_float() && t.bits() == 32) return "float";
  if (t.is_float() && t.bits() == 64) {
    TVM_FFI_THROW(TypeError) << "dtype: Metal has no float64; got " << t << "; use float32";
  }
  if (t.is_int() || t.is_uint()) {
    const char* name = t.bits() == 8    ? "char"
                       : t.bits() == 16 ? "short"
                       : t.bits() == 32 ? "int"
                       : t.bits() == 64 ? "long"
                                        : nullptr;
    if (name) return std::string(t.is_uint() ? "u" : "") + name;
  }
  TVM_FFI_THROW(TypeError) << "dtype: Metal has no type for it; got " << t
                           << "; use float32, float16, bfloat16, an 8-bit float, float4_e2m1fn, bool or an integer of "
                              "8, 16, 32 or 64 bits";
}

bool IsFp4(DataType t) { return t.is_float4_e2m1fn(); }

}  // namespace

DataType ChunkType(DataType t) {
  if (t.lanes() % 4 != 0) {
    TVM_FFI_THROW(TypeError) << "vector: a Metal vector has 1, 2, 3 or a multiple of 4 lanes; got " << t
                             << "; vectorise by a power of two";
  }
  return t.with_lanes(4);
}

bool IsWideStruct(DataType t) {
  if (t.lanes() <= 4 || IsFp4(t)) return false;
  if (t.is_bool()) return true;
  int bytes = t.bits() / 8 * t.lanes();
  return t.bits() > 16 || (bytes != 8 && bytes != 16);
}

std::string TypeName(DataType t) {
  if (t.is_handle()) return "void*";
  if (t.is_void()) return "void";
  int lanes = t.lanes();
  if (IsFp4(t)) {
    switch (lanes) {
      case 1:
      case 2:
        return "uchar";
      case 4:
        return "ushort";
      case 8:
        return "uint";
      case 16:
        return "uint2";
      case 32:
        return "uint4";
    }
    TVM_FFI_THROW(TypeError) << "vector: float4_e2m1fn comes in 1, 2, 4, 8, 16 or 32 lanes; got " << lanes
                             << "; vectorise by a power of two";
  }
  std::string scalar = ScalarName(t);
  if (lanes == 1) return scalar;
  if (lanes <= 4) return scalar + std::to_string(lanes);
  DataType chunk = ChunkType(t);
  if (!IsWideStruct(t)) return t.bits() / 8 * lanes == 8 ? "uint2" : "uint4";
  return "wide<" + TypeName(chunk) + ", " + std::to_string(lanes / 4) + ">";
}

std::string Chunk(const std::string& var, DataType t, int i) {
  static const char* kComponent[] = {".x", ".y", ".z", ".w"};
  if (IsFp4(t)) {
    if (t.lanes() == 8) return "as_type<ushort2>(" + var + ")" + kComponent[i];
    return "as_type<ushort2>(" + var + kComponent[i / 2] + ")" + kComponent[i % 2];
  }
  if (IsWideStruct(t)) return var + ".v[" + std::to_string(i) + "]";
  std::string part = t.bits() == 8 ? var + kComponent[i] : var + (i == 0 ? ".xy" : ".zw");
  return "as_type<" + TypeName(ChunkType(t)) + ">(" + part + ")";
}

std::string FromChunks(DataType t, const std::vector<std::string>& chunks) {
  auto join = [](const std::vector<std::string>& parts) {
    std::string out;
    for (size_t i = 0; i < parts.size(); ++i) out += (i ? ", " : "") + parts[i];
    return out;
  };
  if (IsFp4(t)) {
    std::vector<std::string> words;
    for (size_t i = 0; i < chunks.size(); i += 2) {
      words.push_back("as_type<uint>(ushort2(" + chunks[i] + ", " + chunks[i + 1] + "))");
    }
    return words.size() == 1 ? words[0] : TypeName(t) + "(" + join(words) + ")";
  }
  if (IsWideStruct(t)) return TypeName(t) + "{{" + join(chunks) + "}}";
  std::vector<std::string> words;
  for (const std::string& chunk : chunks) {
    words.push_back(std::string("as_type<") + (t.bits() == 8 ? "uint" : "uint2") + ">(" + chunk + ")");
  }
  return TypeName(t) + "(" + join(words) + ")";
}

std::string Element(const std::string& vec, DataType t, int i) {
  static const char* kComponent[] = {".x", ".y", ".z", ".w"};
  if (t.lanes() == 1) return vec;
  if (IsFp4(t)) {
    std::string code = t.lanes() > 4 ? Chunk(vec, t, i / 4) : vec;
    int shift = 4 * (t.lanes() > 4 ? i % 4 : i);
    return "uchar((" + code + " >> " + std::to_string(shift) + ") & 15)";
  }
  if (t.lanes() > 4) return Chunk(vec, t, i / 4) + kComponent[i % 4];
  return vec + kComponent[i];
}

std::string FromElements(DataType t, const std::vector<std::string>& elements) {
  if (t.lanes() == 1) return elements[0];
  if (t.lanes() > 4) {
    std::vector<std::string> chunks;
    for (int i = 0; i < t.lanes(); i += 4) {
      chunks.push_back(FromElements(ChunkType(t), {elements.begin() + i, elements.begin() + i + 4}));
    }
    return FromChunks(t, chunks);
  }
  std::string out;
  if (IsFp4(t)) {
    for (size_t i = 0; i < elements.size(); ++i) {
      out += (i ? " | (" : "(") + elements[i] + " << " + std::to_string(4 * i) + ")";
    }
    return TypeName(t) + "(" + out + ")";
  }
  for (size_t i = 0; i < elements.size(); ++i) out += (i ? ", " : "") + elements[i];
  return TypeName(t) + "(" + out + ")";
}

std::vector<std::string> ReservedNames() {
  std::istringstream words(
      "abs acos alignas arg as_type asin atan atan2 atomic_float atomic_int atomic_uint auto bfloat bfloat2 "
      "bfloat3 bfloat4 blockIdx bool bool2 bool3 bool4 catch ceil char2 char3 char4 class clz const "
      "constant constexpr copysign cos cosh delete device enum erf exp exp10 exp2 explicit expm1 fabs false "
      "fast float2 float3 float4 floor fma fmax fmin fmod fragment friend gridDim half half2 half3 half4 "
      "hypot inline int2 int3 int4 kernel ldexp log log10 log1p log2 long2 long3 long4 max metal min mpp "
      "mutable namespace new operator popcount pow precise private protected public rint round rsqrt "
      "sampler select short2 short3 short4 signed simd_lane sin sinh sizeof sqrt static tan tanh template "
      "texture this thread threadIdx threadgroup trunc true try typename uchar uchar2 uchar3 uchar4 uint "
      "uint2 uint3 uint4 ulong ulong2 ulong3 ulong4 ushort ushort2 ushort3 ushort4 using vec vertex virtual "
      "volatile wide ");
  return {std::istream_iterator<std::string>(words), {}};
}

std::string MathFunction(const std::string& name) {
  // Names of TIR's calls -> Metal. libm's suffix f is dropped before the look-up.
  static const std::map<std::string, std::string> table = {
      {"abs", "abs"},
      {"acos", "acos"},
      {"acosh", "acosh"},
      {"asin", "asin"},
      {"asinh", "asinh"},
      {"atan", "atan"},
      {"atan2", "atan2"},
      {"atanh", "atanh"},
      {"ceil", "ceil"},
      {"clz", "clz"},
      {"copysign", "copysign"},
      {"cos", "cos"},
      {"cosh", "cosh"},
      {"erf", "erf"},
      {"exp", "exp"},
      {"exp10", "exp10"},
      {"exp2", "exp2"},
      {"expm1", "expm1"},
      {"fabs", "fabs"},
      {"floor", "floor"},
      {"fma", "fma"},
      {"fmax", "fmax"},
      {"fmin", "fmin"},
      {"fmod", "fmod"},
      {"hypot", "hypot"},
      {"ldexp", "ldexp"},
      {"log", "log"},
      {"log10", "log10"},
      {"log1p", "log1p"},
      {"log2", "log2"},
      {"max", "max"},
      {"min", "min"},
      {"nearbyint", "rint"},
      {"nextafter", "next_after"},
      {"popcount", "popcount"},
      {"pow", "pow"},
      {"rint", "rint"},
      {"round", "round"},
      {"rsqrt", "rsqrt"},
      {"sin", "sin"},
      {"sinh", "sinh"},
      {"sqrt", "sqrt"},
      {"tan", "tan"},
      {"tanh", "precise::tanh"},  // the fast one overflows for large arguments
      {"trunc", "trunc"},
      {"tl.__cos", "fast::cos"},
      {"tl.__exp", "fast::exp"},
      {"tl.__exp10", "fast::exp10"},
      {"tl.__log", "fast::log"},
      {"tl.__log10", "fast::log10"},
      {"tl.__log2", "fast::log2"},
      {"tl.__sin", "fast::sin"},
      {"tl.__tan", "fast::tan"},
      {"tl.fma", "fma"},
      {"tl.ieee_fmaf", "fma"},
      {"tl.ieee_frsqrt", "precise::rsqrt"},
      {"tl.ieee_fsqrt", "precise::sqrt"},
      {"tl.max_nan", "max_nan"},
      {"tl.min_nan", "min_nan"},
      {"tl.round_ties_away_from_zero", "round"},
      {"tl::RoundTiesAwayFromZero", "round"},
  };
  auto it = table.find(name);
  if (it == table.end() && name.size() > 1 && name.back() == 'f') it = table.find(name.substr(0, name.size() - 1));
  return it == table.end() ? "" : it->second;
}

}  // namespace metal
}  // namespace tilelang_ext
