/*!
 * \file python.h
 * \brief The interpreter and torch, as addresses of functions that Python hands over: this library links to neither.
 */
#ifndef TILELANG_EXT_LAUNCH_PYTHON_H_
#define TILELANG_EXT_LAUNCH_PYTHON_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <string>
#include <vector>

#include "expression.h"

namespace tilelang_ext {
namespace launch {

/*! \brief What an argument of a call is. None is allowed in place of a tensor: it is then not present. */
enum class ArgumentType : uint8_t { kTensor, kInt, kFloat, kText };

/*! \brief Name and type of an argument. */
struct ArgumentName {
  std::string name;
  ArgumentType type;
};

/*! \brief A tensor that is kept. */
struct ManagedTensorDeleter {
  void operator()(DLManagedTensorVersioned* tensor) const {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
};
using ManagedTensor = std::unique_ptr<DLManagedTensorVersioned, ManagedTensorDeleter>;

/*! \brief Functions of CPython and torch's DLPack exchange. */
class Python {
 public:
  /*! \brief `addresses`: of each function below by its name in CPython, of None, and of the exchange table. */
  explicit Python(const tvm::ffi::Map<tvm::ffi::String, int64_t>& addresses);

  /*!
   * \brief Read the arguments of a call from a tuple; the caller holds the interpreter's lock.
   *
   * With `kept`, tensors are also kept there. Throws TypeError, naming `who`, for another count or type.
   */
  void Read(void* tuple, const std::vector<ArgumentName>& names, const std::string& who, Argument* arguments,
            std::vector<ManagedTensor>* kept) const;

  /*! \brief Return torch's current stream of a device in this thread. */
  void* CurrentStream(const DLDevice& device, const std::string& who) const;

  /*! \brief Allocate bytes by torch's allocator, on the current stream of the device. */
  ManagedTensor Allocate(const DLDevice& device, int64_t bytes, const std::string& who) const;

 private:
  friend class ReleaseLock;
  void ReadTensor(void* object, const ArgumentName& name, const std::string& who, Argument* argument,
                  std::vector<ManagedTensor>* kept) const;
  void* (*tuple_item_)(void*, intptr_t);
  intptr_t (*tuple_size_)(void*);
  long long (*as_integer_)(void*);
  double (*as_double_)(void*);
  const char* (*as_text_)(void*, intptr_t*);
  void* (*error_)();
  void (*clear_error_)();
  void* (*save_thread_)();
  void (*restore_thread_)(void*);
  void* none_;
  const DLPackExchangeAPI* exchange_;
};

/*! \brief Lets other threads of Python run while it lives: a launch may wait for the driver. */
class ReleaseLock {
 public:
  explicit ReleaseLock(const Python& python) : python_(python), state_(python.save_thread_()) {}
  ~ReleaseLock() { python_.restore_thread_(state_); }
  ReleaseLock(const ReleaseLock&) = delete;
  ReleaseLock& operator=(const ReleaseLock&) = delete;

 private:
  const Python& python_;
  void* state_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_PYTHON_H_
