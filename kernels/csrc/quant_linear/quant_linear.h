// Linears over weights of 8 or 4 bits; see kernels/ops/quant_linear/reference.py.
#pragma once

#include "linear/linear.h"

namespace genarm {

// Does what small_linear does, for linears whose weights are packed: [tiles, groups, group_bytes(bits)], whole cache
// lines.
void quant_linear(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows,
                  int threads);

}  // namespace genarm
