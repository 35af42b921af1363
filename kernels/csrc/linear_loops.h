// The loops of small_linear. linear_loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kOutputs = 16;  // outputs of a block: their sums fill one vector
constexpr int kRows = 8;      // rows that share one load of a weight

// Every sum has one order, whatever the rows, the block and the instruction set: lane l of 16 adds the products of
// elements 2l + 1 and 2l of each 32 inputs, then lanes 8, 4, 2 and 1 apart are added.
struct LinearLoops {
  // y[r, o] = Σ_i x[r, i] · w[o, i], bfloat16 to float [rows, kOutputs]; rows <= kRows, outputs <= kOutputs
  void (*dots)(const uint16_t* x, int64_t x_stride, int rows, const uint16_t* w, int64_t in, int outputs, float* y);
  // y[o] += Σ_j hidden[j] · b[j, o], o < n
  void (*expand)(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y);
  // out = bfloat16(y + bias), round to nearest even; bias may be null
  void (*store)(const float* y, const uint16_t* bias, int n, uint16_t* out);
};

extern const LinearLoops linear_avx2, linear_avx512, linear_avx512_bf16;

}  // namespace genarm
