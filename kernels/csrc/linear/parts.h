// The parts of a product that do not depend on the format of its weights: blocks of rows, LoRA, bias and rounding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "linear.h"
#include "loops.h"
#include "small_linear/loops.h"

namespace genarm {

constexpr std::align_val_t kLine{64};

struct FreeAligned {
  void operator()(void* memory) const { operator delete[](memory, kLine); }
};

template <typename T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(operator new[](count * sizeof(T), kLine)));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the number of threads, `threads` at most, that get `thread_bytes` or more of work each. The work is the bytes
// of all weights times the number of passes over them. Returns 0 if one thread would get less.
inline int worth_it(const std::vector<Product>& products, int64_t passes, int64_t thread_bytes, int threads) {
  int64_t work = 0;
  for (const Product& product : products) work += product.linear->out * product.linear->in * product.linear->bits / 8;
  return static_cast<int>(std::min<int64_t>(threads, work * passes / thread_bytes));
}

// Rows first .. last - 1, cut into `count` blocks whose numbers of rows differ by at most one.
struct Blocks {
  int64_t first, last, count;
  int64_t start(int64_t block) const { return first + (last - first) * block / count; }
};

// A span of a product, with its LoRA and the LoRA's hidden values.
struct Adapted {
  const Product* product;
  Span span;
  const Lora& lora;
  std::vector<float> hidden;  // [rows of the span, rank]: scale · x Aᵀ
};

inline std::vector<Adapted> adapted_of(const std::vector<Product>& products) {
  std::vector<Adapted> found;
  for (const Product& product : products) {
    for (const Span& span : product.spans) {
      const Lora& lora = product.linear->loras[span.lora];
      found.push_back({&product, span, lora, std::vector<float>((span.last - span.first) * lora.rank)});
    }
  }
  return found;
}

// Computes `adapted->hidden` for rows first .. last - 1, which are the rows of `dots.blocks`. after: the weights that
// the caller reads next, or null.
template <typename W>
void contract(const LinearLoops<W>& loops, Dots<W> dots, int64_t first, int64_t last, const W* after, Adapted* adapted) {
  const Lora& lora = adapted->lora;
  float y[kTile * kPanelRow];
  dots.y = y, dots.cold = true;
  for (int64_t j = 0; j < lora.rank; j += kOutputs) {
    dots.outputs = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
    dots.w = static_cast<const W*>(lora.a) + j * dots.in;
    dots.next = j + kOutputs < lora.rank ? dots.w + kOutputs * dots.in : after ? after : dots.w;
    loops.dots(dots);
    for (int64_t row = first; row < last; ++row) {
      float* hidden = adapted->hidden.data() + (row - adapted->span.first) * lora.rank + j;
      for (int o = 0; o < dots.outputs; ++o) hidden[o] = lora.scale * y[(row - first) * kPanelRow + o];
    }
  }
}

// Adds LoRA and bias to the sums y of rows first .. last - 1 and `count` outputs from `output` on, and writes the
// rounded outputs. stride: floats between rows of y.
template <typename W>
void finish(const Product& product, const std::vector<Adapted>& all, int64_t first, int64_t last, int64_t output, int count,
            float* y, int64_t stride) {
  const Linear& linear = *product.linear;
  const OutputLoops<W>& loops = *linear.loops.of<W>().output;
  for (const Adapted& adapted : all) {
    if (adapted.product != &product) continue;
    const Span& span = adapted.span;
    const Lora& lora = adapted.lora;
    for (int64_t row = std::max(first, span.first); row < std::min(last, span.last); ++row) {
      loops.expand(adapted.hidden.data() + (row - span.first) * lora.rank, lora.rank,
                   static_cast<const W*>(lora.b) + output, linear.out, count, y + (row - first) * stride);
    }
  }
  const W* bias = linear.bias ? static_cast<const W*>(linear.bias) + output : nullptr;
  W* const out = static_cast<W*>(product.y) + output;
  for (int64_t row = first; row < last; ++row) {
    loops.store(y + (row - first) * stride, bias, count, out + row * product.stride);
  }
}

}  // namespace genarm
