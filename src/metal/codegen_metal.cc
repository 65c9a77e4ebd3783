/*!
 * \file codegen_metal.cc
 * \brief The Metal code generator, on TVM's CodeGenC. It spells; it decides nothing.
 */
#include "codegen_metal.h"

#include <tvm/arith/analyzer.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/tirx/builtin.h>
#include <tvm/tirx/op.h>
#include <tvm/tirx/stmt_functor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "builtin.h"
#include "op/builtin.h"
#include "prelude.h"
#include "runtime/thread_storage_scope.h"
#include "spelling.h"
#include "target/build_common.h"
#include "target/metal/metal_fallback_module.h"
#include "target/source/codegen_c.h"

namespace tilelang_ext {
namespace metal {
namespace {

using namespace tvm;        // NOLINT(build/namespaces)
using namespace tvm::tirx;  // NOLINT(build/namespaces)
using tvm::codegen::CodeGenC;

constexpr int kMaxBuffers = 31;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxThreadgroupBytes = 32768;
constexpr int kSimdWidth = 32;

std::string AddressSpace(const std::string& scope) {
  if (scope == "global" || scope.empty()) return "device";
  if (scope == "shared" || scope == "shared.dyn" || scope == "threadgroup") return "threadgroup";
  if (scope.compare(0, 5, "local") == 0) return "thread";
  TVM_FFI_THROW(ValueError) << "scope: a Metal buffer is global, shared or local; got `" << scope
                            << "`; it should have been lowered by the pass list of tilelang_ext";
  TVM_FFI_UNREACHABLE();
}

std::string Number(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.9g", value);
  std::string out = text;
  if (out.find_first_of(".e") == std::string::npos) out += ".0";
  return out + "f";
}

/*! \brief What must be known before the text of a function is printed. */
class Usage : public StmtExprVisitor {
 public:
  std::unordered_set<const VarNode*> vector_accessed;  // buffers that need the alignment of a vector

 private:
  void VisitExpr_(const BufferLoadNode* op) final {
    if (op->dtype.lanes() > 1) vector_accessed.insert(op->buffer->data.get());
    StmtExprVisitor::VisitExpr_(op);
  }
  void VisitStmt_(const BufferStoreNode* op) final {
    if (op->value.dtype().lanes() > 1) vector_accessed.insert(op->buffer->data.get());
    StmtExprVisitor::VisitStmt_(op);
  }
};

/*! \brief A pointer to elements (never to vectors): its text, what it points to and where. */
struct Pointer {
  std::string text;
  DataType element;
  std::string space;
};

class CodeGenMetal final : public CodeGenC {
 public:
  void AddKernel(const std::string& name, const PrimFunc& func);

  const Prelude& prelude() const { return prelude_; }
  std::string KernelText() const { return decl_stream.str() + kernel_text_; }

  void PrintType(DataType t, std::ostream& os) final {
    if (IsWideStruct(t)) prelude_.Use("wide");
    os << TypeName(t);
  }

  // expressions
  void VisitExpr_(const VarNode* op, std::ostream& os) final {
    used_variables_.insert(op);
    CodeGenC::VisitExpr_(op, os);
  }
  void VisitExpr_(const AddNode* op, std::ostream& os) final { Binary("+", op, os); }
  void VisitExpr_(const SubNode* op, std::ostream& os) final { Binary("-", op, os); }
  void VisitExpr_(const MulNode* op, std::ostream& os) final { Binary("*", op, os); }
  void VisitExpr_(const DivNode* op, std::ostream& os) final { Binary("/", op, os); }
  void VisitExpr_(const ModNode* op, std::ostream& os) final {
    Binary(op->dtype.is_int() || op->dtype.is_uint() ? "%" : "fmod", op, os);
  }
  void VisitExpr_(const MinNode* op, std::ostream& os) final { Binary("min", op, os); }
  void VisitExpr_(const MaxNode* op, std::ostream& os) final { Binary("max", op, os); }
  void VisitExpr_(const EQNode* op, std::ostream& os) final { Binary("==", op, os); }
  void VisitExpr_(const NENode* op, std::ostream& os) final { Binary("!=", op, os); }
  void VisitExpr_(const LTNode* op, std::ostream& os) final { Binary("<", op, os); }
  void VisitExpr_(const LENode* op, std::ostream& os) final { Binary("<=", op, os); }
  void VisitExpr_(const GTNode* op, std::ostream& os) final { Binary(">", op, os); }
  void VisitExpr_(const GENode* op, std::ostream& os) final { Binary(">=", op, os); }
  void VisitExpr_(const AndNode* op, std::ostream& os) final { Binary(op->dtype.lanes() > 1 ? "&" : "&&", op, os); }
  void VisitExpr_(const OrNode* op, std::ostream& os) final { Binary(op->dtype.lanes() > 1 ? "|" : "||", op, os); }
  void VisitExpr_(const NotNode* op, std::ostream& os) final {
    os << Chunked(op->dtype, {op->a}, [](const std::vector<std::string>& x, DataType) { return "(!" + x[0] + ")"; });
  }
  void VisitExpr_(const CastNode* op, std::ostream& os) final {
    DataType from = op->value.dtype();
    os << Chunked(op->dtype, {op->value}, [&](const std::vector<std::string>& x, DataType to) {
      return Convert(x[0], from.with_lanes(to.lanes()), to);
    });
  }
  void VisitExpr_(const SelectNode* op, std::ostream& os) final;
  void VisitExpr_(const RampNode* op, std::ostream& os) final;
  void VisitExpr_(const BroadcastNode* op, std::ostream& os) final;
  void VisitExpr_(const ShuffleNode* op, std::ostream& os) final;
  void VisitExpr_(const IntImmNode* op, std::ostream& os) final;
  void VisitExpr_(const FloatImmNode* op, std::ostream& os) final;
  void VisitExpr_(const BufferLoadNode* op, std::ostream& os) final;
  void VisitExpr_(const CallNode* op, std::ostream& os) final;

  // statements
  void VisitStmt_(const BufferStoreNode* op) final;
  void VisitStmt_(const AllocBufferNode* op) final;
  void VisitStmt_(const BindNode* op) final;
  void VisitStmt_(const AttrStmtNode* op) final;
  void VisitStmt_(const ForNode* op) final;
  void VisitStmt_(const AssertStmtNode* op) final {}  // kernels have no way to report one
  void BindThreadIndex(const IterVar& iv) final;
  void PrintStorageSync(const CallNode* op) final;
  void PrintStorageScope(const std::string& scope, std::ostream& os) final { os << AddressSpace(scope) << ' '; }

 private:
  using Texts = std::vector<std::string>;

  std::string Print(const PrimExpr& e) { return CodeGenC::PrintExpr(e); }

  std::string Type(DataType t) {
    std::ostringstream os;
    PrintType(t, os);
    return os.str();
  }

  /*! \brief The value in a variable of its own, so that its text may be repeated. */
  std::string Temporary(const std::string& value, DataType t) {
    if (std::all_of(value.begin(), value.end(), [](char c) { return std::isalnum(c) || c == '_'; })) return value;
    std::string name = name_supply_->FreshName("v");
    PrintIndent();
    stream << "const " << Type(t) << ' ' << name << " = " << value << ";\n";
    return name;
  }

  /*! \brief Print an elementwise operation: at once up to four lanes, chunk by chunk beyond. */
  template <typename F>
  std::string Chunked(DataType out, const std::vector<PrimExpr>& operands, F print) {
    Texts texts;
    for (const PrimExpr& e : operands) texts.push_back(Print(e));
    if (out.lanes() <= 4) return print(texts, out);
    for (size_t i = 0; i < operands.size(); ++i) {
      if (operands[i].dtype().lanes() > 1) texts[i] = Temporary(texts[i], operands[i].dtype());
    }
    Texts chunks;
    for (int i = 0; i < out.lanes() / 4; ++i) {
      Texts parts;
      for (size_t j = 0; j < operands.size(); ++j) {
        DataType t = operands[j].dtype();
        parts.push_back(t.lanes() > 1 ? Chunk(texts[j], t, i) : texts[j]);
      }
      chunks.push_back(print(parts, ChunkType(out)));
    }
    if (IsWideStruct(out)) prelude_.Use("wide");
    return FromChunks(out, chunks);
  }

  template <typename Node>
  void Binary(const std::string& op, const Node* node, std::ostream& os) {
    os << BinaryText(op, node->dtype, node->a, node->b);
  }
  std::string BinaryText(const std::string& op, DataType out, const PrimExpr& a, const PrimExpr& b);
  std::string Convert(const std::string& value, DataType from, DataType to);
  std::string Call_(const std::string& function, DataType out, const std::vector<PrimExpr>& args);
  std::string ShuffleLanes(const std::string& function, const PrimExpr& value, const PrimExpr& lane);
  std::string Atomic(const std::string& op, const CallNode* call);
  std::string SimdReduce(const std::string& function, const std::string& op, const PrimExpr& value);
  void PrintExtern(const CallNode* call, std::ostream& os);

  // memory
  std::string ScopeOf(const Var& data);
  std::string SpaceOf(const PrimExpr& pointer);
  Pointer ElementsOf(const Buffer& buffer);
  Pointer PointerTo(const PrimExpr& e);
  std::string Add(const std::string& pointer, const std::string& index) {
    return index == "0" ? pointer : pointer + " + " + index;
  }
  std::string LoadVector(const Pointer& p, DataType t, const PrimExpr& base, bool aligned);
  void StoreVector(const Pointer& p, DataType t, const PrimExpr& base, const std::string& value, bool aligned);
  bool IsAligned(const PrimExpr& base, int lanes) {
    auto mod = analyzer_.modular_set(base);
    return mod->coeff % lanes == 0 && mod->base % lanes == 0;
  }

  std::string Lane() {
    uses_lane_ = true;
    return "simd_lane";
  }

  arith::Analyzer analyzer_;
  Prelude prelude_;
  Usage usage_;
  std::ostringstream top_;  // declarations at the top of the kernel
  std::string kernel_text_;
  std::map<std::string, std::string> index_names_;                      // "threadIdx.x" -> its name in the text
  std::map<std::string, std::vector<const VarNode*>> index_variables_;  // "threadIdx.x" -> its variables in TIR
  std::unordered_set<const VarNode*> used_variables_;
  int64_t threadgroup_bytes_ = 0;
  bool uses_lane_ = false;
  bool uses_simdgroup_ = false;
  bool uses_grid_ = false;
  bool uses_simdgroup_operations_ = false;
};

// ---- functions -----------------------------------------------------------------------------------------------

void CodeGenMetal::AddKernel(const std::string& name, const PrimFunc& func) {
  InitFuncState(func);
  for (const std::string& word : ReservedNames()) name_supply_->ReserveName(word);
  usage_(func->body);

  std::unordered_set<int64_t> readonly;
  if (auto indices = func->GetAttr<ffi::Array<Integer>>("tl.readonly_param_indices")) {
    for (const Integer& i : indices.value()) readonly.insert(i->value);
  }

  int64_t threads = 1;
  bool static_threads = true;
  if (auto extents = func->GetAttr<ffi::Map<ffi::String, PrimExpr>>("thread_extent")) {
    for (const char* tag : {"threadIdx.x", "threadIdx.y", "threadIdx.z"}) {
      auto extent = extents.value().Get(tag);
      if (!extent) continue;
      if (const auto* n = extent.value().as<IntImmNode>()) {
        threads *= n->value;
      } else {
        static_threads = false;
      }
    }
  }
  if (threads > kMaxThreads) {
    TVM_FFI_THROW(ValueError) << "threads: a Metal threadgroup has at most " << kMaxThreads << " threads; got "
                              << threads << " in kernel " << name << "; use T.Kernel(..., threads=256)";
  }

  // Buffers in parameter order, then the scalars in one struct.
  std::vector<std::string> params;
  std::ostringstream scalars;
  std::vector<Var> scalar_params;
  for (size_t i = 0; i < func->params.size(); ++i) {
    const Var& v = func->params[i];
    if (!v.dtype().is_handle()) {
      scalar_params.push_back(v);
      continue;
    }
    TVM_FFI_ICHECK(scalar_params.empty()) << "Metal: buffers come before scalars in the parameters of " << name;
    const auto* pointer = v->type_annotation.as<PointerTypeNode>();
    const auto* element = pointer ? pointer->element_type.as<PrimTypeNode>() : nullptr;
    TVM_FFI_ICHECK(element) << "Metal: parameter " << v << " of " << name << " must point to elements of a known type";
    if (element->dtype.is_float() && element->dtype.bits() == 64) {
      TVM_FFI_THROW(TypeError) << v->name_hint << ": Metal has no float64; got a float64 buffer in kernel " << name
                               << "; use float32";
    }
    alloc_storage_scope_[v.get()] = "global";
    RegisterHandleType(v.get(), element->dtype);
    std::string text = readonly.count(static_cast<int64_t>(i)) ? "const device " : "device ";
    params.push_back(text + Type(element->dtype) + "* " + AllocVarID(v.get()) + " [[buffer(" +
                     std::to_string(params.size()) + ")]]");
  }
  if (!scalar_params.empty()) {
    decl_stream << "\nstruct " << name << "_args_t {\n";
    for (const Var& v : scalar_params) {
      if (AsNarrowFloat(v.dtype()) || v.dtype().lanes() != 1) {
        TVM_FFI_THROW(TypeError) << v->name_hint << ": a scalar argument on Metal is bool, an integer, float16, "
                                 << "bfloat16 or float32; got " << v.dtype() << "; pass it in a buffer";
      }
      std::string id = AllocVarID(v.get());
      decl_stream << "  alignas(8) " << Type(v.dtype()) << ' ' << id << ";\n";
      var_idmap_[v.get()] = "arg." + id;
    }
    decl_stream << "};\n";
    params.push_back("constant " + name + "_args_t& arg [[buffer(" + std::to_string(params.size()) + ")]]");
  }
  if (params.size() > kMaxBuffers) {
    TVM_FFI_THROW(ValueError) << "buffers: a Metal kernel takes at most " << kMaxBuffers
                              << " (all scalars together count as one); got " << params.size() << " in kernel " << name
                              << "; pack some of them into one tensor";
  }

  int scope = BeginScope();
  PrintStmt(func->body);
  EndScope(scope);
  std::string body = stream.str();
  stream.str("");

  if (threadgroup_bytes_ > kMaxThreadgroupBytes) {
    TVM_FFI_THROW(ValueError) << "shared memory: a Metal threadgroup has " << kMaxThreadgroupBytes << " bytes; got "
                              << threadgroup_bytes_ << " in kernel " << name
                              << "; use smaller tiles or fewer num_stages";
  }
  if (uses_simdgroup_operations_ && static_threads && threads % kSimdWidth != 0) {
    TVM_FFI_THROW(ValueError) << "threads: must be a multiple of " << kSimdWidth
                              << " for operations of a simdgroup; got " << threads << " in kernel " << name
                              << "; use T.Kernel(..., threads=" << (threads / kSimdWidth + 1) * kSimdWidth << ")";
  }

  params.push_back("uint3 blockIdx [[threadgroup_position_in_grid]]");
  if (uses_grid_) params.push_back("uint3 gridDim [[threadgroups_per_grid]]");
  params.push_back("uint3 threadIdx [[thread_position_in_threadgroup]]");
  if (uses_lane_) params.push_back("uint simd_lane [[thread_index_in_simdgroup]]");
  if (uses_simdgroup_) params.push_back("uint simd_group [[simdgroup_index_in_threadgroup]]");

  std::ostringstream out;
  out << '\n';
  if (static_threads) out << "[[max_total_threads_per_threadgroup(" << threads << ")]]\n";
  out << "kernel void " << name << "(\n";
  for (size_t i = 0; i < params.size(); ++i) out << "    " << params[i] << (i + 1 < params.size() ? ",\n" : ") {\n");
  for (const auto& [tag, variables] : index_variables_) {
    auto used = [&](const VarNode* v) { return used_variables_.count(v) != 0; };
    if (std::none_of(variables.begin(), variables.end(), used)) continue;
    std::string type = Type(variables[0]->dtype);
    out << "  const " << type << ' ' << index_names_[tag] << " = " << type << '(' << tag << ");\n";
  }
  out << top_.str() << body << "}\n";
  kernel_text_ = out.str();
}

void CodeGenMetal::BindThreadIndex(const IterVar& iv) {
  auto [known, is_new] = index_names_.emplace(iv->thread_tag, "");
  if (is_new) known->second = AllocVarID(iv->var.get());
  var_idmap_[iv->var.get()] = known->second;
  index_variables_[iv->thread_tag].push_back(iv->var.get());
}

void CodeGenMetal::PrintStorageSync(const CallNode* op) {
  std::string scope = Downcast<StringImm>(op->args[0])->value;
  if (scope == "warp") {
    PrintIndent();
    stream << "simdgroup_barrier(mem_flags::mem_threadgroup);\n";
  } else if ((scope == "shared" || scope == "shared.dyn") && op->args.size() == 1) {
    PrintIndent();
    stream << "threadgroup_barrier(mem_flags::mem_threadgroup);\n";
  } else {
    TVM_FFI_THROW(ValueError) << "sync: Metal synchronises a simdgroup or a whole threadgroup; got `" << scope
                              << "` with " << op->args.size() - 1
                              << " more arguments; use T.sync_threads() without a barrier id";
  }
}

// ---- statements ----------------------------------------------------------------------------------------------

void CodeGenMetal::VisitStmt_(const AllocBufferNode* op) {
  const VarNode* data = op->buffer->data.get();
  std::string scope = GetPtrStorageScope(op->buffer->data);
  std::string name = AllocVarID(data);
  DataType t = op->buffer->dtype;
  alloc_storage_scope_[data] = scope;
  RegisterHandleType(data, t);

  if (scope == "local.var") {
    PrimExpr init = make_const(t, 0);
    auto given = op->annotations.find(tl::attr::kLocalVarInit);
    if (given != op->annotations.end()) init = Downcast<PrimExpr>((*given).second);
    if (init.dtype() != t) init = tirx::Cast(t, init);
    std::string value = Print(init);
    PrintIndent();
    stream << Type(t) << ' ' << name << " = " << value << ";\n";
    return;
  }

  int64_t elements = 1;
  for (const PrimExpr& dim : op->buffer->shape) {
    const auto* extent = dim.as<IntImmNode>();
    if (!extent || extent->value <= 0) {
      TVM_FFI_THROW(ValueError) << name << ": a buffer in " << AddressSpace(scope)
                                << " memory has constant positive extents on Metal; got " << dim
                                << "; make the extent a Python integer";
    }
    elements *= extent->value;
  }
  const int64_t bytes = (elements * t.lanes() * t.bits() + 7) / 8;
  if (t.is_float4_e2m1fn()) elements = t.lanes() == 1 ? (elements + 1) / 2 : elements;
  if (AddressSpace(scope) == "threadgroup") {
    threadgroup_bytes_ += (bytes + 15) / 16 * 16;
    top_ << "  alignas(16) threadgroup " << Type(t) << ' ' << name << '[' << elements << "];\n";
    return;
  }
  TVM_FFI_ICHECK(AddressSpace(scope) == "thread") << "Metal: cannot allocate " << name << " in " << scope;
  PrintIndent();
  if (usage_.vector_accessed.count(data)) stream << "alignas(16) ";
  stream << Type(t) << ' ' << name << '[' << elements << "];\n";
}

void CodeGenMetal::VisitStmt_(const BindNode* op) {
  if (!op->var.dtype().is_handle()) {
    std::string value = Print(op->value);
    PrintIndent();
    stream << "const " << Type(op->var.dtype()) << ' ' << AllocVarID(op->var.get()) << " = " << value << ";\n";
    return;
  }
  const auto* pointer = op->var->type_annotation.as<PointerTypeNode>();
  const auto* element = pointer ? pointer->element_type.as<PrimTypeNode>() : nullptr;
  TVM_FFI_ICHECK(element) << "Metal: pointer " << op->var << " must have a known element type";
  std::string scope = pointer->storage_scope;
  std::string space = scope.empty() ? SpaceOf(op->value) : AddressSpace(scope);
  alloc_storage_scope_[op->var.get()] = space == "device" ? "global" : space == "thread" ? "local" : "shared";
  RegisterHandleType(op->var.get(), element->dtype);
  std::string value = Print(op->value);
  std::string type = space + " " + Type(element->dtype) + "*";
  PrintIndent();
  stream << type << ' ' << AllocVarID(op->var.get()) << " = (" << type << ')' << value << ";\n";
}

void CodeGenMetal::VisitStmt_(const AttrStmtNode* op) {
  if (op->attr_key != "threadblock_swizzle_pattern") {
    CodeGenC::VisitStmt_(op);
    return;
  }
  const auto* call = op->value.as<CallNode>();
  TVM_FFI_ICHECK(call && call->args.size() >= 2) << "Metal: a swizzle is (name, panel size); got " << op->value;
  std::string pattern = Downcast<StringImm>(call->args[0])->value;
  int64_t panel = Downcast<IntImm>(call->args[1])->value;
  std::string name = name_supply_->FreshName("swizzled");
  std::string value;
  if (pattern == "rasterization2DMLX") {
    // MLX's order: `panel` neighbours of a grid row are one grid column; the launch has the shape for it.
    std::string p = std::to_string(panel);
    value = "uint2(blockIdx.x / " + p + ", blockIdx.y * " + p + " + blockIdx.x % " + p + ")";
  } else if (pattern == "rasterization2DRow" || pattern == "rasterization2DColumn") {
    std::string helper = pattern == "rasterization2DRow" ? "swizzle_row" : "swizzle_column";
    prelude_.Use(helper);
    uses_grid_ = true;
    value = helper + "<" + std::to_string(panel) + ">(blockIdx, gridDim)";
  } else {
    TVM_FFI_THROW(ValueError) << "use_swizzle: the order is row or column; got `" << pattern << "`; use order=\"row\"";
  }
  PrintIndent();
  stream << "const uint2 " << name << " = " << value << ";\n";
  std::vector<std::pair<const VarNode*, std::string>> outer;
  for (const char* axis : {"x", "y"}) {
    for (const VarNode* v : index_variables_[std::string("blockIdx.") + axis]) {
      outer.emplace_back(v, var_idmap_[v]);
      var_idmap_[v] = Type(v->dtype) + "(" + name + "." + axis + ")";
    }
  }
  PrintStmt(op->body);
  for (const auto& [v, text] : outer) var_idmap_[v] = text;
}

void CodeGenMetal::VisitStmt_(const ForNode* op) {
  if (op->kind == ForKind::kUnrolled) {
    PrintIndent();
    stream << "#pragma unroll";
    if (auto factor = op->annotations.Get("pragma_unroll_factor")) {
      if (auto n = factor.value().as<IntImm>()) stream << ' ' << n.value()->value;
    }
    stream << '\n';
  }
  CodeGenC::VisitStmt_(op);
}

void CodeGenMetal::VisitStmt_(const BufferStoreNode* op) {
  TVM_FFI_ICHECK(op->indices.size() == 1 && !op->predicate.defined()) << "Metal: flat, unpredicated stores only";
  const PrimExpr& index = op->indices[0];
  DataType t = op->value.dtype();
  std::string value = Print(op->value);
  if (GetPtrStorageScope(op->buffer->data) == "local.var") {
    PrintIndent();
    stream << GetVarID(op->buffer->data.get()) << " = " << value << ";\n";
    return;
  }
  if (op->buffer->dtype.lanes() > 1 && t.lanes() == op->buffer->dtype.lanes()) {
    std::string at = Print(index);
    PrintIndent();
    stream << GetBufferRef(t, op->buffer.get(), index) << " = " << value << ";\n";
    return;
  }
  Pointer p = ElementsOf(op->buffer);
  if (t.lanes() == 1 && t.is_float4_e2m1fn()) {
    if (p.space != "thread") {
      TVM_FFI_THROW(ValueError) << GetVarID(op->buffer->data.get())
                                << ": a float4_e2m1fn element outside registers is half a byte, and single stores of "
                                   "two threads would race; got a scalar store; store vectors of an even width";
    }
    std::string i = Temporary(Print(index), index.dtype());
    PrintIndent();
    stream << p.text << "[" << i << " >> 1] = uchar((" << p.text << "[" << i << " >> 1] & (0xf0 >> ((" << i
           << " & 1) * 4))) | (" << value << " << ((" << i << " & 1) * 4)));\n";
    return;
  }
  if (t.lanes() == 1) {
    std::string at = Print(index);
    PrintIndent();
    stream << p.text << '[' << at << "] = " << value << ";\n";
    return;
  }
  if (const auto* ramp = index.as<RampNode>(); ramp && is_one(ramp->stride)) {
    StoreVector(p, t, ramp->base, value, IsAligned(ramp->base, t.lanes()));
    return;
  }
  std::string at = Temporary(Print(index), index.dtype());
  value = Temporary(value, t);
  for (int i = 0; i < t.lanes(); ++i) {
    PrintIndent();
    stream << p.text << '[' << Element(at, index.dtype(), i) << "] = " << Element(value, t, i) << ";\n";
  }
}

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
      p.text = Add(p.text, Print(analyzer_.Simplify(index)));
      return p;
    }
    if (call->op.same_as(builtin::tvm_access_ptr())) {
      DataType element = call->args[0].dtype().element_of();
      std::string space = SpaceOf(call->args[1]);
      PrimExpr offset = call->args[2];
      if (call->args[0].dtype().lanes() > 1)
        offset = offset * make_const(offset.dtype(), call->args[0].dtype().lanes());
      std::string base = "((" + space + " " + Type(element) + "*)" + Print(call->args[1]) + ")";
      return {Add(base, Print(analyzer_.Simplify(offset))), element, space};
    }
  }
  DataType element = DataType::Void();
  if (const auto* var = e.as<VarNode>()) {
    auto it = handle_data_type_.find(var);
    if (it != handle_data_type_.end()) element = it->second;
  }
  return {Print(e), element, SpaceOf(e)};
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

/*! \brief A conversion of at most four lanes. */
std::string CodeGenMetal::Convert(const std::string& value, DataType from, DataType to) {
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

// ---- calls ---------------------------------------------------------------------------------------------------

/*! \brief A function of Metal or of the prelude, lane by lane; in float where the type is bfloat or the helper needs
 * it. */
std::string CodeGenMetal::Call_(const std::string& function, DataType out, const std::vector<PrimExpr>& args) {
  bool helper = Prelude::Has(function);
  return Chunked(out, args, [&](const Texts& x, DataType part) {
    if (helper) prelude_.Use(function, part.lanes());
    DataType wide = DataType::Float(32, part.lanes());
    std::string text = function + "(";
    bool in_float = false;
    for (size_t i = 0; i < x.size(); ++i) {
      DataType t = args[i].dtype().with_lanes(part.lanes());
      bool convert = t.is_bfloat16() || (helper && t.is_float16());
      in_float = in_float || convert;
      text += (i ? ", " : "") + (convert ? Convert(x[i], t, wide) : x[i]);
    }
    text += ")";
    return in_float && !part.is_bool() ? Convert(text, wide, part) : text;
  });
}

/*! \brief simd_shuffle and its kin, also for the types that they lack. */
std::string CodeGenMetal::ShuffleLanes(const std::string& function, const PrimExpr& value, const PrimExpr& lane) {
  uses_simdgroup_operations_ = true;
  DataType t = value.dtype();
  std::string x = Print(value);
  std::string to = ", ushort(" + Print(lane) + "))";
  DataType carrier = t;
  if (t.is_bfloat16()) carrier = DataType::UInt(16, t.lanes());
  if (t.bits() == 64) carrier = DataType::UInt(32, 2 * t.lanes());
  if (t.lanes() > 4 || carrier.lanes() > 4) {
    TVM_FFI_THROW(TypeError) << function << ": lanes exchange at most 16 bytes; got " << t << "; exchange it in parts";
  }
  if (t.is_bool())
    return Type(t) + "(" + function + "(" + Type(DataType::UInt(16, t.lanes())) + "(" + x + ")" + to + ")";
  if (carrier == t) return function + "(" + x + to;
  return "as_type<" + Type(t) + ">(" + function + "(as_type<" + Type(carrier) + ">(" + x + ")" + to + ")";
}

std::string CodeGenMetal::SimdReduce(const std::string& function, const std::string& op, const PrimExpr& value) {
  uses_simdgroup_operations_ = true;
  DataType t = value.dtype();
  std::string x = Print(value);
  if (t.is_bfloat16()) return "bfloat(" + function + "(float(" + x + ")))";
  if (t.bits() == 64 || t.is_bool()) {
    prelude_.Use(op);
    prelude_.Use("all_reduce");
    return "all_reduce<" + op + ", 32, 1>(" + x + ")";
  }
  return function + "(" + x + ")";
}

/*! \brief Atomics: 32-bit integers, and float32 by Metal's own add or a loop of compare-and-exchange. */
std::string CodeGenMetal::Atomic(const std::string& op, const CallNode* call) {
  Pointer p = PointerTo(call->args[0]);
  DataType t = op == "load" ? call->dtype : call->args[1].dtype();
  if (!t.is_handle() && p.element != t && !p.element.is_void() && op != "load") t = p.element;
  bool is_float = t == DataType::Float(32);
  bool is_integer = (t.is_int() || t.is_uint()) && t.bits() == 32 && t.is_scalar();
  if (!is_float && !is_integer) {
    TVM_FFI_THROW(TypeError) << "atomic_" << op << ": Metal has atomics on int32, uint32 and float32; got " << t
                             << "; accumulate in float32";
  }
  if (p.space == "thread") {
    TVM_FFI_THROW(ValueError) << "atomic_" << op << ": Metal has atomics in global and shared memory; got a buffer in "
                              << "registers; use a plain assignment";
  }
  const size_t order_at = op == "load" ? 1 : 2;
  if (call->args.size() > order_at) {
    const auto* order = call->args[order_at].as<IntImmNode>();
    if (order && order->value != 0) {
      TVM_FFI_THROW(ValueError) << "atomic_" << op << ": Metal has relaxed atomics only; got memory order "
                                << order->value << "; pass memory_order=\"relaxed\"";
    }
  }
  auto pointer = [&](const std::string& type) { return "(" + p.space + " " + type + "*)(" + p.text + ")"; };
  std::string type = is_float ? "atomic_float" : t.is_int() ? "atomic_int" : "atomic_uint";
  if (op == "load") {
    if (is_float) return "as_type<float>(atomic_load_explicit(" + pointer("atomic_uint") + ", memory_order_relaxed))";
    return "atomic_load_explicit(" + pointer(type) + ", memory_order_relaxed)";
  }
  std::string value = Print(call->args[1]);
  if (op == "store") {
    if (is_float) {
      return "atomic_store_explicit(" + pointer("atomic_uint") + ", as_type<uint>(" + value +
             "), memory_order_relaxed)";
    }
    return "atomic_store_explicit(" + pointer(type) + ", " + value + ", memory_order_relaxed)";
  }
  if (is_float) {
    std::string helper = "atomic_" + op + "_float";
    if (!Prelude::Has(helper)) {
      TVM_FFI_THROW(TypeError) << "atomic_" << op << ": works on integers; got float32; use an int32 buffer";
    }
    prelude_.Use(helper);
    return helper + "(" + p.text + ", " + value + ")";
  }
  return "atomic_fetch_" + op + "_explicit(" + pointer(type) + ", " + value + ", memory_order_relaxed)";
}

/*! \brief Functions by name: math of libm, our helpers (templates, with the thread index where they need it), the
 * user's. */
void CodeGenMetal::PrintExtern(const CallNode* call, std::ostream& os) {
  std::string name = Downcast<StringImm>(call->args[0])->value;
  std::vector<PrimExpr> args(call->args.begin() + 1, call->args.end());
  std::string math = MathFunction(name);
  if (!math.empty() && !args.empty()) {
    os << Call_(math, call->dtype, args);
    return;
  }
  std::string base = name.substr(0, name.find('<'));
  if (!Prelude::Has(base)) {
    if (name.compare(0, 4, "tl::") == 0) {
      TVM_FFI_THROW(ValueError) << name << ": is not available on Metal; got a call of it; write it with T.Parallel";
    }
    os << name << '(';
    for (size_t i = 0; i < args.size(); ++i) os << (i ? ", " : "") << Print(args[i]);
    os << ')';
    return;
  }
  prelude_.Use(base);
  uses_simdgroup_operations_ = true;
  if (base != name) {
    std::string op = name.substr(base.size() + 1, name.find(',') - base.size() - 1);
    if (Prelude::Has(op)) prelude_.Use(op);
  }
  bool wants_thread = base == "all_reduce_shared" || base == "inclusive_scan";
  os << name << '(';
  for (size_t i = 0; i < args.size(); ++i) {
    os << (i ? ", " : "") << (args[i].dtype().is_handle() ? PointerTo(args[i]).text : Print(args[i]));
  }
  os << (wants_thread ? ", threadIdx.x)" : ")");
}

void CodeGenMetal::VisitExpr_(const CallNode* op, std::ostream& os) {
  const auto* node = op->op.as<OpNode>();
  if (!node) {
    CodeGenC::VisitExpr_(op, os);
    return;
  }
  const std::string name = node->name;
  auto arg = [&](size_t i) { return Print(op->args[i]); };
  std::vector<PrimExpr> args(op->args.begin(), op->args.end());

  if (op->op.same_as(builtin::call_extern()) || op->op.same_as(builtin::call_pure_extern())) return PrintExtern(op, os);

  // Two operands, spelled as operators.
  static const std::map<std::string, std::string> kOperators = {
      {"tirx.bitwise_and", "&"},  {"tirx.bitwise_or", "|"}, {"tirx.bitwise_xor", "^"}, {"tirx.shift_left", "<<"},
      {"tirx.shift_right", ">>"}, {"tl.add2", "+"},         {"tl.sub2", "-"},          {"tl.mul2", "*"},
      {"tl.fmul", "*"},           {"tl.ieee_add", "+"},     {"tl.ieee_sub", "-"},      {"tl.ieee_mul", "*"},
      {"tl.ieee_fdiv", "/"},      {"tl.max2", "max"},       {"tl.min2", "min"}};
  if (auto it = kOperators.find(name); it != kOperators.end()) {
    os << BinaryText(it->second, op->dtype, args[0], args[1]);
    return;
  }
  // Functions, lane by lane.
  static const std::map<std::string, std::string> kFunctions = {{"tl.abs2", "fabs"},        {"tl.fma2", "fma"},
                                                                {"tl.max2_nan", "max_nan"}, {"tl.min2_nan", "min_nan"},
                                                                {"tirx.isnan", "is_nan"},   {"tl.__exp", ""}};
  std::string function;
  if (auto it = kFunctions.find(name); it != kFunctions.end()) function = it->second;
  if (function.empty()) function = MathFunction(name);
  if (function.empty() && name.compare(0, 5, "tirx.") == 0) function = MathFunction(name.substr(5));
  if (!function.empty()) {
    while (!args.empty() && args.back().as<StringImmNode>()) args.pop_back();  // a rounding mode: Metal has the default
    os << Call_(function, op->dtype, args);
    return;
  }
  // Exchange within a simdgroup.
  static const std::map<std::string, std::pair<std::string, int>> kShuffles = {
      {"tirx.metal.simd_shuffle", {"simd_shuffle", 0}},
      {"tirx.metal.simd_shuffle_up", {"simd_shuffle_up", 0}},
      {"tirx.metal.simd_shuffle_down", {"simd_shuffle_down", 0}},
      {"tirx.tvm_warp_shuffle", {"simd_shuffle", 1}},
      {"tirx.tvm_warp_shuffle_up", {"simd_shuffle_up", 1}},
      {"tirx.tvm_warp_shuffle_down", {"simd_shuffle_down", 1}},
      {"tirx.tvm_warp_shuffle_xor", {"simd_shuffle_xor", 1}},
      {"tl.shfl_sync", {"simd_shuffle", 1}},
      {"tl.shfl_xor_sync", {"simd_shuffle_xor", 1}},
      {"tl.shfl_up_sync", {"simd_shuffle_up", 1}},
      {"tl.shfl_down_sync", {"simd_shuffle_down", 1}}};
  if (auto it = kShuffles.find(name); it != kShuffles.end()) {
    const auto& [shuffle, first] = it->second;  // first: where the value is, after a mask
    if (args.size() > static_cast<size_t>(first) + 2) {
      const auto* width = args[first + 2].as<IntImmNode>();
      if (shuffle != "simd_shuffle_xor" && (!width || width->value != kSimdWidth)) {
        TVM_FFI_THROW(ValueError) << "shuffle: a Metal simdgroup exchanges over its " << kSimdWidth
                                  << " lanes; got width " << args[first + 2] << "; leave the width out";
      }
    }
    os << ShuffleLanes(shuffle, args[first], args[first + 1]);
    return;
  }
  static const std::map<std::string, std::pair<std::string, std::string>> kReductions = {
      {"tl.warp_reduce_sum", {"simd_sum", "SumOp"}},
      {"tl.warp_reduce_max", {"simd_max", "MaxOp"}},
      {"tl.warp_reduce_min", {"simd_min", "MinOp"}},
      {"tl.warp_reduce_bitand", {"simd_and", "BitAndOp"}},
      {"tl.warp_reduce_bitor", {"simd_or", "BitOrOp"}}};
  if (auto it = kReductions.find(name); it != kReductions.end()) {
    os << SimdReduce(it->second.first, it->second.second, args[0]);
    return;
  }
  static const std::map<std::string, std::string> kAtomics = {
      {"tl.atomic_add_elem_op", "add"},     {"tl.atomic_add_ret_elem_op", "add"}, {"tl.atomic_max_elem_op", "max"},
      {"tl.atomic_max_ret_elem_op", "max"}, {"tl.atomic_min_elem_op", "min"},     {"tl.atomic_min_ret_elem_op", "min"},
      {"tl.atomic_or_elem_op", "or"},       {"tl.atomic_load_elem_op", "load"},   {"tl.atomic_store_elem_op", "store"}};
  if (auto it = kAtomics.find(name); it != kAtomics.end()) {
    os << Atomic(it->second, op);
    return;
  }

  if (name == "tl.atomic_addx2_elem_op" || name == "tl.atomic_addx4_elem_op") {
    Pointer to = PointerTo(args[0]);
    Pointer from = PointerTo(args[1]);
    if (to.element != DataType::Float(32)) {
      TVM_FFI_THROW(TypeError) << "atomic_add: Metal has atomics on int32, uint32 and float32; got vectors of "
                               << to.element << "; accumulate in float32";
    }
    prelude_.Use("atomic_add_float");
    for (int i = 0; i < (name == "tl.atomic_addx2_elem_op" ? 2 : 4); ++i) {
      PrintIndent();
      stream << "atomic_add_float(" << Add(to.text, std::to_string(i)) << ", (" << from.text << ")[" << i << "]);\n";
    }
  } else if (op->op.same_as(metal_simdgroup_mma())) {
    uses_simdgroup_operations_ = true;
    prelude_.Use("simdgroup_mma");
    Pointer c = PointerTo(args[0]), a = PointerTo(args[1]), b = PointerTo(args[2]);
    TVM_FFI_ICHECK(c.element == DataType::Float(32))
        << "metal_simdgroup_mma: accumulates in float32; got " << c.element;
    std::string operands = a.element == b.element ? Type(a.element) : "float";
    os << "simdgroup_mma<" << operands << ">(" << c.text << ", " << a.text << ", " << b.text << ")";
  } else if (op->op.same_as(metal_matmul2d())) {
    uses_simdgroup_operations_ = true;
    prelude_.Use("matmul2d");
    Pointer c = PointerTo(args[0]), a = PointerTo(args[1]), b = PointerTo(args[2]);
    TVM_FFI_ICHECK(c.element == DataType::Float(32)) << "metal_matmul2d: accumulates in float32; got " << c.element;
    os << "matmul2d<" << arg(3) << ", " << arg(4) << ", " << arg(5);
    for (int i : {6, 7}) os << ", " << (is_zero(args[i]) ? "false" : "true");
    os << ">(" << c.text << ", " << a.text << ", " << b.text << ")";
  } else if (op->op.same_as(builtin::address_of()) || op->op.same_as(builtin::tvm_access_ptr())) {
    os << '(' << PointerTo(ffi::GetRef<PrimExpr>(op)).text << ')';
  } else if (op->op.same_as(builtin::handle_add_byte_offset())) {
    Pointer p = PointerTo(args[0]);
    if (!p.element.is_void() && Type(p.element) == "uchar") {
      os << '(' << Add(p.text, arg(1)) << ')';
    } else {
      os << "((" << p.space << " uchar*)" << p.text << " + " << arg(1) << ')';
    }
  } else if (op->op.same_as(builtin::reinterpret())) {
    DataType from = args[0].dtype(), to = op->dtype;
    if (to.is_handle() || Type(from) == Type(to)) {
      os << arg(0);
      return;
    }
    TVM_FFI_ICHECK(!IsWideStruct(from) && !IsWideStruct(to)) << "Metal: reinterpret of " << from << " as " << to;
    // C++ promotes narrow integers: the width of the operand must be spelled.
    os << "as_type<" << Type(to) << ">(" << Type(from) << '(' << arg(0) << "))";
  } else if (op->op.same_as(builtin::bitwise_not())) {
    os << Chunked(op->dtype, args, [&](const Texts& x, DataType part) {
      return part.lanes() == 1 && part.bits() < 32 ? Type(part) + "(~" + x[0] + ")" : "(~" + x[0] + ")";
    });
  } else if (op->op.same_as(builtin::large_uint_imm())) {
    uint64_t low = Downcast<IntImm>(args[0])->value, high = Downcast<IntImm>(args[1])->value;
    os << Type(op->dtype) << '(' << ((high << 32) | (low & 0xffffffffu)) << "ul)";
  } else if (name == "tl.sync_warp") {
    os << "simdgroup_barrier(mem_flags::mem_threadgroup)";
  } else if (name == "tl.any_sync" || name == "tl.all_sync") {
    uses_simdgroup_operations_ = true;
    os << Type(op->dtype) << '(' << (name == "tl.any_sync" ? "simd_any" : "simd_all") << "(bool(" << arg(1) << ")))";
  } else if (name == "tl.ballot" || name == "tl.ballot_sync") {
    uses_simdgroup_operations_ = true;
    os << Type(op->dtype) << "(ulong(simd_ballot(bool(" << Print(args.back()) << "))))";
  } else if (name == "tl.get_lane_idx") {
    os << Type(op->dtype) << '(' << Lane() << ')';
  } else if (name == "tl.get_warp_idx" || name == "tl.get_warp_idx_sync") {
    uses_simdgroup_ = true;
    os << Type(op->dtype) << "(simd_group)";
  } else if (name == "tl.__ldg") {
    os << arg(0);
  } else if (name == "tl.pack_b16") {
    os << "as_type<" << Type(op->dtype) << ">(" << Type(args[0].dtype().with_lanes(2)) << '(' << arg(0) << ", "
       << arg(1) << "))";
  } else if (name == "tl.fast_rcp" || name == "tl.ieee_frcp") {
    os << "(1.0f / " << arg(0) << ')';
  } else if (name == "tl.loop_break") {
    os << "break";
  } else if (name == "tl.infinity") {
    os << Type(op->dtype) << "(INFINITY)";
  } else if (name == "tl.pow_of_int") {
    os << Call_("pow", op->dtype, {args[0], make_const(args[0].dtype(), Downcast<IntImm>(args[1])->value)});
  } else if (op->op.same_as(builtin::assume()) || name == "tl.device_assert" || name == "tl.device_assert_with_msg") {
    // Metal can neither use nor report it.
  } else if (name.compare(0, 3, "tl.") == 0) {
    TVM_FFI_THROW(ValueError) << name
                              << ": is not available on Metal; got a call of it; see the support matrix in README.md";
  } else {
    CodeGenC::VisitExpr_(op, os);
  }
}

}  // namespace

// ---- modules -------------------------------------------------------------------------------------------------

ffi::Module BuildMetal(IRModule mod, Target target) {
  std::map<std::string, PrimFunc> kernels;  // by name: the order of the text must not depend on a hash
  for (const auto& [gvar, base] : mod->functions) {
    auto func = Downcast<PrimFunc>(base);
    auto convention = func->GetAttr<Integer>(tvm::attr::kCallingConv);
    TVM_FFI_ICHECK(convention == CallingConv::kDeviceKernelLaunch) << "Metal: " << gvar << " is not a kernel";
    kernels[func->GetAttr<ffi::String>(tvm::attr::kGlobalSymbol).value()] = func;
  }
  Prelude all;
  std::string bodies;
  ffi::Map<ffi::String, ffi::Bytes> texts;
  for (const auto& [name, func] : kernels) {
    CodeGenMetal generator;
    generator.Init(/*output_ssa=*/false);
    generator.AddKernel(name, func);
    all.Merge(generator.prelude());
    bodies += generator.KernelText();
    texts.Set(name, ffi::Bytes(generator.prelude().Text() + generator.KernelText()));
  }
  ffi::Map<ffi::String, ffi::String> source;
  source.Set("metal", all.Text() + bodies);
  return tvm::target::MetalModuleCreateWithFallback(texts, "metal", tvm::codegen::ExtractFuncInfo(mod), source);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  // Metal text is compiled where it runs: both build the same module.
  refl::GlobalDef()
      .def("tilelang_ext.build_metal", BuildMetal)
      .def("tilelang_ext.build_metal_without_compile", BuildMetal);
}

}  // namespace metal
}  // namespace tilelang_ext
