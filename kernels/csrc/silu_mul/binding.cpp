// silu_mul on the CPU; kernels/ops/silu_mul/reference.py is the specification.
#include <algorithm>
#include <cstring>

#include "common/tensors.h"
#include "silu_mul.h"

namespace genarm {
namespace {

const SiluLoops* loops = &silu_baseline;

}  // namespace

void use_silu_loops(const char* instruction_set) {
  loops = &silu_baseline;
#ifdef GENARM_X86
  if (!std::strncmp(instruction_set, "avx512", 6)) loops = &silu_avx512;
  if (!std::strcmp(instruction_set, "avx2")) loops = &silu_avx2;
#else
  (void)instruction_set;
#endif
}

void run_silu(const void* gate, const void* up, int64_t n, bool bfloat16, void* out) {
  (bfloat16 ? loops->bfloat16 : loops->float32)(gate, up, n, out);
}

PyObject* silu_mul_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected 2", count);
  DLTensor gate, up;
  if (!borrow(in[0], &gate) || !borrow(in[1], &up) || !contiguous(gate) || !contiguous(up)) Py_RETURN_NONE;
  const ElementType type = type_of(gate);
  if (!(type == kFloat32 || type == kBfloat16) || !(type == type_of(up)) || gate.ndim != up.ndim ||
      !std::equal(gate.shape, gate.shape + gate.ndim, up.shape)) {
    Py_RETURN_NONE;
  }
  int64_t n = 1;
  for (int i = 0; i < gate.ndim; ++i) n *= gate.shape[i];
  void* data;
  PyObject* out = new_tensor(type, gate.ndim, gate.shape, &data);
  if (out) run_silu(gate.at<void>(), up.at<void>(), n, type == kBfloat16, data);
  return out;
}

}  // namespace genarm
