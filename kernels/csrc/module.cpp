// Python binding over raw pointers: knows nothing of torch, so one abi3 build serves every torch and Python >= 3.10.

#include <cstring>
#include <new>

#include "bindings.h"
#include "guided_sample.h"

namespace {

const genarm::TileLoops* const kLoops[] = {
#ifdef GENARM_X86
    &genarm::loops_avx512, &genarm::loops_avx2,
#endif
    &genarm::loops_baseline};

bool runs_here(const genarm::TileLoops& loops) {
#ifdef GENARM_X86
  __builtin_cpu_init();
  if (!std::strcmp(loops.name, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(loops.name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  (void)loops;
  return true;
}

const genarm::TileLoops* active = nullptr;

void activate(const genarm::TileLoops& loops) {
  active = &loops;
  genarm::use_ragged_loops(loops.name);
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const genarm::TileLoops* loops : kLoops) {
    if (!names || !runs_here(*loops)) continue;
    PyObject* name = PyUnicode_FromString(loops->name);
    if (!name || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use(PyObject*, PyObject* argument) {
  for (const genarm::TileLoops* loops : kLoops) {
    if (PyUnicode_CompareWithASCIIString(argument, loops->name) == 0 && runs_here(*loops)) {
      activate(*loops);
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "instruction set %R: expected one of instruction_sets()", argument);
}

template <typename T>
const T* pointer(PyObject* address) {
  return static_cast<const T*>(PyLong_AsVoidPtr(address));
}

void scalar(PyObject* value, float* out) { *out = static_cast<float>(PyFloat_AsDouble(value)); }
void scalar(PyObject* value, int64_t* out) { *out = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(value)); }

// Entry of a tensor's stride(); 0 beyond its dimensions.
int64_t stride(PyObject* strides, Py_ssize_t dimension, Py_ssize_t dimensions) {
  return dimension < dimensions ? PyLong_AsLongLong(PyTuple_GetItem(strides, dimension)) : 0;
}

// A number, or (address, strides) of [], [R] or [R, q]. Errors are left in PyErr.
template <typename T>
genarm::Parameter<T> parameter(PyObject* value) {
  genarm::Parameter<T> result;
  PyObject *address, *strides;
  if (!PyTuple_Check(value)) {
    scalar(value, &result.scalar);
  } else if (PyArg_ParseTuple(value, "OO!", &address, &PyTuple_Type, &strides)) {
    const Py_ssize_t dimensions = PyTuple_Size(strides);
    result.data = pointer<T>(address);
    result.row_stride = stride(strides, 0, dimensions), result.block_stride = stride(strides, 1, dimensions);
  }
  return result;
}

PyObject* guided_sample(PyObject*, PyObject* arguments) {
  genarm::Request q{};
  long long rows, block, vocab, weights_stride, bias_stride, top_n;
  int threads;
  PyObject *members, *weights, *bias, *temperature, *top_k, *top_p, *min_p, *seeds, *positions, *out[6];
  if (!PyArg_ParseTuple(arguments, "LLLO!OLOLOOOOOOLiOOOOOO", &rows, &block, &vocab, &PyTuple_Type, &members, &weights,
                        &weights_stride, &bias, &bias_stride, &temperature, &top_k, &top_p, &min_p, &seeds, &positions,
                        &top_n, &threads, &out[0], &out[1], &out[2], &out[3], &out[4], &out[5])) {
    return nullptr;
  }
  try {
    for (Py_ssize_t i = 0; i < PyTuple_Size(members); ++i) {
      PyObject *address, *strides;  // of [R, V] or [R, q, V]
      int dtype;
      if (!PyArg_ParseTuple(PyTuple_GetItem(members, i), "OiO!", &address, &dtype, &PyTuple_Type, &strides)) {
        return nullptr;
      }
      const Py_ssize_t row_dimensions = PyTuple_Size(strides) - 1;
      q.members.push_back({pointer<void>(address), static_cast<genarm::Dtype>(dtype),
                           stride(strides, 0, row_dimensions), stride(strides, 1, row_dimensions)});
    }
    q.rows = rows, q.block = block, q.vocab = vocab, q.top_n = top_n;
    q.weights = pointer<float>(weights), q.weights_row_stride = weights_stride;
    q.bias = pointer<float>(bias), q.bias_row_stride = bias_stride;
    q.temperature = parameter<float>(temperature);
    q.top_k = parameter<int64_t>(top_k);
    q.top_p = parameter<float>(top_p);
    q.min_p = parameter<float>(min_p);
    q.seeds = parameter<int64_t>(seeds);
    q.positions = parameter<int64_t>(positions);
    q.tokens = static_cast<int64_t*>(PyLong_AsVoidPtr(out[0]));
    q.status = static_cast<int32_t*>(PyLong_AsVoidPtr(out[1]));
    q.logprobs = static_cast<float*>(PyLong_AsVoidPtr(out[2]));
    q.member_logprobs = static_cast<float*>(PyLong_AsVoidPtr(out[3]));
    q.top_tokens = static_cast<int64_t*>(PyLong_AsVoidPtr(out[4]));
    q.top_logprobs = static_cast<float*>(PyLong_AsVoidPtr(out[5]));
    if (PyErr_Occurred()) return nullptr;

    struct WithoutGil {
      PyThreadState* state = PyEval_SaveThread();
      ~WithoutGil() { PyEval_RestoreThread(state); }
    } without_gil;
    genarm::guided_sample(q, *active, threads);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"guided_sample", guided_sample, METH_VARARGS, "See _native.py, the only caller."},
    {"ragged_attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(genarm::ragged_attention_binding)),
     METH_FASTCALL, "See ragged_attention.py, the only caller."},
    {"ragged_append", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(genarm::ragged_append_binding)),
     METH_FASTCALL, "See ragged_attention.py, the only caller."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of those that run here, fastest first."},
    {"use", use, METH_O, "Choose an instruction set by name."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  for (const genarm::TileLoops* loops : kLoops) {
    if (!active && runs_here(*loops)) activate(*loops);
  }
  return PyModule_Create(&kModule);
}
