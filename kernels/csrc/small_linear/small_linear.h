// Linears of few rows, for weights that stream from memory; see kernels/ops/small_linear/reference.py.
#pragma once

#include "linear/linear.h"

namespace genarm {

// x [rows, in] with a row stride, times each of some linears of one width, all of 32 bits (float32) or all of 16 (bfloat16),
// as x. Up to so many threads, where the work is worth it. Throws std::bad_alloc.
void small_linear(const std::vector<Product>& products, const void* x, int64_t x_stride, int64_t rows, int threads);

}  // namespace genarm
