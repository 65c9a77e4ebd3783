/*!
 * \file expression.cc
 * \brief Compiling and evaluating expressions.
 */
#include "expression.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <map>

#include "error.h"

namespace tilelang_ext {
namespace launch {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::String;

int64_t Fact::Of(const Argument* arguments) const {
  const Argument& argument = arguments[this->argument];
  if (kind == kPresent) return argument.present;
  if (!argument.present) return -1;
  const DLTensor& tensor = argument.tensor;
  switch (kind) {
    case kShape:
      return dimension < tensor.ndim ? tensor.shape[dimension] : -1;
    case kStride: {
      if (dimension >= tensor.ndim) return -1;
      if (tensor.strides != nullptr) return tensor.strides[dimension];
      int64_t stride = 1;
      for (int i = tensor.ndim - 1; i > dimension; --i) stride *= tensor.shape[i];
      return stride;
    }
    case kRank:
      return tensor.ndim;
    case kDtype:
      return tensor.dtype.code | tensor.dtype.bits << 8 | tensor.dtype.lanes << 16;
    case kDevice:
      return tensor.device.device_id;
    case kAddress:
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
    default:
      return argument.value;
  }
}

int FactTable::Index(const Fact& fact) {
  const auto found = std::find(facts_.begin(), facts_.end(), fact);
  if (found != facts_.end()) return static_cast<int>(found - facts_.begin());
  facts_.push_back(fact);
  return static_cast<int>(facts_.size() - 1);
}

int FactTable::Find(const std::string& name) const {
  const auto found = std::find(names_.begin(), names_.end(), name);
  if (found == names_.end()) {
    Raise("ValueError") << "plan: an expression must name an argument; got " << name << "; see the recipe's arguments";
  }
  return static_cast<int>(found - names_.begin());
}

Expression::Expression(const Any& recipe, FactTable* table) {
  Compile(recipe, table, 1);
  if (program_.size() != 1) return;
  if (program_[0].op == kConstant) {
    constant_ = program_[0].value;
  } else {
    fact_ = static_cast<int>(program_[0].value);
  }
  program_.clear();
}

void Expression::Compile(const Any& recipe, FactTable* table, size_t depth) {
  static const std::map<std::string, Fact::Kind> facts = {
      {"shape", Fact::kShape},   {"stride", Fact::kStride},   {"rank", Fact::kRank},       {"dtype", Fact::kDtype},
      {"device", Fact::kDevice}, {"address", Fact::kAddress}, {"present", Fact::kPresent}, {"value", Fact::kValue},
  };
  static const std::map<std::string, std::pair<Operator, size_t>> operators = {
      {"+", {kAdd, 2}},       {"-", {kSubtract, 2}},  {"*", {kMultiply, 2}},    {"//", {kDivide, 2}},
      {"%", {kRemainder, 2}}, {"min", {kMinimum, 2}}, {"max", {kMaximum, 2}},   {"==", {kEqual, 2}},
      {"!=", {kNotEqual, 2}}, {"<", {kLess, 2}},      {"<=", {kLessEqual, 2}},  {"and", {kAnd, 2}},
      {"or", {kOr, 2}},       {"not", {kNot, 1}},     {"select", {kSelect, 3}}, {"power_of_two", {kPowerOfTwo, 1}},
  };
  if (auto constant = recipe.as<int64_t>()) {
    program_.push_back({kConstant, *constant});
    return;
  }
  const auto parts = recipe.cast<Array<Any>>();
  const std::string name = parts[0].cast<String>();
  const auto fact = facts.find(name);
  if (fact != facts.end()) {
    const int dimension = parts.size() > 2 ? static_cast<int>(parts[2].cast<int64_t>()) : 0;
    program_.push_back({kLoad, table->Index({fact->second, table->Find(parts[1].cast<String>()), dimension})});
    return;
  }
  const auto op = operators.find(name);
  if (op == operators.end() || parts.size() != op->second.second + 1 || depth + parts.size() > kMaxDepth) {
    Raise("ValueError") << "plan: an expression must be an operator with its operands, at most " << kMaxDepth
                        << " deep; got " << name << " of " << parts.size() - 1 << "; see expression.py";
  }
  // Operands that are done lie on the stack while the next is computed.
  for (size_t i = 1; i < parts.size(); ++i) Compile(parts[i], table, depth + i);
  program_.push_back({op->second.first, 0});
}

int64_t Expression::Run(const int64_t* facts) const {
  int64_t stack[kMaxDepth];
  int64_t* top = stack - 1;
  for (const Instruction& instruction : program_) {
    const int64_t right = top >= stack ? *top : 0;
    switch (instruction.op) {
      case kConstant:
        *++top = instruction.value;
        break;
      case kLoad:
        *++top = facts[instruction.value];
        break;
      case kAdd:
        *--top += right;
        break;
      case kSubtract:
        *--top -= right;
        break;
      case kMultiply:
        *--top *= right;
        break;
      case kDivide:
      case kRemainder: {
        // Rounds towards minus infinity, as Python's.
        const int64_t left = *--top;
        if (right == 0) Raise("ValueError") << "plan: a divisor must not be 0; got 0; see the shapes of the arguments";
        const int64_t quotient = left / right - (left % right != 0 && (left < 0) != (right < 0));
        *top = instruction.op == kDivide ? quotient : left - quotient * right;
        break;
      }
      case kMinimum:
        --top, *top = std::min(*top, right);
        break;
      case kMaximum:
        --top, *top = std::max(*top, right);
        break;
      case kEqual:
        --top, *top = *top == right;
        break;
      case kNotEqual:
        --top, *top = *top != right;
        break;
      case kLess:
        --top, *top = *top < right;
        break;
      case kLessEqual:
        --top, *top = *top <= right;
        break;
      case kAnd:
        --top, *top = *top != 0 && right != 0;
        break;
      case kOr:
        --top, *top = *top != 0 || right != 0;
        break;
      case kNot:
        *top = right == 0;
        break;
      case kSelect:
        top -= 2, *top = *top != 0 ? top[1] : right;
        break;
      case kPowerOfTwo: {
        int64_t power = 1;
        while (power < right) power <<= 1;
        *top = power;
        break;
      }
    }
  }
  return *stack;
}

}  // namespace launch
}  // namespace tilelang_ext
