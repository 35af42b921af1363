// rotary on the CPU, alone and in rotary_append; kernels/ops/rotary/reference.py is the specification.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace genarm {

struct Rotary {
  const void *x, *cos, *sin;  // [N, H, q, D], [N or 1, q, D] twice; contiguous in the last
  void* out;                  // [N, H, q, D], contiguous in the last
  int64_t x_strides[3], out_strides[3], cos_strides[2], sin_strides[2];  // in elements; 0 for one cos or sin of all rows
  int64_t rows, heads, block, width;
  bool bfloat16;  // else float32
};

void run_rotary(const Rotary&);  // by the instruction set in use

// cos or sin [N or 1, q, D] of a tensor of so many rows, tokens and elements of D; false for other shapes, strides, dtypes.
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
