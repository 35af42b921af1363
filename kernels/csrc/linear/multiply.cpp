#include "linears.h"

#include "quant_linear/quant_linear.h"
#include "small_linear/small_linear.h"

namespace genarm {

void multiply(std::vector<Product>* products, const void* x, int64_t x_stride, int64_t rows, int threads) {
  std::vector<Product> whole, packed;
  for (Product& product : *products) (product.linear->bits >= 16 ? whole : packed).push_back(std::move(product));
  products->clear();
  if (!whole.empty()) small_linear(whole, x, x_stride, rows, threads);
  if (!packed.empty()) quant_linear(packed, static_cast<const uint16_t*>(x), x_stride, rows, threads);
}

}  // namespace genarm
