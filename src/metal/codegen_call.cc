/*!
 * \file codegen_call.cc
 * \brief How the Metal code generator spells calls: functions, exchange between lanes, atomics, matrix products.
 */
#include <algorithm>

#include "builtin.h"
#include "codegen.h"
#include "op/builtin.h"

namespace tilelang_ext {
namespace metal {

/*! \brief A call of a function of Metal or of the prelude, lane by lane; computed in float where the type is bfloat, or
 * where it is half and the function is the prelude's. */
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
  if (carrier.lanes() > 4) {
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

/*! \brief A vote of the whole threadgroup, which is a barrier too: simdgroups meet in an array of their counts. */
std::string CodeGenMetal::GroupVote(const std::string& function, const PrimExpr& predicate) {
  uses_simdgroup_operations_ = true;
  prelude_.Use(function);
  const int64_t simdgroups = (threads_ + kSimdWidth - 1) / kSimdWidth;
  if (votes_.empty()) {
    votes_ = name_supply_->FreshName("votes");
    top_ << "  threadgroup uint " << votes_ << '[' << simdgroups << "];\n";
    threadgroup_bytes_ += 4 * simdgroups;
  }
  return function + "<" + std::to_string(simdgroups) + ">(" + "bool(" + Print(predicate) + "), " + votes_ + ", " +
         Lane() + ", " + Simdgroup() + ")";
}

/*! \brief Atomics: 32-bit integers, float32 by Metal's own add or a loop of compare-and-exchange, and such loops that
 * replace one 16-bit float of a word. */
std::string CodeGenMetal::Atomic(const std::string& op, const CallNode* call) {
  Pointer p = PointerTo(call->args[0]);
  DataType t = op == "load" ? call->dtype : call->args[1].dtype();
  if (!t.is_handle() && p.element != t && !p.element.is_void() && op != "load") t = p.element;
  bool is_float = t == DataType::Float(32);
  bool is_integer = (t.is_int() || t.is_uint()) && t.bits() == 32 && t.is_scalar();
  static const std::map<std::string, std::string> kUpdates = {{"add", "SumOp"}, {"max", "MaxOp"}, {"min", "MinOp"}};
  auto update = kUpdates.find(op);
  bool is_half = t.is_scalar() && (t.is_float16() || t.is_bfloat16()) && update != kUpdates.end();
  if (!is_float && !is_integer && !is_half) {
    TVM_FFI_THROW(TypeError) << "atomic_" << op
                             << ": Metal has atomics on int32, uint32 and float32, and tilelang_ext adds, "
                             << "maxima and minima of float16 and bfloat16; got " << t << "; use one of these";
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
  if (is_half) {
    prelude_.Use("atomic_update_half");
    prelude_.Use(update->second);
    return "atomic_update_half<" + update->second + ">(" + p.array + ", " + p.index + ", " +
           Convert(value, call->args[1].dtype(), t) + ")";
  }
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

/*! \brief A vector added element by element, in float32, or 16-bit floats two at once in their 32-bit word. */
void CodeGenMetal::PrintVectorAtomic(const CallNode* call) {
  const int lanes = call->op.as<OpNode>()->name == "tl.atomic_addx2_elem_op" ? 2 : 4;
  Pointer to = PointerTo(call->args[0]);
  const bool in_pairs = to.element.is_float16() || to.element.is_bfloat16();
  if (to.element != DataType::Float(32) && !in_pairs) {
    TVM_FFI_THROW(TypeError) << "atomic_add: several elements at once must be float32, float16 or bfloat16; got "
                             << lanes << " elements of " << to.element
                             << "; add them one by one, or accumulate in float32";
  }
  DataType given = call->args[1].dtype();
  std::string value;
  if (given.is_handle()) {
    Pointer from = PointerTo(call->args[1]);
    std::string at = "(" + from.text + ")";
    Texts elements;
    for (int i = 0; i < lanes; ++i) elements.push_back(at + "[" + std::to_string(i) + "]");
    value = Temporary(FromElements(from.element.with_lanes(lanes), elements), from.element.with_lanes(lanes));
    given = from.element.with_lanes(lanes);
  } else {
    value = Temporary(Print(call->args[1]), given);
  }
  if (in_pairs) {
    prelude_.Use("atomic_add_pair");
    DataType two = given.with_lanes(2);
    for (int i = 0; i < lanes; i += 2) {
      std::string pair =
          lanes == 2 ? value : FromElements(two, {Element(value, given, i), Element(value, given, i + 1)});
      PrintIndent();
      stream << "atomic_add_pair(" << Add(to.text, std::to_string(i)) << ", "
             << Convert(pair, two, DataType::Float(32, 2)) << ");\n";
    }
    return;
  }
  prelude_.Use("atomic_add_float");
  for (int i = 0; i < lanes; ++i) {
    PrintIndent();
    stream << "atomic_add_float(" << Add(to.text, std::to_string(i)) << ", "
           << Convert(Element(value, given, i), given.element_of(), DataType::Float(32)) << ");\n";
  }
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
  if (base.compare(0, 3, "TL_") == 0 || base.compare(0, 12, "debug_print_") == 0) {  // words that the simulator defines
    os << name << '(';
    for (size_t i = 0; i < args.size(); ++i) {
      DataType t = args[i].dtype();
      bool printed = base[0] == 'd' && AsNarrowFloat(t);
      os << (i ? ", " : "") << (printed ? Convert(Print(args[i]), t, DataType::Float(32)) : Print(args[i]));
    }
    os << ')';
    return;
  }
  if (base != "DP4A") uses_simdgroup_operations_ = true;
  if (base != name) {
    std::string op = name.substr(base.size() + 1, name.find(',') - base.size() - 1);
    if (Prelude::Has(op)) prelude_.Use(op);
  }
  Texts texts;
  for (const PrimExpr& e : args) texts.push_back(e.dtype().is_handle() ? PointerTo(e).text : Print(e));
  // The thread comes last; behind it, whether it takes part in the reduction.
  if (base == "all_reduce_shared") texts.insert(texts.begin() + 2, "threadIdx.x");
  if (base == "inclusive_scan") texts.push_back("threadIdx.x");
  os << name << '(';
  for (size_t i = 0; i < texts.size(); ++i) os << (i ? ", " : "") << texts[i];
  os << ')';
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
  static const std::map<std::string, std::string> kFunctions = {{"tl.abs2", "fabs"},
                                                                {"tl.fma2", "fma"},
                                                                {"tl.max2_nan", "max_nan"},
                                                                {"tl.min2_nan", "min_nan"},
                                                                {"tl.__ffs", "find_first_set"},
                                                                {"tl.__fns", "find_nth_set"},
                                                                {"tirx.isnan", "is_nan"}};
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

  static const std::map<std::string, std::string> kGroupVotes = {
      {"tl.syncthreads_count", "group_count"}, {"tl.syncthreads_and", "group_all"}, {"tl.syncthreads_or", "group_any"}};
  if (auto it = kGroupVotes.find(name); it != kGroupVotes.end()) {
    os << GroupVote(it->second, args[0]);
    return;
  }

  if (name == "tl.atomic_addx2_elem_op" || name == "tl.atomic_addx4_elem_op") {
    PrintVectorAtomic(op);
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
  } else if (name == "tl.activemask") {
    uses_simdgroup_operations_ = true;
    os << Type(op->dtype) << "(ulong(simd_ballot(true)))";
  } else if (name == "tl.match_any_sync" || name == "tl.match_all_sync") {
    uses_simdgroup_operations_ = true;
    std::string function = name == "tl.match_any_sync" ? "match_any" : "match_all";
    prelude_.Use(function);
    os << Type(op->dtype) << '(' << function << '(' << arg(0) << ", " << arg(1) << "))";
  } else if (name == "tl.any_of" || name == "tl.all_of") {
    std::string function = name == "tl.any_of" ? "any_of" : "all_of";
    prelude_.Use(function);
    os << function << '(' << PointerTo(args[0]).text << ", int(" << arg(1) << "))";
  } else if (name == "tl.get_lane_idx") {
    os << Type(op->dtype) << '(' << Lane() << ')';
  } else if (name == "tl.get_warp_idx" || name == "tl.get_warp_idx_sync") {
    os << Type(op->dtype) << '(' << Simdgroup() << ')';
  } else if (name == "tl.__ldg" || op->op.same_as(keep())) {
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
  } else if (op->op.same_as(builtin::assume())) {
    // Metal cannot use it.
  } else if (name.compare(0, 3, "tl.") == 0) {
    TVM_FFI_THROW(NotImplementedError) << "T." << name.substr(3)
                                       << ": must be an operator that target metal has; got a call of it; "
                                          "docs/guide/language_support.md lists those that it has";
  } else {
    CodeGenC::VisitExpr_(op, os);
  }
}

}  // namespace metal
}  // namespace tilelang_ext
