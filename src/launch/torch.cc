/*!
 * \file torch.cc
 * \brief Reading arguments, and asking torch.
 */
#include "torch.h"

#include <algorithm>
#include <cstring>
#include <exception>

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

Torch::Torch(const Addresses& addresses, const tvm::ffi::Array<int64_t>& observers) {
  auto take = [&](const char* name, auto* pointer) {
    const int64_t address = addresses.at(name);
    std::memcpy(pointer, &address, sizeof(void*));
  };
  take("exchange", &exchange_);
  take("Tensor", &tensor_);
  take("Parameter", &parameter_);
  take("requires_grad", &requires_grad_);
  take("is_grad_enabled", &is_grad_enabled_);
  take("to_dlpack", &to_dlpack_);
  take("requires_grad_of", &requires_grad_of_);
  take("dispatch_modes", &dispatch_modes_);
  take("function_modes", &function_modes_);
  take("tracing_state", &tracing_state_);
  take("is_profiled", &is_profiled_);
  offset_ = addresses.at("offset");
  type_offset_ = addresses.at("type_offset");
  for (int64_t address : observers) observers_.push_back(reinterpret_cast<void*>(address));
}

void Torch::Read(void* const* objects, size_t count, const std::vector<ArgumentName>& names, const std::string& who,
                 Argument* arguments, std::vector<ManagedTensor>* kept) const {
  if (count != names.size()) {
    Raise error("TypeError");
    error << who << ": must be called with " << names.size() << " arguments (";
    for (size_t i = 0; i < names.size(); ++i) error << (i ? ", " : "") << names[i].name;
    error << "); got " << count << "; pass each of them, outputs too";
  }
  for (size_t i = 0; i < count; ++i) {
    void* object = objects[i];
    Argument& argument = arguments[i];
    argument.present = true;
    const ArgumentName& name = names[i];
    switch (name.type) {
      case ArgumentType::kTensor:
        argument.present = object != cpython.None;
        if (argument.present) ReadTensor(object, name, who, &argument, kept);
        continue;
      case ArgumentType::kInt: {
        if (!name.members.empty()) {
          argument.value = ReadMember(object, name, who);
          continue;
        }
        argument.value = cpython.PyLong_AsLongLong(object);
        if (argument.value != -1) continue;
        break;
      }
      case ArgumentType::kFloat: {
        const double value = cpython.PyFloat_AsDouble(object);
        std::memcpy(&argument.value, &value, sizeof(value));
        if (value != -1.0) continue;
        break;
      }
      case ArgumentType::kText: {
        intptr_t bytes = 0;
        const char* text = cpython.PyUnicode_AsUTF8AndSize(object, &bytes);
        argument.value = text == nullptr ? 0 : Digest(text, bytes);
        if (text != nullptr) continue;
        break;
      }
    }
    if (cpython.PyErr_Occurred() != nullptr) {
      cpython.PyErr_Clear();
      static const char* const kinds[] = {"tensor", "an integer below 2**63", "a number", "a str"};
      Raise("TypeError") << who << ": " << name.name << " must be " << kinds[static_cast<int>(name.type)]
                         << "; got something else; convert it";
    }
  }
}

int64_t Torch::ReadMember(void* object, const ArgumentName& name, const std::string& who) const {
  for (const auto& [member, value] : name.members) {
    if (member == object) return value;
  }
  Raise("TypeError") << who << ": " << name.name << " must be one of " << name.members.size()
                     << " objects; got another; see the operator's";
}

bool Torch::IsPlain(void* object) const {
  void* type;
  if (type_offset_ != 0) {
    type = *reinterpret_cast<void**>(static_cast<char*>(object) + type_offset_);
  } else {
    type = cpython.PyObject_Type(object);
    cpython.Py_DecRef(type);  // the object keeps it
  }
  return type == tensor_ || type == parameter_;
}

bool Torch::IsTrue(void* function) const {
  void* result = cpython.PyObject_CallNoArgs(function);
  if (result == nullptr) return cpython.PyErr_Clear(), true;
  const bool is_true = cpython.PyObject_IsTrue(result) != 0;
  cpython.Py_DecRef(result);
  return is_true;
}

bool Torch::RequiresGrad(void* object) const {
  if (requires_grad_of_ != nullptr) {
    return requires_grad_of_(*reinterpret_cast<void**>(static_cast<char*>(object) + offset_));
  }
  void* required = cpython.PyObject_GetAttr(object, requires_grad_);
  if (required == nullptr) return cpython.PyErr_Clear(), true;
  cpython.Py_DecRef(required);  // True and False are never freed
  return required != cpython.False;
}

bool Torch::IsObserved(void* const* objects, const std::vector<ArgumentName>& names) const {
  if (dispatch_modes_ != nullptr && dispatch_modes_() != 0) return true;
  if (function_modes_ != nullptr && function_modes_() != 0) return true;
  if (tracing_state_ != nullptr && *tracing_state_() != nullptr) return true;
  if (is_profiled_ != nullptr && is_profiled_()) return true;
  for (void* observer : observers_) {
    if (IsTrue(observer)) return true;
  }
  bool requires_grad = false;
  for (size_t i = 0; i < names.size(); ++i) {
    void* object = objects[i];
    if (names[i].type != ArgumentType::kTensor || object == cpython.None) continue;
    if (!IsPlain(object)) return true;
    requires_grad |= RequiresGrad(object);
  }
  return requires_grad && IsTrue(is_grad_enabled_);
}

void Torch::ReadTensor(void* object, const ArgumentName& name, const std::string& who, Argument* argument,
                       std::vector<ManagedTensor>* kept) const {
  bool failed = false;
  if (kept != nullptr) {
    DLManagedTensorVersioned* tensor = nullptr;
    failed = exchange_->managed_tensor_from_py_object_no_sync(object, &tensor);
    if (!failed) {
      kept->emplace_back(tensor);
      argument->tensor = tensor->dl_tensor;
    }
  } else if (to_dlpack_ != nullptr && IsPlain(object)) {
    // What the exchange does, without its casts, which cost twice as much.
    try {
      to_dlpack_(static_cast<const char*>(object) + offset_, &argument->tensor);
    } catch (const std::exception&) {
      failed = true;
    }
  } else {
    failed = exchange_->dltensor_from_py_object_no_sync(object, &argument->tensor);
  }
  if (failed) {
    cpython.PyErr_Clear();
    Raise("TypeError") << who << ": " << name.name
                       << " must be a torch.Tensor with memory; got something else; pass one";
  }
}

void* Torch::CurrentStream(const DLDevice& device, const std::string& who) const {
  void* stream = nullptr;
  if (exchange_->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    Raise("RuntimeError") << who << ": torch must have a current stream of cuda:" << device.device_id
                          << "; got an error; see torch.cuda.current_stream";
  }
  return stream;
}

ManagedTensor Torch::Allocate(const DLDevice& device, int64_t bytes, const std::string& who) const {
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
