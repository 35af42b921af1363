// rms_norm on the CPU; kernels/ops/rms_norm/reference.py is the specification.
#include <cstring>

#include "common/tensors.h"
#include "rms_norm.h"

namespace genarm {
namespace {

const NormLoops* loops = &norm_baseline;

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

PyObject* rms_norm_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected 4", count);
  DLTensor x, weight;
  if (!borrow(in[0], &x) || !borrow(in[1], &weight) || x.ndim < 1 || weight.ndim != 1 || !contiguous(x)) {
    Py_RETURN_NONE;
  }
  RmsNorm call;
  const ElementType type = type_of(x);
  call.bfloat16 = type == kBfloat16, call.width = weight.shape[0], call.rows = 1;
  if (!(call.bfloat16 || type == kFloat32) || !(type == type_of(weight)) || x.shape[x.ndim - 1] != call.width ||
      !contiguous(weight)) {
    Py_RETURN_NONE;
  }
  for (int i = 0; i < x.ndim - 1; ++i) call.rows *= x.shape[i];
  call.x = x.at<void>(), call.weight = weight.at<void>();
  call.eps = static_cast<float>(PyFloat_AsDouble(in[2])), call.offset = static_cast<float>(PyFloat_AsDouble(in[3]));
  if (PyErr_Occurred()) return nullptr;
  PyObject* out = new_tensor(type, x.ndim, x.shape, &call.out);
  if (out) loops->rms_norm(call);
  return out;
}

}  // namespace genarm
