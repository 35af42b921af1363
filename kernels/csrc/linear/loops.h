// What completes the sums of a linear. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

struct OutputLoops {
  // y[o] += Σ_j hidden[j] · b[j, o], o < n
  void (*expand)(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y);
  // out = bfloat16(y + bias), round to nearest even; bias may be null
  void (*store)(const float* y, const uint16_t* bias, int n, uint16_t* out);
};

extern const OutputLoops output_avx2, output_avx512, output_baseline;

}  // namespace genarm
