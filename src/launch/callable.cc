/*!
 * \file callable.cc
 * \brief The type, by CPython's stable ABI.
 */
#include "callable.h"

#include <tvm/ffi/error.h>

#include <cstring>
#include <exception>

#include "error.h"
#include "recipe.h"

namespace tilelang_ext {
namespace launch {
namespace {

constexpr int kTpCall = 50, kTpDealloc = 52, kTpMethods = 64, kTpNew = 65, kTpFree = 74;  // typeslots.h
constexpr unsigned kBaseType = 1u << 10;                                                  // Py_TPFLAGS_BASETYPE
constexpr int kFastCall = 0x80;                                                           // METH_FASTCALL

/*! \brief The one field of an object. */
std::shared_ptr<Callable>** FieldOf(void* self) {
  return reinterpret_cast<std::shared_ptr<Callable>**>(static_cast<char*>(self) + cpython.object_size);
}

Callable& CallableOf(void* self) {
  std::shared_ptr<Callable>* field = *FieldOf(self);
  if (field == nullptr)
    Raise("TypeError") << "plan: must be made by a launcher; got an empty object; use launcher().plan";
  return **field;
}

/*! \brief Return function(), an object; nullptr and Python's error of the same kind where it throws. */
template <typename Function>
void* Guarded(Function function) {
  void* kind = cpython.RuntimeError;
  std::string message;
  try {
    return function();
  } catch (const tvm::ffi::Error& error) {
    message = error.message();
    const std::string name = error.kind();
    for (auto [known, type] : {std::pair<const char*, void*>{"TypeError", cpython.TypeError},
                               {"ValueError", cpython.ValueError},
                               {"LookupError", cpython.LookupError}}) {
      if (name == known) kind = type;
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  cpython.PyErr_SetString(kind, message.c_str());
  return nullptr;
}

void* NewReference(void* object) {
  cpython.Py_IncRef(object);
  return object;
}

void* Call(void* self, void* tuple, void* keywords) {
  return Guarded([&] {
    Callable& callable = CallableOf(self);
    if (keywords != nullptr && cpython.PyDict_Size(keywords) != 0) {
      Raise("TypeError") << "plan: must be called with positional arguments; got keywords; pass them in order";
    }
    void* arguments[kMaxArguments + 1];
    const auto count = static_cast<size_t>(cpython.PyTuple_Size(tuple));
    for (size_t i = 0; i < std::min(count, kMaxArguments + 1); ++i) arguments[i] = cpython.PyTuple_GetItem(tuple, i);
    callable.Call(arguments, count);
    return NewReference(cpython.None);
  });
}

void* Launch(void* self, void* const* arguments, intptr_t count) {
  return Guarded(
      [&] { return NewReference(CallableOf(self).Launch(arguments, count) ? cpython.True : cpython.False); });
}

void* LaunchDirectly(void* self, void* const* arguments, intptr_t count) {
  return Guarded(
      [&] { return NewReference(CallableOf(self).LaunchDirectly(arguments, count) ? cpython.True : cpython.False); });
}

void Deallocate(void* self) {
  delete *FieldOf(self);
  void* type = cpython.PyObject_Type(self);
  void* slot = cpython.PyType_GetSlot(type, kTpFree);
  void (*release)(void*);
  std::memcpy(&release, &slot, sizeof(release));
  release(self);
  cpython.Py_DecRef(type);
  cpython.Py_DecRef(type);  // that of the object, whose type is on the heap
}

template <typename Function>
void* AddressOf(Function* function) {
  void* address;
  std::memcpy(&address, &function, sizeof(address));
  return address;
}

}  // namespace

void* MakeCallableType() {
  static MethodDefinition methods[] = {
      {"launch", Launch, kFastCall, "Launch as a call does; return False where no variant has the arguments' key."},
      {"launch_directly", LaunchDirectly, kFastCall,
       "Launch without torch's dispatcher where nobody would miss it; return whether it did."},
      {nullptr, nullptr, 0, nullptr},
  };
  TypeSlot slots[] = {{kTpCall, AddressOf(Call)},
                      {kTpDealloc, AddressOf(Deallocate)},
                      {kTpMethods, methods},
                      {kTpNew, AddressOf(cpython.PyType_GenericNew)},
                      {0, nullptr}};
  TypeSpec spec = {"tilelang_ext.launch.plan.Callable", static_cast<int>(cpython.object_size + sizeof(void*)), 0,
                   kBaseType, slots};
  return cpython.PyType_FromSpec(&spec);
}

void Attach(void* object, std::shared_ptr<Callable> callable) {
  *FieldOf(object) = new std::shared_ptr<Callable>(std::move(callable));
}

}  // namespace launch
}  // namespace tilelang_ext
