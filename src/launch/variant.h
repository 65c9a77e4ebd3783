/*!
 * \file variant.h
 * \brief A plan for one value of its key: the rules that arguments must keep, the workspace and the steps.
 */
#ifndef TILELANG_EXT_LAUNCH_VARIANT_H_
#define TILELANG_EXT_LAUNCH_VARIANT_H_

#include <tvm/ffi/container/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "step.h"
#include "torch.h"

namespace tilelang_ext {
namespace launch {

constexpr int64_t kWorkspaceAlignment = 256;  // bytes

/*! \brief Return a device as torch writes it. */
std::string DeviceName(const DLDevice& device);

/*! \brief The plan for one value of the key. */
class Variant {
 public:
  Variant(const Recipe& recipe, const tvm::ffi::Array<tvm::ffi::Bytes>& cubins,
          const tvm::ffi::Array<tvm::ffi::Tensor>& constants, const std::vector<ArgumentName>& names,
          const std::string& who);

  /*! \brief Read the facts of the arguments and check them. Returns the arguments' device. */
  DLDevice Check(const Argument* arguments, int64_t* facts) const;
  /*!
   * \brief Write the addresses of all buffers in the order of the recipe, arguments, workspace, constants: those of the
   * workspace as offsets from its beginning. Returns the bytes of workspace.
   */
  int64_t Place(const Argument* arguments, const int64_t* facts, uint64_t* addresses) const;
  /*! \brief Add the beginning of the workspace to the addresses of its slots. */
  void MoveWorkspace(uint64_t by, uint64_t* addresses) const {
    for (size_t i = 0; i < workspace_.size(); ++i) addresses[names_.size() + i] += by;
  }
  const std::vector<std::unique_ptr<Step>>& steps() const { return steps_; }
  int sm() const { return sm_; }
  bool arch_specific() const { return arch_specific_; }

 private:
  struct TensorRule {
    int argument;
    DLDataType dtype;
    std::vector<std::optional<Expression>> shape, strides;  // nothing: any value
    bool any_strides;
    int64_t alignment;
  };
  struct Requirement {
    Expression that, got;
    std::string message[2];  // before and after what was got
  };

  void CheckTensor(const TensorRule& rule, const Argument& argument) const;
  void CheckLayout(const TensorRule& rule, const Argument& argument, const int64_t* facts) const;

  const std::vector<ArgumentName>& names_;
  const std::string& who_;
  FactTable table_;
  std::vector<TensorRule> tensors_;
  std::vector<Requirement> requirements_;
  std::vector<Expression> workspace_;
  std::vector<tvm::ffi::Tensor> constants_;
  std::vector<std::unique_ptr<Step>> steps_;
  int sm_ = 0;
  bool arch_specific_ = false;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_VARIANT_H_
