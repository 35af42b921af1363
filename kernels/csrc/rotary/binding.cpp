// rotary on the CPU; kernels/ops/rotary/reference.py is the specification.
#include <cstring>

#include "common/tensors.h"
#include "rotary.h"

namespace genarm {
namespace {

const RotaryLoops* loops = &rotary_baseline;

bool fill(PyObject* object, const DLTensor& cos, const DLTensor& sin, DLTensor* x, Rotary* call) {
  if (!borrow(object, x) || x->ndim != 4 || x->shape[3] < 2 || x->shape[3] % 2 || x->strides[3] != 1) return false;
  const ElementType type = type_of(*x);
  call->bfloat16 = type == kBfloat16;
  call->x = x->at<void>();
  for (int i = 0; i < 3; ++i) call->x_strides[i] = x->strides[i];
  call->rows = x->shape[0], call->heads = x->shape[1], call->block = x->shape[2], call->width = x->shape[3];
  call->out_strides[2] = call->width;
  call->out_strides[1] = call->block * call->out_strides[2];
  call->out_strides[0] = call->heads * call->out_strides[1];
  const int64_t shape[] = {call->rows, call->block, call->width};
  return (call->bfloat16 || type == kFloat32) && rotary_angles(cos, type, shape, &call->cos, call->cos_strides) &&
         rotary_angles(sin, type, shape, &call->sin, call->sin_strides);
}

}  // namespace

void use_rotary_loops(const char* instruction_set) {
  loops = &rotary_baseline;
#ifdef GENARM_X86
  if (!std::strncmp(instruction_set, "avx512", 6)) loops = &rotary_avx512;  // every name that begins so
  if (!std::strcmp(instruction_set, "avx2")) loops = &rotary_avx2;
#else
  (void)instruction_set;
#endif
}

void run_rotary(const Rotary& call) { loops->rotate(call); }

bool rotary_angles(const DLTensor& tensor, ElementType type, const int64_t (&shape)[3], const void** data,
                   int64_t (&strides)[2]) {
  if (!(type_of(tensor) == type) || tensor.ndim != 3) return false;
  if (tensor.shape[0] != 1 && tensor.shape[0] != shape[0]) return false;
  *data = tensor.at<void>();
  strides[0] = tensor.shape[0] == 1 ? 0 : tensor.strides[0], strides[1] = tensor.strides[1];
  return tensor.shape[1] == shape[1] && tensor.shape[2] == shape[2] && tensor.strides[2] == 1;
}

PyObject* rotary_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (!takes(count, 4)) return nullptr;
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
