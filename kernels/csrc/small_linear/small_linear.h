// Linears over few rows, at the speed at which the weights arrive from memory. kernels/ops/small_linear/reference.py is
// the specification.
#pragma once

#include "linear/linear.h"

namespace genarm {

// Multiplies x [rows, in] by each linear and writes the products' outputs. The linears have one width, and all have the
// type of x: float32 (32 bits) or bfloat16 (16 bits). x_stride: elements between rows of x. threads: most threads;
// fewer run if the work is too small for them. Throws std::bad_alloc.
void small_linear(const std::vector<Product>& products, const void* x, int64_t x_stride, int64_t rows, int threads);

}  // namespace genarm
