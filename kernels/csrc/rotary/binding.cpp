// rotary on the CPU; kernels/ops/rotary/reference.py is the specification.
#include <cstring>

#include "common/tensors.h"
#include "rotary.h"

namespace genarm {
namespace {

const RotaryLoops* loops = &rotary_baseline;

// [N or 1, q, D], contiguous in the last
bool angles(const DLTensor& tensor, const DLTensor& x, const void** data, int64_t (&strides)[2]) {
  if (!(type_of(tensor) == type_of(x)) || tensor.ndim != 3) return false;
  if (tensor.shape[0] != 1 && tensor.shape[0] != x.shape[0]) return false;
  *data = tensor.at<void>();
  strides[0] = tensor.shape[0] == 1 ? 0 : tensor.strides[0], strides[1] = tensor.strides[1];
  return tensor.shape[1] == x.shape[2] && tensor.shape[2] == x.shape[3] && tensor.strides[2] == 1;
}

bool fill(PyObject* object, const DLTensor& cos, const DLTensor& sin, DLTensor* x, Rotary* call) {
  if (!borrow(object, x) || x->ndim != 4 || x->shape[3] < 2 || x->shape[3] % 2 || x->strides[3] != 1) return false;
  const ElementType type = type_of(*x);
  call->bfloat16 = type == kBfloat16;
  call->x = x->at<void>();
  for (int i = 0; i < 3; ++i) call->x_strides[i] = x->strides[i];
  call->rows = x->shape[0], call->heads = x->shape[1], call->block = x->shape[2], call->width = x->shape[3];
  return (call->bfloat16 || type == kFloat32) && angles(cos, *x, &call->cos, call->cos_strides) &&
         angles(sin, *x, &call->sin, call->sin_strides);
}

}  // namespace

void use_rotary_loops(const char* instruction_set) {
  loops = &rotary_baseline;
#ifdef GENARM_X86
  if (!std::strncmp(instruction_set, "avx512", 6)) loops = &rotary_avx512;  // avx512_bf16 too
  if (!std::strcmp(instruction_set, "avx2")) loops = &rotary_avx2;
#else
  (void)instruction_set;
#endif
}

PyObject* rotary_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected 4", count);
  DLTensor x[2], cos, sin;
  Rotary calls[2];
  if (!borrow(in[2], &cos) || !borrow(in[3], &sin) || !fill(in[0], cos, sin, &x[0], &calls[0]) ||
      !fill(in[1], cos, sin, &x[1], &calls[1])) {
    Py_RETURN_NONE;
  }
  PyObject* both = PyTuple_New(2);
  for (int i = 0; both && i < 2; ++i) {
    PyObject* out = new_tensor(type_of(x[i]), 4, x[i].shape, &calls[i].out);
    if (!out) {
      Py_DECREF(both);
      return nullptr;
    }
    PyTuple_SetItem(both, i, out);
    loops->rotate(calls[i]);
  }
  return both;
}

}  // namespace genarm
