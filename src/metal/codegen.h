/*!
 * \file codegen.h
 * \brief The class of the Metal code generator; its statements, expressions and calls are spelled in three files.
 */
#ifndef TILELANG_EXT_METAL_CODEGEN_H_
#define TILELANG_EXT_METAL_CODEGEN_H_

#include <tvm/tirx/builtin.h>
#include <tvm/tirx/op.h>
#include <tvm/tirx/stmt_functor.h>

#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "prelude.h"
#include "spelling.h"
#include "target/source/codegen_c.h"

namespace tilelang_ext {
namespace metal {

using namespace tvm;        // NOLINT(build/namespaces)
using namespace tvm::tirx;  // NOLINT(build/namespaces)
using tvm::codegen::CodeGenC;

constexpr int kSimdWidth = 32;

/*! \brief The address space of a storage scope: device, threadgroup or thread. */
std::string AddressSpace(const std::string& scope);

/*! \brief What must be known before the text of a function is printed. */
class Usage : public StmtExprVisitor {
 public:
  std::unordered_set<const VarNode*> vector_accessed;  // buffers that need the alignment of a vector
  std::unordered_set<const VarNode*> loaded, stored;

 private:
  void VisitExpr_(const BufferLoadNode* op) final {
    loaded.insert(op->buffer->data.get());
    if (op->dtype.lanes() > 1) vector_accessed.insert(op->buffer->data.get());
    StmtExprVisitor::VisitExpr_(op);
  }
  void VisitStmt_(const BufferStoreNode* op) final {
    stored.insert(op->buffer->data.get());
    if (op->value.dtype().lanes() > 1) vector_accessed.insert(op->buffer->data.get());
    StmtExprVisitor::VisitStmt_(op);
  }
};

/*! \brief A pointer to elements (never to vectors): its text, what it points to and where. */
struct Pointer {
  std::string text;
  DataType element;
  std::string space;
  std::string array, index;  // of an element of an array: text is their sum
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
  void VisitExpr_(const EQNode* op, std::ostream& os) final { Equality("==", op->dtype, op->a, op->b, os); }
  void VisitExpr_(const NENode* op, std::ostream& os) final { Equality("!=", op->dtype, op->a, op->b, os); }
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
  void Equality(const std::string& op, DataType out, const PrimExpr& a, const PrimExpr& b, std::ostream& os);
  std::string BinaryText(const std::string& op, DataType out, const PrimExpr& a, const PrimExpr& b);
  std::string Convert(const std::string& value, DataType from, DataType to);
  std::string Call_(const std::string& function, DataType out, const std::vector<PrimExpr>& args);
  std::string ShuffleLanes(const std::string& function, const PrimExpr& value, const PrimExpr& lane);
  std::string Atomic(const std::string& op, const CallNode* call);
  std::string GroupVote(const std::string& function, const PrimExpr& predicate);
  std::string SimdReduce(const std::string& function, const std::string& op, const PrimExpr& value);
  void PrintVectorAtomic(const CallNode* call);
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
  std::string Simdgroup() {
    uses_simdgroup_ = true;
    return "simd_group";
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
  int64_t threads_ = 1;
  std::string votes_;                        // the threadgroup array in which simdgroups meet to vote
  bool exchanges_in_device_memory_ = false;  // threads may read there what others wrote
  bool uses_lane_ = false;
  bool uses_simdgroup_ = false;
  bool uses_grid_ = false;
  bool uses_simdgroup_operations_ = false;
};

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_CODEGEN_H_
