/*!
 * \file cpython.h
 * \brief CPython's stable ABI, as addresses that Python hands over: this library does not link to the interpreter.
 */
#ifndef TILELANG_EXT_LAUNCH_CPYTHON_H_
#define TILELANG_EXT_LAUNCH_CPYTHON_H_

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <cstdint>

namespace tilelang_ext {
namespace launch {

using Addresses = tvm::ffi::Map<tvm::ffi::String, int64_t>;

/*! \brief PyType_Slot and PyType_Spec. */
struct TypeSlot {
  int slot;
  void* function;
};
struct TypeSpec {
  const char* name;
  int basic_size, item_size;
  unsigned flags;
  TypeSlot* slots;
};

/*! \brief PyMethodDef, of a method that takes its arguments as an array. */
struct MethodDefinition {
  const char* name;
  void* (*function)(void* self, void* const* arguments, intptr_t count);
  int flags;
  const char* doc;
};

/*! \brief The functions of CPython by their names there, and objects. Needs the interpreter's lock but for the
 * threads'. */
struct CPython {
  /*! \brief Take the addresses; the size is that of an object without fields, object.__basicsize__. */
  void Connect(const Addresses& addresses);

  void* (*PyTuple_GetItem)(void*, intptr_t);
  intptr_t (*PyTuple_Size)(void*);
  intptr_t (*PyDict_Size)(void*);
  long long (*PyLong_AsLongLong)(void*);
  double (*PyFloat_AsDouble)(void*);
  const char* (*PyUnicode_AsUTF8AndSize)(void*, intptr_t*);
  void* (*PyErr_Occurred)();
  void (*PyErr_Clear)();
  void (*PyErr_SetString)(void*, const char*);
  void* (*PyEval_SaveThread)();
  void (*PyEval_RestoreThread)(void*);
  void* (*PyType_FromSpec)(TypeSpec*);
  void* (*PyType_GetSlot)(void*, int);
  void* (*PyType_GenericNew)(void*, void*, void*);
  void* (*PyObject_Type)(void*);
  void* (*PyObject_CallNoArgs)(void*);
  void* (*PyObject_GetAttr)(void*, void*);
  int (*PyObject_IsTrue)(void*);
  void (*Py_IncRef)(void*);
  void (*Py_DecRef)(void*);
  void *None, *True, *False, *TypeError, *ValueError, *LookupError, *RuntimeError;
  int64_t object_size;
};

/*! \brief The interpreter of this process; see `connect` of the module. */
extern CPython cpython;

/*! \brief Lets other threads of Python run while it lives: a launch may wait for the driver. */
class ReleaseLock {
 public:
  ReleaseLock() : state_(cpython.PyEval_SaveThread()) {}
  ~ReleaseLock() { cpython.PyEval_RestoreThread(state_); }
  ReleaseLock(const ReleaseLock&) = delete;
  ReleaseLock& operator=(const ReleaseLock&) = delete;

 private:
  void* state_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_CPYTHON_H_
