// rotary on the CPU, alone and in rotary_append; kernels/ops/rotary/reference.py is the specification.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace genarm {

struct Rotary {
  const void *x, *cos, *sin;  // x [N, H, q, D], cos and sin [N or 1, q, D]; last dimensions contiguous
  void* out;                  // [N, H, q, D], last dimension contiguous
  // In elements. The first stride of cos and sin is 0 if all rows share one.
  int64_t x_strides[3], out_strides[3], cos_strides[2], sin_strides[2];
  int64_t rows, heads, block, width;
  bool bfloat16;  // dtype of all tensors: bfloat16, or float32 if false
};

void run_rotary(const Rotary&);  // runs the loops of the instruction set in use

// Gives memory and strides of cos or sin [N or 1, q, D], for shape [N, q, D]. False for other shapes, strides or
// dtypes.
bool rotary_angles(const DLTensor& tensor, ElementType type, const int64_t (&shape)[3], const void** data,
                   int64_t (&strides)[2]);

struct RotaryLoops {
  void (*rotate)(const Rotary&);
};

extern const RotaryLoops rotary_baseline;
#ifdef GENARM_X86
extern const RotaryLoops rotary_avx2, rotary_avx512;
#endif

}  // namespace genarm
