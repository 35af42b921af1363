// The loops that add LoRA and bias to the sums of a linear and round them. loops.cpp is compiled once per instruction
// set.
#pragma once

#include <cstdint>

namespace genarm {

// W: type of the outputs, uint16_t (bfloat16) or float.
template <typename W>
struct OutputLoops {
  // y[o] += hidden[j] · b[j, o] for o < n and each j in turn. Each product and each sum is rounded.
  void (*expand)(const float* hidden, int64_t rank, const W* b, int64_t b_stride, int n, float* y);
  // out[o] = y[o] + bias[o] for o < n, rounded to nearest even. bias may be null.
  void (*store)(const float* y, const W* bias, int n, W* out);
};

extern const OutputLoops<uint16_t> output_avx2, output_avx512, output_baseline;
extern const OutputLoops<float> float_output_avx2, float_output_avx512;

}  // namespace genarm
