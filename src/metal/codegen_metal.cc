/*!
 * \file codegen_metal.cc
 * \brief The Metal code generator, on TVM's CodeGenC: kernels, statements, modules. It spells; it decides nothing.
 */
#include "codegen_metal.h"

#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>

#include "builtin.h"
#include "codegen.h"
#include "op/builtin.h"
#include "runtime/thread_storage_scope.h"
#include "target/build_common.h"
#include "target/metal/metal_fallback_module.h"

namespace tilelang_ext {
namespace metal {

namespace {

constexpr int kMaxBuffers = 31;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxThreadgroupBytes = 32768;

}  // namespace

std::string AddressSpace(const std::string& scope) {
  if (scope == "global" || scope.empty()) return "device";
  if (scope == "shared" || scope == "shared.dyn" || scope == "threadgroup") return "threadgroup";
  if (scope.compare(0, 5, "local") == 0) return "thread";
  TVM_FFI_THROW(ValueError) << "scope: a Metal buffer is global, shared or local; got `" << scope
                            << "`; it should have been lowered by the pass list of tilelang_ext";
  TVM_FFI_UNREACHABLE();
}

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

  threads_ = static_threads ? threads : kMaxThreads;

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
    if (usage_.loaded.count(v.get()) && usage_.stored.count(v.get())) exchanges_in_device_memory_ = true;
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
    stream << "threadgroup_barrier(mem_flags::mem_threadgroup"
           << (exchanges_in_device_memory_ ? " | mem_flags::mem_device" : "") << ");\n";
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
