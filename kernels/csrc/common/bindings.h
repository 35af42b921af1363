// Functions of the Python module that are defined outside of module.cpp, and helpers that they share.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace genarm {

struct TileLoops;

// Releases the GIL for its own lifetime.
struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }

  // Runs the handlers of pending signals such as Ctrl-C, and returns whether one raised. Python runs handlers in the
  // main thread only.
  bool interrupted() {
    PyEval_RestoreThread(state);
    const bool raised = PyErr_CheckSignals() != 0;
    state = PyEval_SaveThread();
    return raised;
  }
};

// Whether a call has the expected number of arguments; if not, a TypeError is set.
inline bool takes(Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) PyErr_Format(PyExc_TypeError, "%zd arguments: expected %zd", count, expected);
  return count == expected;
}

// Takes torch.get_num_threads, which the core calls whenever it may share its work among threads. Returns None.
PyObject* use_threads(PyObject*, PyObject* get_num_threads);
// The number of threads that a call may use. Needs the GIL.
int threads();

PyObject* guided_sample_binding(const TileLoops& loops, PyObject* const* arguments, Py_ssize_t count);
PyObject* settle_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_ragged_loops(const char* instruction_set);
PyObject* ragged_attention_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* ragged_append_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_norm_loops(const char* instruction_set);
PyObject* rms_norm_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* add_rms_norm_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_silu_loops(const char* instruction_set);
PyObject* silu_mul_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_rotary_loops(const char* instruction_set);
PyObject* rotary_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* rotary_append_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
void use_linear_loops(const char* instruction_set);
PyObject* linears(PyObject*, PyObject* all);
PyObject* decoder_layers_binding(PyObject*, PyObject* tuples);
PyObject* exact_codes_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* quant_rows_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace genarm
