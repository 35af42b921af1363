#include "small_linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "common/pool.h"

namespace genarm {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int64_t kThreadBytes = 1 << 20;    // of weights, for each thread: 70 µs or so, waking one takes 10
constexpr int64_t kTableFloats = 1 << 18;    // of rows that stay in the L2 cache while the weights pass by, 1 MB
constexpr int64_t kPanelBytes = 320 << 10;   // of weights that stay there while the rows pass by
constexpr int64_t kWideFloats = 1 << 15;     // of weights as float32 that stay there
constexpr int64_t kWideRows = 32;            // from which on these are worth it
constexpr int64_t kWideTile = 8;              // rows that stay in L1 while these pass by
constexpr int64_t kHead = 12 * kStep;        // inputs of a stream fetched in advance: 192 x 576 takes 0.96 of the time

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
  void operator()(float* memory) const { operator delete[](memory, kLine); }
};

class Multiplication {
 public:
  Multiplication(const std::vector<Product>& products, int64_t rows, int threads)
      : loops_(*products[0].linear->loops), in_(products[0].linear->in), threads_(threads) {
    width_ = divide_up(in_, kStep) * kStep;
    const int64_t tiles = kTableFloats / kTile / std::max<int64_t>(width_, 1);
    table_ = std::min(std::max<int64_t>(tiles, 1) * kTile, rows);
    wide_ = loops_.wide && rows >= kWideRows && in_;
    x_.reset(static_cast<float*>(operator new[](table_ * width_ * sizeof(float), kLine)));
    for (const Product& product : products) {
      for (const Span& span : product.spans) {
        const Lora& lora = product.linear->loras[span.lora];
        adapted_.push_back({&product, span, lora, std::vector<float>((span.last - span.first) * lora.rank)});
      }
      cut(product);
    }
  }

  void run(const uint16_t* x, int64_t x_stride, int64_t rows) {
    if (panels_.empty()) return;
    const int64_t gap = panels_[0].count / loops_.streams * in_, head = std::min(in_, kHead);
    int stream = 0;
    for (first_ = 0; first_ < rows; first_ = last_) {
      last_ = std::min(first_ + table_, rows);
      blocks_ = !wide_ && last_ - first_ <= loops_.alone ? 1 : divide_up(last_ - first_, loops_.rows);
      for (int64_t block = 0; block < blocks_; ++block) {
        for (int64_t row = start(block); row < start(block + 1); ++row) {
          // Between the rows, the streams' first lines: else memory idles until they are spread. (In no function of its
          // own: one that only fetches has no effect for GCC, which leaves its calls out.)
          for (; stream < loops_.streams && stream * rows < (row + 1) * loops_.streams; ++stream) {
            for (int64_t i = 0; i < head; i += kStep) __builtin_prefetch(panels_[0].weight() + stream * gap + i, 0, 2);
          }
          loops_.spread(x + row * x_stride, in_, spread(block, row), step(block));
        }
      }
      for (Adapted& adapted : adapted_) contract(adapted);
      parallel(threads_, static_cast<int64_t>(panels_.size()), [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel) outputs(panel);
      });
    }
  }

 private:
  struct Adapted {
    const Product* product;
    Span span;
    const Lora& lora;
    std::vector<float> hidden;  // [rows of the span, rank]: scale · x Aᵀ
  };
  struct Panel {
    const Product* product;
    int64_t output;
    int count;
    const uint16_t* weight() const { return product->linear->weight + output * product->linear->in; }
  };

  // Panels of like size, so many that threads which come late find some.
  void cut(const Product& product) {
    const int64_t out = product.linear->out, shared = kPanelBytes / 2 / std::max<int64_t>(in_, 1);
    const int64_t wide = kWideFloats / std::max<int64_t>(width_, 1);
    const int64_t fits = std::clamp<int64_t>(wide_ ? wide : shared, loops_.streams, kOutputs);
    const int64_t most = wide_ || table_ > kTile ? fits : kOutputs;
    const int64_t parts = threads_ > 1 ? 2 * threads_ : 1;
    const int64_t panels = divide_up(divide_up(out, most), parts) * parts;
    const int64_t size = divide_up(out, std::max<int64_t>(panels, 1) * loops_.streams) * loops_.streams;
    panels_.reserve(panels_.size() + panels);
    for (int64_t output = 0; output < out; output += size) {
      panels_.push_back({&product, output, static_cast<int>(std::min(size, out - output))});
    }
  }

  // Blocks of the table have as many rows as each other, or one more.
  int64_t start(int64_t block) const { return first_ + (last_ - first_) * block / blocks_; }
  int64_t step(int64_t block) const { return kStep * (start(block + 1) - start(block)); }
  float* spread(int64_t block, int64_t row) const {
    const int64_t from = start(block);
    return x_.get() + (from - first_) * width_ + (row - from) * kStep;
  }
  Rows rows(int64_t block, int64_t first, int64_t last) const {
    return {spread(block, first), step(block), static_cast<int>(last - first)};
  }

  // Of the rows in the table.
  void contract(Adapted& adapted) {
    const Span& span = adapted.span;
    const Lora& lora = adapted.lora;
    float y[kTile * kPanelRow];
    for (int64_t block = 0, to; block < blocks_; block = to) {
      Dots dots{{}, 0, lora.a, in_, 0, nullptr, true, y};
      for (to = block; to < blocks_ && start(to + 1) - start(block) <= kTile; ++to) {
        const int64_t first = std::max(start(to), span.first), last = std::min(start(to + 1), span.last);
        if (first < last) dots.blocks[dots.count++] = rows(to, first, last);
      }
      if (!dots.count) continue;
      const int64_t first = std::max(start(block), span.first), last = std::min(start(to), span.last);
      for (int64_t j = 0; j < lora.rank; j += kOutputs) {
        dots.outputs = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
        dots.w = lora.a + j * in_;
        dots.next = j + kOutputs < lora.rank ? dots.w + kOutputs * in_ : panels_[0].weight();
        loops_.dots(dots);
        for (int64_t row = first; row < last; ++row) {
          float* hidden = adapted.hidden.data() + (row - span.first) * lora.rank + j;
          for (int o = 0; o < dots.outputs; ++o) hidden[o] = lora.scale * y[(row - first) * kPanelRow + o];
        }
      }
    }
  }

  // Of all rows in the table.
  void outputs(int64_t index) const {
    const Panel& panel = panels_[index];
    const Panel& next = panels_[index + 1 < static_cast<int64_t>(panels_.size()) ? index + 1 : index];
    alignas(64) float sums[kTile * kPanelRow];
    if (wide_ && wide_outputs(panel, sums)) return;
    for (int64_t block = 0, to; block < blocks_; block = to) {
      Dots dots{{}, 0, panel.weight(), in_, panel.count, next.weight(), block == 0, sums};
      for (to = block; to < blocks_ && start(to + 1) - start(block) <= kTile; ++to) {
        dots.blocks[dots.count++] = rows(to, start(to), start(to + 1));
      }
      loops_.dots(dots);
      finish(start(block), start(to), panel, sums);
    }
  }

  // The same: the panel's weights become float32 once, and stay in the L2 cache for all rows. False: no memory for it.
  bool wide_outputs(const Panel& panel, float* sums) const {
    const int wide = loops_.wide, outputs = static_cast<int>(divide_up(panel.count, wide) * wide);
    constexpr int64_t kLanesOf = kTile * kStep / 2;
    std::unique_ptr<float[], FreeAligned> memory(
        static_cast<float*>(operator new[](outputs * (width_ + kLanesOf) * sizeof(float), kLine, std::nothrow)));
    if (!memory) return false;
    float* const weights = memory.get() + outputs * kLanesOf;
    for (int o = 0; o < outputs; ++o) {
      float* const at = weights + o / wide * wide * width_ + o % wide * kStep;
      loops_.spread(panel.weight() + std::min(o, panel.count - 1) * in_, in_, at, wide * kStep);
    }
    for (int64_t block = 0, to; block < blocks_; block = to) {
      WideDots dots{{}, 0, weights, width_, outputs, memory.get(), sums};
      for (to = block; to < blocks_ && start(to + 1) - start(block) <= kWideTile; ++to) {
        dots.blocks[dots.count++] = rows(to, start(to), start(to + 1));
      }
      loops_.wide_dots(dots);
      finish(start(block), start(to), panel, sums);
    }
    return true;
  }

  // Rows first .. last - 1: LoRA, bias, rounding.
  void finish(int64_t first, int64_t last, const Panel& panel, float* sums) const {
    const Linear& linear = *panel.product->linear;
    for (const Adapted& adapted : adapted_) {
      if (adapted.product != panel.product) continue;
      const Span& span = adapted.span;
      const Lora& lora = adapted.lora;
      for (int64_t row = std::max(first, span.first); row < std::min(last, span.last); ++row) {
        loops_.expand(adapted.hidden.data() + (row - span.first) * lora.rank, lora.rank, lora.b + panel.output,
                      linear.out, panel.count, sums + (row - first) * kPanelRow);
      }
    }
    const uint16_t* bias = linear.bias ? linear.bias + panel.output : nullptr;
    for (int64_t row = first; row < last; ++row) {
      uint16_t* y = panel.product->y + row * linear.out + panel.output;
      loops_.store(sums + (row - first) * kPanelRow, bias, panel.count, y);
    }
  }

  const LinearLoops& loops_;
  const int64_t in_;
  const int threads_;
  int64_t width_, table_;                      // of a spread row, in rows
  bool wide_;                                  // whether weights become float32 first
  int64_t first_ = 0, last_ = 0, blocks_ = 0;  // of the rows in the table
  std::unique_ptr<float[], FreeAligned> x_;    // [table, width], spread
  std::vector<Adapted> adapted_;
  std::vector<Panel> panels_;
};

}  // namespace

void small_linear(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows,
                  int threads) {
  int64_t work = 0;
  for (const Product& product : products) work += product.linear->out * product.linear->in * 2;
  const int64_t passes = divide_up(rows, products[0].linear->loops->rows);
  threads = static_cast<int>(std::min<int64_t>(threads, work * passes / kThreadBytes));
  Multiplication(products, rows, threads).run(x, x_stride, rows);
}

}  // namespace genarm
