// The loops of small_linear. linear_loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kRows = 8;      // that share one load of a weight
constexpr int kOutputs = 16;  // of a block: their sums fill one vector
constexpr int kStep = 32;     // inputs that the lanes take at a time

// Every sum has one order, whatever the rows, the block and the instruction set: lane l of 16 adds the products of
// elements 2l + 1 and 2l of each 32 inputs, then lanes 8, 4, 2 and 1 apart are added.
struct LinearLoops {
  // n bfloat16 as floats: kStep of them every `step` floats, the odd elements before the even ones, zeros at the end
  void (*spread)(const uint16_t* x, int64_t n, float* out, int64_t step);
  // y[r, o] = Σ_i x[r, i] · w[o, i], to [rows, kOutputs]; rows <= kRows, outputs <= kOutputs; x is spread, row r at
  // x + r * kStep, so that a block of rows is one stream; `next` are the weights to fetch meanwhile
  void (*dots)(const float* x, int64_t step, int rows, const uint16_t* w, int64_t in, int outputs, const uint16_t* next,
               float* y);
  // y[o] += Σ_j hidden[j] · b[j, o], o < n
  void (*expand)(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y);
  // out = bfloat16(y + bias), round to nearest even; bias may be null
  void (*store)(const float* y, const uint16_t* bias, int n, uint16_t* out);
};

extern const LinearLoops linear_avx2, linear_avx512;

}  // namespace genarm
