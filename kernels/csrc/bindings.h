// Entries of the Python module that are defined outside of module.cpp.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace genarm {

void use_ragged_loops(const char* instruction_set);
PyObject* ragged_attention_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* ragged_append_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace genarm
