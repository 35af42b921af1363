// y = x Wᵀ + bias, and LoRA on ranges of rows, for weights that stream from memory; see kernels/ops/small_linear/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace genarm {

struct QuantLoops;

struct Lora {
  const uint16_t* a;  // [rank, in]
  const uint16_t* b;  // [rank, out]
  int64_t rank;
  float scale;
};

struct Linear {
  const LinearLoops* loops;  // null: this instruction set has none
  const QuantLoops* quant;
  const uint16_t* weight;  // [out, in] where bits is 16
  const uint8_t* packed;   // else
  int bits;                // of a weight: 16, 8 or 4
  int64_t in, out;
  const uint16_t* bias;  // [out] or null
  std::vector<Lora> loras;
};

struct Span {  // rows first .. last - 1 get this LoRA
  int64_t first, last, lora;
};

struct Product {
  const Linear* linear;
  std::vector<Span> spans;
  uint16_t* y;  // [rows, out]
};

// x [rows, in] with a row stride, times each of some linears of one width and 16 bits; all bfloat16. Up to so many threads, where
// the work is worth it. Throws std::bad_alloc.
void small_linear(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows,
                  int threads);

}  // namespace genarm
