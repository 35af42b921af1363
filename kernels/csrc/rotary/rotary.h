// rotary on the CPU; kernels/ops/rotary/reference.py is the specification.
#pragma once

#include <cstdint>

namespace genarm {

struct Rotary {
  const void *x, *cos, *sin;  // [N, H, q, D], [N or 1, q, D] twice; contiguous in the last
  void* out;                  // [N, H, q, D], contiguous
  int64_t x_strides[3], cos_strides[2], sin_strides[2];  // in elements; 0 for one cos or sin of all rows
  int64_t rows, heads, block, width;
  bool bfloat16;  // else float32
};

struct RotaryLoops {
  void (*rotate)(const Rotary&);
};

extern const RotaryLoops rotary_baseline;
#ifdef GENARM_X86
extern const RotaryLoops rotary_avx2, rotary_avx512;
#endif

}  // namespace genarm
