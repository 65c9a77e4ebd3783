/*!
 * \file tile_operators.cc
 * \brief The tile operators that upstream lacks on Metal: reduce, finalize_reducer, atomics, scans.
 *
 * Layouts and loops are upstream's shared lowering; here are the names of the helpers that combine threads
 * (`all_reduce*` and `inclusive_scan` in prelude.cc). The generator adds the thread index to their arguments.
 */
#include <tvm/tirx/builtin.h>

#include <numeric>
#include <sstream>
#include <string>

#include "backend/common/op/atomic_reduce.h"
#include "backend/common/op/finalize_reducer.h"
#include "backend/common/op/reduce.h"
#include "metal/target_utils.h"
#include "op/atomic_add.h"
#include "op/scan.h"

namespace tilelang_ext {
namespace metal {
namespace {

using namespace tvm;        // NOLINT(build/namespaces)
using namespace tvm::tirx;  // NOLINT(build/namespaces)

constexpr int kSimdWidth = 32;
constexpr int64_t kWorkspaceBytes = 4096;  // threadgroup memory that one reduction may take

bool IsMetal(Target target) { return tl::TargetIsMetal(target); }

/*! \brief Names of the reduction helpers. Up to 32 threads need no memory; more exchange through threadgroup memory. */
struct AllReduceNames {
  static bool AllReduceNeedsWorkspace(int threads, int, Target) { return threads > kSimdWidth; }
  static bool SupportsFp16Bf16NanReduce(Target) { return true; }
  static int GetPreferredVectorizedSize(const tl::ReduceOpNode&, Target) { return 1; }
  static int WarpSize(Target) { return kSimdWidth; }

  static std::string MakeBatchAllReduce(const std::string& op, int threads, int scale, PrimExpr first, PrimExpr,
                                        int batch, int stride, Target) {
    std::ostringstream name;
    if (threads <= kSimdWidth) {
      name << "all_reduce_batch<" << Bare(op) << ", " << threads << ", " << scale << ", " << batch << ">";
    } else {
      name << "all_reduce_shared<" << Bare(op) << ", " << threads << ", " << scale << ", " << first << ", " << batch
           << ", " << stride << ">";
    }
    return name.str();
  }

  static std::string MakeScalarAllReduce(const std::string& op, int threads, int scale, PrimExpr first, PrimExpr,
                                         Target) {
    std::ostringstream name;
    if (threads <= kSimdWidth) {
      name << "all_reduce<" << Bare(op) << ", " << threads << ", " << scale << ">";
    } else {
      name << "all_reduce_shared<" << Bare(op) << ", " << threads << ", " << scale << ", " << first << ">";
    }
    return name.str();
  }

 private:
  static std::string Bare(const std::string& op) { return op.compare(0, 4, "tl::") == 0 ? op.substr(4) : op; }
};

struct Reduce : tl::backend::ReduceLowerer<Reduce>, AllReduceNames {};

int64_t Elements(const ffi::Array<PrimExpr>& shape) {
  int64_t n = 1;
  for (const PrimExpr& dim : shape) {
    const int64_t* extent = as_const_int(dim);
    if (!extent) return 1;
    n *= *extent;
  }
  return n;
}

/*!
 * \brief A reduction that crosses simdgroups exchanges many elements between one pair of barriers, unless the user
 *        said how many (`batch`).
 */
Stmt LowerReduce(const tl::ReduceOpNode& op, const tl::LowerArgs& args, arith::Analyzer* analyzer) {
  bool crosses = false;
  tl::LowerArgs probe = args;
  probe.add_workspace = [&](int, DataType) -> PrimExpr {
    crosses = true;
    return Var("workspace", DataType::Handle());
  };
  Stmt lowered = Reduce::Lower(op, probe, analyzer);
  if (!crosses) return lowered;
  auto layout_of = [&](const Buffer& buffer) { return args.layout_map[buffer].as<tl::Fragment>().value(); };
  auto reduced = tl::backend::reduce::ComputeReducerLayout(layout_of(op.src), op.dim);
  const int64_t elements = std::gcd(Elements(reduced->OutputShape()), Elements(layout_of(op.dst)->OutputShape()));
  const int64_t bytes = Elements({args.thread_bounds->extent}) * op.dst->dtype.bytes();
  int64_t batch = op.batch;
  if (batch == 1) {
    while (batch < elements && elements % (batch * 2) == 0 && batch * 2 * bytes <= kWorkspaceBytes) batch *= 2;
  }
  tl::TileOperator batched = op.Clone();
  const_cast<tl::ReduceOpNode*>(batched.as<tl::ReduceOpNode>())->batch = static_cast<int>(batch);
  return Reduce::Lower(*batched.as<tl::ReduceOpNode>(), args, analyzer);
}
struct FinalizeReducer : tl::backend::FinalizeReducerLowerer<FinalizeReducer>, AllReduceNames {};

/*!
 * \brief One atomic call per element, in the layout that a parallel loop over the elements gets.
 *
 * tilelang 0.1.15 has one more field at the end of LayoutInferArgs than 0.1.14; zeros behind the structure make a
 * library built with either work with both.
 */
template <typename Node>
Stmt LowerAtomic(const Node& op, const tl::LowerArgs& args, arith::Analyzer* analyzer) {
  For loop = tl::backend::atomic_reduce::MakeSIMTLoop(op, analyzer);
  For fused = Downcast<For>(tl::ParallelLoopFuser::Fuse(loop));
  tl::ParallelOp parallel(fused);
  alignas(tl::LayoutInferArgs) unsigned char storage[sizeof(tl::LayoutInferArgs) + 64] = {};
  auto* infer = new (storage)
      tl::LayoutInferArgs{args.target, args.thread_bounds, args.layout_map, analyzer, args.buffer_remap, {}};
  for (auto level : {tl::InferLevel::kCommon, tl::InferLevel::kStrict, tl::InferLevel::kFree}) {
    parallel->InferLayout(*infer, level);
  }
  infer->~LayoutInferArgs();
  return tl::LowerParallelLoop(fused, parallel->GetLoopLayout(), args.thread_index, analyzer, args.layout_map,
                               parallel->GetPredicate(args.thread_index), /*parallel_loop=*/true,
                               parallel->LoopLayoutRequiresPaddingGuard());
}

template <typename Node>
tl::LayoutMap InferAtomic(const Node& op, const tl::LayoutInferArgs& args, tl::InferLevel level) {
  return tl::backend::AtomicReduce::InferLayout(op, args, level);
}

/*! \brief An inclusive scan in threadgroup memory, one simdgroup per line. */
template <typename Node>
Stmt LowerScan(const Node& op, const tl::LowerArgs& args, const char* combine) {
  if (!tl::IsSharedBuffer(op.src) || !tl::IsSharedBuffer(op.dst)) {
    TVM_FFI_THROW(ValueError) << op.src->name << ": a scan on Metal works in shared memory; got scopes "
                              << op.src.scope() << " and " << op.dst.scope() << "; copy it to T.alloc_shared first";
  }
  const auto& region = op.srcRegion_->region;
  if (region.size() > 2) {
    TVM_FFI_THROW(ValueError) << op.src->name << ": a scan on Metal takes 1 or 2 dimensions; got " << region.size()
                              << "; slice the buffer";
  }
  PrimExpr threads = args.thread_bounds->extent;
  PrimExpr one = Integer(1), zero = Integer(0);
  PrimExpr src_stride = op.src->shape.back(), dst_stride = op.dst->shape.back();
  std::ostringstream name;
  name << "inclusive_scan<" << combine << ", " << threads << ", " << (op.reverse ? "true" : "false") << ">";
  ffi::Array<PrimExpr> call{StringImm(name.str()), tl::MakeAccessPtrFromRegion(op.srcRegion_, 1),
                            tl::MakeAccessPtrFromRegion(op.dstRegion_, 2)};
  ffi::Array<PrimExpr> shape;
  if (region.size() == 1) {
    shape = {one, region[0]->extent, zero, one, zero, one};
  } else if (op.dim == 1) {
    shape = {region[0]->extent, region[1]->extent, src_stride, one, dst_stride, one};
  } else {
    shape = {region[1]->extent, region[0]->extent, one, src_stride, one, dst_stride};
  }
  for (const PrimExpr& e : shape) call.push_back(e);
  return Evaluate(Call(op.dst->dtype, builtin::call_extern(), call));
}

Stmt LowerCumSum(const tl::CumSumOpNode& op, const tl::LowerArgs& args, arith::Analyzer*) {
  return LowerScan(op, args, "SumOp");
}

Stmt LowerCumMax(const tl::CumMaxOpNode& op, const tl::LowerArgs& args, arith::Analyzer*) {
  return LowerScan(op, args, "MaxOp");
}

bool Register() {
  tl::RegisterReduceImpl({"tilelang_ext.metal.Reduce", IsMetal, LowerReduce});
  tl::RegisterFinalizeReducerImpl({"tilelang_ext.metal.FinalizeReducer", IsMetal, FinalizeReducer::Lower});
  tl::RegisterAtomicAddImpl(
      {"tilelang_ext.metal.AtomicAdd", IsMetal, InferAtomic<tl::AtomicAddNode>, LowerAtomic<tl::AtomicAddNode>});
  tl::RegisterAtomicReduceImpl({"tilelang_ext.metal.AtomicReduce", IsMetal, InferAtomic<tl::AtomicOpBaseNode>,
                                LowerAtomic<tl::AtomicOpBaseNode>});
  tl::RegisterCumSumImpl({"tilelang_ext.metal.CumSum", IsMetal, LowerCumSum});
  tl::RegisterCumMaxImpl({"tilelang_ext.metal.CumMax", IsMetal, LowerCumMax});
  return true;
}

const bool registered = Register();

}  // namespace
}  // namespace metal
}  // namespace tilelang_ext
