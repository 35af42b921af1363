// rms_norm on the CPU; kernels/ops/rms_norm/reference.py is the specification.
#pragma once

#include <cstdint>

namespace genarm {

struct RmsNorm {
  const void *x, *weight;  // [rows, width], [width], contiguous
  void* out;
  int64_t rows, width;
  float eps, offset;
  bool bfloat16;  // else float32
};

struct NormLoops {
  void (*rms_norm)(const RmsNorm&);
};

extern const NormLoops norm_baseline;
#ifdef GENARM_X86
extern const NormLoops norm_avx2, norm_avx512;
#endif

}  // namespace genarm
