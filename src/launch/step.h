/*!
 * \file step.h
 * \brief The steps of a plan: launches of kernels, with their parameters, and fills of memory.
 */
#ifndef TILELANG_EXT_LAUNCH_STEP_H_
#define TILELANG_EXT_LAUNCH_STEP_H_

#include <tvm/ffi/container/array.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cubin.h"
#include "driver.h"
#include "expression.h"
#include "recipe.h"

namespace tilelang_ext {
namespace launch {

constexpr size_t kMaxParameterBytes = 4096;  // of a kernel
constexpr int kMaxTensorMapRank = 5;

/*! \brief A cubin, loaded on each device when it is first needed there. */
class Binary {
 public:
  /*! \brief Throws ValueError, naming `who`, unless the cubin proves that it is for `target`, as "sm_90a". */
  Binary(std::string bytes, const std::string& target, const std::string& who);
  const CubinFacts& facts() const { return facts_; }
  /*! \brief Return a kernel on a device whose context is current. */
  CudaFunction Load(Driver* driver, int device, const std::string& kernel, const std::string& who);

 private:
  const std::string bytes_;
  CubinFacts facts_;
  std::mutex mutex_;
  Module modules_[kMaxDevices] = {};
};

/*! \brief Memory that a kernel may be given: an argument, a workspace slot or a constant; and where in it. */
struct Pointer {
  int buffer;
  Expression offset;  // in bytes
};

/*! \brief A TMA descriptor, encoded once for each address and shape. */
class TensorMapRecipe {
 public:
  TensorMapRecipe(const Recipe& recipe, FactTable* table, const std::vector<std::string>& buffers);
  void Encode(const Driver& driver, const uint64_t* addresses, const int64_t* facts, const std::string& who, void* out);

 private:
  using Key = std::array<uint64_t, 2 * kMaxTensorMapRank>;  // address, extents, strides but the first
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0;
      for (uint64_t word : key) hash = (hash ^ word) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
      return hash;
    }
  };
  static constexpr size_t kMaxCached = 1024;

  Pointer base_;
  int dtype_, rank_, interleave_, swizzle_, promotion_, fill_;
  std::vector<Expression> extents_, strides_;
  uint32_t box_[kMaxTensorMapRank], element_strides_[kMaxTensorMapRank];
  std::mutex mutex_;
  std::unordered_map<Key, TensorMap, Hash> cache_;
};

/*! \brief A launch or a fill with every value computed: what is handed to the driver. */
struct Resolved {
  std::vector<TensorMap> memory;  // of parameters, in whole descriptors, which keeps them aligned
  std::vector<void*> parameters;
  LaunchConfig config;
  CudaFunction function;  // nullptr: nothing to launch
  uint64_t fill_address;
  size_t fill_bytes;
};

/*! \brief One step of a variant. */
class Step {
 public:
  Step(const Recipe& recipe, FactTable* table, const std::vector<std::string>& buffers,
       std::vector<std::shared_ptr<Binary>> binaries, const std::string& who);

  void Resolve(Driver* driver, int device, const uint64_t* addresses, const int64_t* facts, const std::string& who,
               Resolved* out);
  void Enqueue(const Driver& driver, Stream stream, const std::string& who, const Resolved& resolved) const;

 private:
  struct Parameter {
    enum Kind : uint8_t { kPointer, kInteger, kFloat32, kFloat64, kTensorMap };
    Kind kind;
    uint32_t bytes, offset;  // of the parameter; in Resolved::values
    Pointer pointer;
    Expression value;
    std::shared_ptr<TensorMapRecipe> tensor_map;
  };
  struct OnDevice {
    std::atomic<CudaFunction> function{nullptr};
    std::atomic<int64_t> shared_bytes{0};  // that the kernel may have
  };

  void ReadParameters(const tvm::ffi::Array<tvm::ffi::Any>& recipes, FactTable* table,
                      const std::vector<std::string>& buffers, const std::string& who);
  CudaFunction Load(Driver* driver, int device, int64_t shared_bytes, const std::string& who);

  std::string kernel_;  // empty: a fill
  std::shared_ptr<Binary> binary_;
  Expression grid_[3], shared_bytes_;
  uint32_t block_[3] = {1, 1, 1};
  std::vector<Parameter> parameters_;
  LaunchAttribute attributes_[2];
  uint32_t num_attributes_ = 0, cluster_size_ = 1, parameter_bytes_ = 0;
  std::unique_ptr<OnDevice[]> on_device_;
  Pointer filled_;
  Expression fill_bytes_;
  unsigned char fill_byte_ = 0;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_STEP_H_
