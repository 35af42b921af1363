// rms_norm and add_rms_norm on the CPU; kernels/ops/{rms_norm,add_rms_norm}/reference.py are the specifications.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace genarm {

struct RmsNorm {
  const void *x, *weight;  // [rows, width], [width], contiguous
  const void* added;       // [rows, width], added to x before it is normalised; or null
  void* total;             // [rows, width], output: x + added; null without `added`
  void* out;               // [rows, width], output: the norm
  int64_t rows, width;
  float eps, offset;
  bool bfloat16;  // dtype of all tensors: bfloat16, or float32 if false
};

void run_norm(const RmsNorm&);  // runs the loops of the instruction set in use

// Gives the memory of a contiguous weight [width] of this dtype. None gives null. False for anything else.
bool norm_weight(PyObject* object, ElementType type, int64_t width, const void** data);

struct NormLoops {
  void (*rms_norm)(const RmsNorm&);
};

extern const NormLoops norm_baseline;
#ifdef GENARM_X86
extern const NormLoops norm_avx2, norm_avx512;
#endif

}  // namespace genarm
