// rms_norm and add_rms_norm on the CPU; kernels/ops/{rms_norm,add_rms_norm}/reference.py are the specifications.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace genarm {

struct RmsNorm {
  const void *x, *weight;  // [rows, width], [width], contiguous
  const void* added;       // [rows, width], added to x first, or null
  void* total;             // [rows, width]: the sums, which are normalised; null without `added`
  void* out;
  int64_t rows, width;
  float eps, offset;
  bool bfloat16;  // else float32
};

void run_norm(const RmsNorm&);  // by the instruction set in use

// The memory of a weight [width] of this dtype, contiguous; null for None, which is no weight. False for anything else.
bool norm_weight(PyObject* object, ElementType type, int64_t width, const void** data);

struct NormLoops {
  void (*rms_norm)(const RmsNorm&);
};

extern const NormLoops norm_baseline;
#ifdef GENARM_X86
extern const NormLoops norm_avx2, norm_avx512;
#endif

}  // namespace genarm
