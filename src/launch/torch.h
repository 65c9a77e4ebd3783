/*!
 * \file torch.h
 * \brief Arguments from Python objects; tensors, streams and memory from torch, as addresses that Python hands over.
 */
#ifndef TILELANG_EXT_LAUNCH_TORCH_H_
#define TILELANG_EXT_LAUNCH_TORCH_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpython.h"
#include "expression.h"

namespace tilelang_ext {
namespace launch {

/*! \brief What an argument of a call is. None is allowed in place of a tensor: it is then not present. */
enum class ArgumentType : uint8_t { kTensor, kInt, kFloat, kText };

/*! \brief Name and type of an argument. */
struct ArgumentName {
  std::string name;
  ArgumentType type;
  std::vector<std::pair<void*, int64_t>> members;  // of an integer: the objects that alone may stand for one
};

/*! \brief A tensor that is kept. */
struct ManagedTensorDeleter {
  void operator()(DLManagedTensorVersioned* tensor) const {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
};
using ManagedTensor = std::unique_ptr<DLManagedTensorVersioned, ManagedTensorDeleter>;

/*! \brief torch's DLPack exchange, and what tells whether torch's dispatcher has something to do for a call. */
class Torch {
 public:
  /*!
   * \brief `addresses`: of the exchange table, "exchange"; of the types Tensor and Parameter; of the str
   * "requires_grad" and of is_grad_enabled; and, 0 where unknown, of at::toDLPackNonOwning, "to_dlpack", of
   * TensorImpl::requires_grad, "requires_grad_of", of what tells of modes, traces and profilers, and the offsets at
   * which tensors of those types have their at::Tensor and their type. `observers` are functions of Python that return
   * something true while somebody looks at operators.
   */
  Torch(const Addresses& addresses, const tvm::ffi::Array<int64_t>& observers);

  /*!
   * \brief Read the arguments of a call; the caller holds the interpreter's lock.
   *
   * With `kept`, tensors are also kept there. Throws TypeError, naming `who`, for another count or type.
   */
  void Read(void* const* objects, size_t count, const std::vector<ArgumentName>& names, const std::string& who,
            Argument* arguments, std::vector<ManagedTensor>* kept) const;

  /*! \brief Return whether a mode, a trace or a profiler is on, or a tensor has a gradient or a type of its own. */
  bool IsObserved(void* const* objects, const std::vector<ArgumentName>& names) const;

  /*! \brief Return torch's current stream of a device in this thread. */
  void* CurrentStream(const DLDevice& device, const std::string& who) const;

  /*! \brief Allocate bytes by torch's allocator, on the current stream of the device. */
  ManagedTensor Allocate(const DLDevice& device, int64_t bytes, const std::string& who) const;

 private:
  int64_t ReadMember(void* object, const ArgumentName& name, const std::string& who) const;
  bool IsPlain(void* object) const;
  bool IsTrue(void* function) const;
  bool RequiresGrad(void* object) const;
  void ReadTensor(void* object, const ArgumentName& name, const std::string& who, Argument* argument,
                  std::vector<ManagedTensor>* kept) const;
  const DLPackExchangeAPI* exchange_;
  void *tensor_, *parameter_, *requires_grad_, *is_grad_enabled_;
  void (*to_dlpack_)(const void*, DLTensor*);
  bool (*requires_grad_of_)(const void*);
  int64_t (*dispatch_modes_)();
  int64_t (*function_modes_)();
  void* const* (*tracing_state_)();  // a shared_ptr, whose first word is the pointer
  bool (*is_profiled_)();
  int64_t offset_, type_offset_;
  std::vector<void*> observers_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_TORCH_H_
