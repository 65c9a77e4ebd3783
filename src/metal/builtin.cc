#include "builtin.h"

#include <tvm/tirx/builtin.h>
#include <tvm/tirx/op.h>
#include <tvm/tirx/op_attr_types.h>

namespace tilelang_ext {
namespace metal {

using tvm::Integer;
using tvm::Op;
using tvm::PrimExpr;
using tvm::tirx::CallEffectKind;
using tvm::tirx::CallNode;
using tvm::tirx::FLowerIntrinsic;
using tvm::tirx::TCallEffectKind;
using tvm::tirx::TScriptPrinterName;
using tvm::tirx::TVectorizable;

TVM_REGISTER_OP("tilelang_ext.metal_simdgroup_mma")
    .set_num_inputs(3)
    .set_attr<TScriptPrinterName>("TScriptPrinterName", "metal_simdgroup_mma")
    .set_attr<TCallEffectKind>("TCallEffectKind", Integer(CallEffectKind::kOpaque));

TVM_REGISTER_OP("tilelang_ext.metal_matmul2d")
    .set_num_inputs(8)
    .set_attr<TScriptPrinterName>("TScriptPrinterName", "metal_matmul2d")
    .set_attr<TCallEffectKind>("TCallEffectKind", Integer(CallEffectKind::kOpaque));

TVM_REGISTER_OP("tilelang_ext.keep")
    .set_num_inputs(1)
    .set_attr<TScriptPrinterName>("TScriptPrinterName", "keep")
    .set_attr<TVectorizable>("TVectorizable", true)
    .set_attr<TCallEffectKind>("TCallEffectKind", Integer(CallEffectKind::kPure));

const Op& keep() {
  static const Op& op = Op::Get("tilelang_ext.keep");
  return op;
}

const Op& metal_simdgroup_mma() {
  static const Op& op = Op::Get("tilelang_ext.metal_simdgroup_mma");
  return op;
}

const Op& metal_matmul2d() {
  static const Op& op = Op::Get("tilelang_ext.metal_matmul2d");
  return op;
}

// For target metal these stay calls by name, which the generator spells (or helps out with a function of its own),
// where the rules of TVM expand them to a rational function, to two exponentials, or to a name of libm.
static PrimExpr CallByName(const PrimExpr& e) {
  const auto* call = e.as<CallNode>();
  std::string name = tvm::ffi::GetRef<Op>(call->op.as<tvm::OpNode>())->name;
  tvm::ffi::Array<PrimExpr> args{tvm::tirx::StringImm(name.substr(name.find('.') + 1))};
  for (const PrimExpr& arg : call->args) args.push_back(arg);
  return tvm::tirx::Call(call->dtype, tvm::tirx::builtin::call_pure_extern(), args);
}

constexpr int kOverUpstream = 11;  // the priority of a plain registration is 10
#define TILELANG_EXT_CALL_BY_NAME(name) \
  TVM_REGISTER_OP("tirx." name).set_attr<FLowerIntrinsic>("metal.FLowerIntrinsic", CallByName, kOverUpstream)
TILELANG_EXT_CALL_BY_NAME("erf");
TILELANG_EXT_CALL_BY_NAME("tanh");
TILELANG_EXT_CALL_BY_NAME("tan");
TILELANG_EXT_CALL_BY_NAME("asin");
TILELANG_EXT_CALL_BY_NAME("acos");
TILELANG_EXT_CALL_BY_NAME("atan");
TILELANG_EXT_CALL_BY_NAME("atan2");
TILELANG_EXT_CALL_BY_NAME("asinh");
TILELANG_EXT_CALL_BY_NAME("acosh");
TILELANG_EXT_CALL_BY_NAME("atanh");
TILELANG_EXT_CALL_BY_NAME("log1p");
TILELANG_EXT_CALL_BY_NAME("hypot");
TILELANG_EXT_CALL_BY_NAME("copysign");
TILELANG_EXT_CALL_BY_NAME("ldexp");
TILELANG_EXT_CALL_BY_NAME("rsqrt");
#undef TILELANG_EXT_CALL_BY_NAME

}  // namespace metal
}  // namespace tilelang_ext
