// Entries of the Python module that are defined outside of module.cpp.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "tile_loops.h"

namespace genarm {

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

PyObject* guided_sample_binding(const TileLoops& loops, PyObject* const* arguments, Py_ssize_t count);
PyObject* settle_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_ragged_loops(const char* instruction_set);
PyObject* ragged_attention_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* ragged_append_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_norm_loops(const char* instruction_set);
PyObject* rms_norm_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_silu_loops(const char* instruction_set);
PyObject* silu_mul_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_rotary_loops(const char* instruction_set);
PyObject* rotary_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_linear_loops(const char* instruction_set);
PyObject* linears(PyObject*, PyObject* all);

}  // namespace genarm
