/*!
 * \file cpython.cc
 * \brief Taking CPython's addresses.
 */
#include "cpython.h"

#include <cstring>

namespace tilelang_ext {
namespace launch {

CPython cpython;

void CPython::Connect(const Addresses& addresses) {
  auto take = [&](const char* name, auto* function) {
    const int64_t address = addresses.at(name);
    std::memcpy(function, &address, sizeof(void*));
  };
  take("PyTuple_GetItem", &PyTuple_GetItem);
  take("PyTuple_Size", &PyTuple_Size);
  take("PyDict_Size", &PyDict_Size);
  take("PyLong_AsLongLong", &PyLong_AsLongLong);
  take("PyFloat_AsDouble", &PyFloat_AsDouble);
  take("PyUnicode_AsUTF8AndSize", &PyUnicode_AsUTF8AndSize);
  take("PyErr_Occurred", &PyErr_Occurred);
  take("PyErr_Clear", &PyErr_Clear);
  take("PyErr_SetString", &PyErr_SetString);
  take("PyEval_SaveThread", &PyEval_SaveThread);
  take("PyEval_RestoreThread", &PyEval_RestoreThread);
  take("PyType_FromSpec", &PyType_FromSpec);
  take("PyType_GetSlot", &PyType_GetSlot);
  take("PyType_GenericNew", &PyType_GenericNew);
  take("PyObject_Type", &PyObject_Type);
  take("PyObject_CallNoArgs", &PyObject_CallNoArgs);
  take("PyObject_GetAttr", &PyObject_GetAttr);
  take("PyObject_IsTrue", &PyObject_IsTrue);
  take("Py_IncRef", &Py_IncRef);
  take("Py_DecRef", &Py_DecRef);
  take("None", &None);
  take("True", &True);
  take("False", &False);
  take("TypeError", &TypeError);
  take("ValueError", &ValueError);
  take("LookupError", &LookupError);
  take("RuntimeError", &RuntimeError);
  take("object_size", &object_size);
}

}  // namespace launch
}  // namespace tilelang_ext
