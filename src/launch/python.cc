/*!
 * \file python.cc
 * \brief Arguments from Python objects, streams and memory from torch.
 */
#include "python.h"

#include <cstring>

#include "error.h"

namespace tilelang_ext {
namespace launch {
namespace {

/*! \brief FNV-1a: the same in every process, so that the keys of variants may be stored. */
int64_t Digest(const char* text, size_t bytes) {
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<unsigned char>(text[i])) * 1099511628211u;
  return static_cast<int64_t>(hash);
}

/*! \brief Keeps what an allocator says went wrong. */
void KeepError(void* context, const char* kind, const char* message) {
  static_cast<std::string*>(context)->append(kind).append(": ").append(message);
}

}  // namespace

Python::Python(const tvm::ffi::Map<tvm::ffi::String, int64_t>& addresses) {
  auto take = [&](const char* name, auto* function) {
    const int64_t address = addresses.at(name);
    std::memcpy(function, &address, sizeof(void*));
  };
  take("PyTuple_GetItem", &tuple_item_);
  take("PyTuple_Size", &tuple_size_);
  take("PyLong_AsLongLong", &as_integer_);
  take("PyFloat_AsDouble", &as_double_);
  take("PyUnicode_AsUTF8AndSize", &as_text_);
  take("PyErr_Occurred", &error_);
  take("PyErr_Clear", &clear_error_);
  take("PyEval_SaveThread", &save_thread_);
  take("PyEval_RestoreThread", &restore_thread_);
  take("None", &none_);
  take("exchange", &exchange_);
}

void Python::Read(void* tuple, const std::vector<ArgumentName>& names, const std::string& who, Argument* arguments,
                  std::vector<ManagedTensor>* kept) const {
  const intptr_t count = tuple_size_(tuple);
  if (count != static_cast<intptr_t>(names.size())) {
    Raise error("TypeError");
    error << who << ": must be called with " << names.size() << " arguments (";
    for (size_t i = 0; i < names.size(); ++i) error << (i ? ", " : "") << names[i].name;
    error << "); got " << count << "; pass each of them, outputs too";
  }
  for (intptr_t i = 0; i < count; ++i) {
    void* object = tuple_item_(tuple, i);
    Argument& argument = arguments[i];
    argument.present = true;
    const ArgumentName& name = names[i];
    switch (name.type) {
      case ArgumentType::kTensor:
        argument.present = object != none_;
        if (argument.present) ReadTensor(object, name, who, &argument, kept);
        break;
      case ArgumentType::kInt:
        argument.value = as_integer_(object);
        break;
      case ArgumentType::kFloat: {
        const double value = as_double_(object);
        std::memcpy(&argument.value, &value, sizeof(value));
        break;
      }
      case ArgumentType::kText: {
        intptr_t bytes = 0;
        const char* text = as_text_(object, &bytes);
        argument.value = text == nullptr ? 0 : Digest(text, bytes);
        break;
      }
    }
    if (name.type != ArgumentType::kTensor && error_() != nullptr) {
      clear_error_();
      static const char* const kinds[] = {"tensor", "an integer below 2**63", "a number", "a str"};
      Raise("TypeError") << who << ": " << name.name << " must be " << kinds[static_cast<int>(name.type)]
                         << "; got something else; convert it";
    }
  }
}

void Python::ReadTensor(void* object, const ArgumentName& name, const std::string& who, Argument* argument,
                        std::vector<ManagedTensor>* kept) const {
  int failed;
  if (kept == nullptr) {
    failed = exchange_->dltensor_from_py_object_no_sync(object, &argument->tensor);
  } else {
    DLManagedTensorVersioned* tensor = nullptr;
    failed = exchange_->managed_tensor_from_py_object_no_sync(object, &tensor);
    if (!failed) {
      kept->emplace_back(tensor);
      argument->tensor = tensor->dl_tensor;
    }
  }
  if (failed) {
    clear_error_();
    Raise("TypeError") << who << ": " << name.name
                       << " must be a torch.Tensor with memory; got something else; pass one";
  }
}

void* Python::CurrentStream(const DLDevice& device, const std::string& who) const {
  void* stream = nullptr;
  if (exchange_->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    Raise("RuntimeError") << who << ": torch must have a current stream of cuda:" << device.device_id
                          << "; got an error; see torch.cuda.current_stream";
  }
  return stream;
}

ManagedTensor Python::Allocate(const DLDevice& device, int64_t bytes, const std::string& who) const {
  DLTensor prototype{};
  prototype.device = device;
  prototype.ndim = 1;
  prototype.dtype = {kDLUInt, 8, 1};
  prototype.shape = &bytes;
  DLManagedTensorVersioned* tensor = nullptr;
  std::string reason;
  if (exchange_->managed_tensor_allocator(&prototype, &tensor, &reason, KeepError) != 0) {
    Raise("RuntimeError") << who << ": needs " << bytes << " bytes of workspace on cuda:" << device.device_id
                          << "; got " << reason << "; free memory";
  }
  return ManagedTensor(tensor);
}

}  // namespace launch
}  // namespace tilelang_ext
