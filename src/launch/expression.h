/*!
 * \file expression.h
 * \brief Integer expressions over the facts of a call, as a plan's recipe has them.
 *
 * A recipe is an integer, a fact as ["shape", "x", 0], or an operator with its operands, as ["+", ["shape", "x", 0],
 * 63]. Python's tilelang_ext/launch/expression.py writes them; both tables of operators are one.
 */
#ifndef TILELANG_EXT_LAUNCH_EXPRESSION_H_
#define TILELANG_EXT_LAUNCH_EXPRESSION_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/any.h>

#include <cstdint>
#include <string>
#include <vector>

namespace tilelang_ext {
namespace launch {

/*! \brief One argument of a call, as it was read: a tensor, a number, or nothing. */
struct Argument {
  DLTensor tensor;  // of a tensor
  int64_t value;    // of a number: an integer, the bits of a double, the digest of a text
  bool present;
};

/*! \brief Something that an expression may ask about an argument. */
struct Fact {
  enum Kind : uint8_t { kShape, kStride, kRank, kDtype, kDevice, kAddress, kPresent, kValue };
  Kind kind;
  int argument;
  int dimension;

  /*! \brief Its value; -1 for what an argument does not have. */
  int64_t Of(const Argument* arguments) const;
  bool operator==(const Fact& other) const {
    return kind == other.kind && argument == other.argument && dimension == other.dimension;
  }
};

/*! \brief The facts that some expressions need, each once: they are read first, and expressions know them by number. */
class FactTable {
 public:
  explicit FactTable(std::vector<std::string> names) : names_(std::move(names)) {}
  int Index(const Fact& fact);
  /*! \brief Return the number of an argument. Throws ValueError for a name that no argument has. */
  int Find(const std::string& name) const;
  size_t size() const { return facts_.size(); }
  void Read(const Argument* arguments, int64_t* values) const {
    for (size_t i = 0; i < facts_.size(); ++i) values[i] = facts_[i].Of(arguments);
  }

 private:
  std::vector<std::string> names_;
  std::vector<Fact> facts_;
};

/*! \brief A compiled expression: a constant, a fact, or a program for a stack. */
class Expression {
 public:
  Expression() = default;
  Expression(const tvm::ffi::Any& recipe, FactTable* table);

  int64_t operator()(const int64_t* facts) const {
    if (program_.empty()) return fact_ < 0 ? constant_ : facts[fact_];
    return Run(facts);
  }

 private:
  enum Operator : uint8_t {
    kAdd,
    kSubtract,
    kMultiply,
    kDivide,
    kRemainder,
    kMinimum,
    kMaximum,
    kEqual,
    kNotEqual,
    kLess,
    kLessEqual,
    kAnd,
    kOr,
    kNot,
    kSelect,
    kPowerOfTwo,
    kConstant,
    kLoad
  };
  struct Instruction {
    Operator op;
    int64_t value;
  };
  static constexpr size_t kMaxDepth = 32;

  void Compile(const tvm::ffi::Any& recipe, FactTable* table, size_t depth);
  int64_t Run(const int64_t* facts) const;

  int64_t constant_ = 0;
  int fact_ = -1;
  std::vector<Instruction> program_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_EXPRESSION_H_
