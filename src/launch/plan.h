/*!
 * \file plan.h
 * \brief A plan: an operator bound to all that does not change from call to call.
 *
 * A plan has a key, expressions over its arguments, and a size, one more. A variant serves one value of the key and a
 * range of sizes. It has rules that its arguments must keep, workspace, and steps: launches of kernels and fills of
 * memory. A call reads the arguments, finds the variant, checks its rules, computes the parameters of every kernel, and
 * enqueues them on the current stream.
 */
#ifndef TILELANG_EXT_LAUNCH_PLAN_H_
#define TILELANG_EXT_LAUNCH_PLAN_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cubin.h"
#include "driver.h"
#include "expression.h"
#include "python.h"
#include "workspace.h"

namespace tilelang_ext {
namespace launch {

using Recipe = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

constexpr size_t kMaxArguments = 32, kMaxBuffers = 64, kMaxFacts = 128, kMaxKey = 32, kMaxParameters = 64;
constexpr size_t kMaxParameterBytes = 4096;  // of a kernel
constexpr int kMaxTensorMapRank = 5;
constexpr int64_t kWorkspaceAlignment = 256;  // bytes

/*! \brief What all plans of a process share. */
struct Shared {
  Shared(std::string libcuda, const tvm::ffi::Map<tvm::ffi::String, int64_t>& python)
      : driver(std::move(libcuda)), python(python) {}
  Driver driver;
  Python python;
  WorkspacePool workspaces;
};

/*! \brief A cubin, loaded on each device when it is first needed there. */
class Binary {
 public:
  /*! \brief Throws ValueError, naming `who`, unless the cubin proves that it is for `target`, as "sm_90a". */
  Binary(std::string bytes, const std::string& target, const std::string& who);
  const CubinFacts& facts() const { return facts_; }
  /*! \brief Return a kernel on a device whose context is current. */
  Function Load(Driver* driver, int device, const std::string& kernel, const std::string& who);

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
  alignas(64) unsigned char values[kMaxParameterBytes];
  void* parameters[kMaxParameters];
  LaunchConfig config;
  Function function;  // nullptr: nothing to launch
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
    std::atomic<Function> function{nullptr};
    std::atomic<int64_t> shared_bytes{0};  // that the kernel may have
  };

  void ReadParameters(const tvm::ffi::Array<tvm::ffi::Any>& recipes, FactTable* table,
                      const std::vector<std::string>& buffers, const std::string& who);
  Function Load(Driver* driver, int device, int64_t shared_bytes, const std::string& who);

  std::string kernel_;  // empty: a fill
  std::shared_ptr<Binary> binary_;
  Expression grid_[3], shared_bytes_;
  uint32_t block_[3] = {1, 1, 1};
  std::vector<Parameter> parameters_;
  LaunchAttribute attributes_[2];
  uint32_t num_attributes_ = 0, cluster_size_ = 1;
  std::unique_ptr<OnDevice[]> on_device_;
  Pointer filled_;
  Expression fill_bytes_;
  unsigned char fill_byte_ = 0;
};

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

/*! \brief An operator's variants. */
class Plan : public std::enable_shared_from_this<Plan> {
 public:
  Plan(std::shared_ptr<Shared> shared, const Recipe& recipe);

  /*! \brief Add a variant, in place of those of its key and range. */
  void Add(const Recipe& recipe, const tvm::ffi::Array<tvm::ffi::Bytes>& cubins,
           const tvm::ffi::Array<tvm::ffi::Tensor>& constants);
  /*! \brief Launch the variant of the arguments in a tuple of Python's; false if there is none. Needs Python's lock. */
  bool Call(int64_t tuple);
  /*! \brief Return the key of the arguments. Needs Python's lock. */
  tvm::ffi::Array<int64_t> KeyOf(int64_t tuple) const;
  /*! \brief Return a function without arguments that launches with these, which it keeps. Needs Python's lock. */
  tvm::ffi::Function Bind(int64_t tuple);

 private:
  using Key = std::array<int64_t, kMaxKey>;  // as many as key_ has
  struct Served {
    Key key;
    int64_t first, last;  // sizes
    Variant* variant;
  };
  using Table = std::unordered_map<uint64_t, std::vector<Served>>;  // by the hash of the key
  friend class Bound;

  int64_t ReadKey(const Argument* arguments, Key* key) const;  // returns the size
  uint64_t HashOf(const Key& key) const;
  bool IsEqual(const Key& one, const Key& other) const { return std::equal(&one[0], &one[0] + key_.size(), &other[0]); }
  Variant* Find(const Argument* arguments) const;
  void Launch(Variant* variant, const Argument* arguments);
  const Device& DeviceOf(const Variant& variant, const DLDevice& device);

  std::shared_ptr<Shared> shared_;
  std::string name_;
  std::vector<ArgumentName> names_;
  FactTable key_table_;
  std::vector<Expression> key_;
  Expression size_;
  std::mutex mutex_;  // of Add
  // A call reads the table without a lock: Add puts a new one in its place, and keeps the old ones and all variants.
  std::atomic<const Table*> table_;
  std::vector<std::unique_ptr<const Table>> tables_;
  std::vector<std::unique_ptr<Variant>> variants_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_PLAN_H_
