// rms_norm on the CPU; kernels/ops/rms_norm/reference.py is the specification.
#include <cstring>

#include "common/tensors.h"
#include "rms_norm.h"

namespace genarm {
namespace {

const NormLoops* loops = &norm_baseline;

// Takes x [..., width] and weight [width], contiguous, of one dtype. False for others; a Python error may then be set.
bool fill(PyObject* const* x_and_weight, PyObject* const* eps_and_offset, DLTensor* x, RmsNorm* call) {
  DLTensor weight;
  if (!borrow(x_and_weight[0], x) || !borrow(x_and_weight[1], &weight) || x->ndim < 1 || weight.ndim != 1 ||
      !contiguous(*x)) {
    return false;
  }
  const ElementType type = type_of(*x);
  *call = {};
  call->bfloat16 = type == kBfloat16, call->width = weight.shape[0], call->rows = 1;
  if (!(call->bfloat16 || type == kFloat32) || !(type == type_of(weight)) || x->shape[x->ndim - 1] != call->width ||
      !contiguous(weight)) {
    return false;
  }
  for (int i = 0; i < x->ndim - 1; ++i) call->rows *= x->shape[i];
  call->x = x->at<void>(), call->weight = weight.at<void>();
  call->eps = static_cast<float>(PyFloat_AsDouble(eps_and_offset[0]));
  call->offset = static_cast<float>(PyFloat_AsDouble(eps_and_offset[1]));
  return !PyErr_Occurred();
}

}  // namespace

void use_norm_loops(const char* instruction_set) {
  loops = &norm_baseline;
#ifdef GENARM_X86
  if (!std::strcmp(instruction_set, "avx512")) loops = &norm_avx512;
  if (!std::strcmp(instruction_set, "avx2")) loops = &norm_avx2;
#else
  (void)instruction_set;
#endif
}

void run_norm(const RmsNorm& call) { loops->rms_norm(call); }

bool norm_weight(PyObject* object, ElementType type, int64_t width, const void** data) {
  *data = nullptr;
  if (object == Py_None) return true;
  DLTensor weight;
  if (!borrow(object, &weight) || !(type_of(weight) == type) || weight.ndim != 1 || weight.shape[0] != width ||
      !contiguous(weight)) {
    return false;
  }
  *data = weight.at<void>();
  return true;
}

PyObject* rms_norm_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (!takes(count, 4)) return nullptr;
  DLTensor x;
  RmsNorm call;
  if (!fill(in, in + 2, &x, &call)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  PyObject* out = new_tensor(type_of(x), x.ndim, x.shape, &call.out);
  if (out) loops->rms_norm(call);
  return out;
}

PyObject* add_rms_norm_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  enum Argument { kHidden, kAdded, kWeight, kEps, kOffset, kLanesB, kLanesIndex, kArguments };
  if (!takes(count, kArguments)) return nullptr;
  DLTensor x, added;
  RmsNorm call;
  PyObject* const x_and_weight[] = {in[kHidden], in[kWeight]};
  if (in[kLanesB] != Py_None || !fill(x_and_weight, in + kEps, &x, &call)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  if (!borrow(in[kAdded], &added) || !(type_of(added) == type_of(x)) || added.ndim != x.ndim || !contiguous(added) ||
      std::memcmp(added.shape, x.shape, x.ndim * sizeof *x.shape) != 0) {
    Py_RETURN_NONE;
  }
  call.added = added.at<void>();
  PyObject* both = PyTuple_New(2);
  void** const data[] = {&call.total, &call.out};
  for (int i = 0; both && i < 2; ++i) {
    PyObject* tensor = new_tensor(type_of(x), x.ndim, x.shape, data[i]);
    if (!tensor) {
      Py_DECREF(both);
      return nullptr;
    }
    PyTuple_SetItem(both, i, tensor);
  }
  if (both) loops->rms_norm(call);
  return both;
}

}  // namespace genarm
