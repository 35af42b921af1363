#include "small_linear.h"

#include <algorithm>

#include "pool.h"

namespace genarm {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // of rows that stay in the L2 cache while the weights pass by

// scale · x Aᵀ of the span's rows, [rows, rank].
std::vector<float> hidden_of(const Linear& linear, const Lora& lora, const Span& span, const uint16_t* x,
                             int64_t x_stride) {
  std::vector<float> hidden((span.last - span.first) * lora.rank);
  float y[kRows * kOutputs];
  for (int64_t row = span.first; row < span.last; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, span.last - row));
    for (int64_t j = 0; j < lora.rank; j += kOutputs) {
      const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
      linear.loops->dots(x + row * x_stride, x_stride, rows, lora.a + j * linear.in, linear.in, outputs, y);
      for (int r = 0; r < rows; ++r) {
        float* to = hidden.data() + (row - span.first + r) * lora.rank + j;
        for (int o = 0; o < outputs; ++o) to[o] = lora.scale * y[r * kOutputs + o];
      }
    }
  }
  return hidden;
}

}  // namespace

void small_linear(const Linear& linear, const uint16_t* x, int64_t x_stride, int64_t rows, uint16_t* y,
                  const std::vector<Span>& spans, int threads) {
  const LinearLoops& loops = *linear.loops;
  std::vector<std::vector<float>> hidden;
  for (const Span& span : spans) hidden.push_back(hidden_of(linear, linear.loras[span.lora], span, x, x_stride));

  const auto block = [&](int64_t first_row, int64_t last_row, int64_t output) {
    const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, linear.out - output));
    const uint16_t* bias = linear.bias ? linear.bias + output : nullptr;
    alignas(64) float sums[kRows * kOutputs];
    for (int64_t row = first_row; row < last_row; row += kRows) {
      const int64_t end = std::min(row + kRows, last_row);
      loops.dots(x + row * x_stride, x_stride, static_cast<int>(end - row), linear.weight + output * linear.in,
                 linear.in, outputs, sums);
      for (size_t i = 0; i < spans.size(); ++i) {
        const Span& span = spans[i];
        const Lora& lora = linear.loras[span.lora];
        for (int64_t r = std::max(row, span.first); r < std::min(end, span.last); ++r) {
          loops.expand(hidden[i].data() + (r - span.first) * lora.rank, lora.rank, lora.b + output, linear.out, outputs,
                       sums + (r - row) * kOutputs);
        }
      }
      for (int64_t r = row; r < end; ++r) {
        loops.store(sums + (r - row) * kOutputs, bias, outputs, y + r * linear.out + output);
      }
    }
  };

  const int64_t row_bytes = std::max<int64_t>(1, linear.in * 2);
  const int64_t panel = std::max<int64_t>(1, kPanelBytes / row_bytes / kRows) * kRows;
  const int64_t blocks = (linear.out + kOutputs - 1) / kOutputs;
  parallel(threads, blocks, [&](int64_t first, int64_t last) {
    for (int64_t row = 0; row < rows; row += panel) {
      for (int64_t b = first; b < last; ++b) block(row, std::min(row + panel, rows), b * kOutputs);
    }
  });
}

}  // namespace genarm
