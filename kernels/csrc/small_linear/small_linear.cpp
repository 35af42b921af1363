#include "small_linear.h"

#include "common/pool.h"
#include "linear/parts.h"

namespace genarm {
namespace {

// Bytes of weights for each thread. A thread reads them in about 70 µs, and to wake a thread takes 10 µs.
constexpr int64_t kThreadBytes = 1 << 20;
// Floats of spread rows, 1 MB, that stay in the L2 cache while the weights are read.
constexpr int64_t kTableFloats = 1 << 18;
// Bytes of a panel's weights that stay in the L2 cache while the rows are read.
constexpr int64_t kPanelBytes = 320 << 10;
// With WideDots, the L2 cache holds a panel's weights as float32, kWideFloats at most, and kWideTable floats of rows.
constexpr int64_t kWideFloats = 1 << 16;
constexpr int64_t kWideTable = 1 << 17;
constexpr int64_t kWideTile = 4;  // rows that stay in the L1 cache while WideDots reads a panel's weights
// Inputs of a stream that are fetched before the first product: a linear of 192 x 576 takes 0.96 of the time with it.
constexpr int64_t kHead = 12 * kStep;

// Multiplies the rows of x by the products' linears. A table of spread rows stays in the L2 cache while the threads
// share out the panels of outputs.
template <typename W>
class Multiplication {
 public:
  Multiplication(const std::vector<Product>& products, int64_t rows, int threads)
      : loops_(*products[0].linear->loops.of<W>().small), in_(products[0].linear->in), threads_(threads),
        adapted_(adapted_of(products)) {
    width_ = divide_up(in_, kStep) * loops_.slots;
    wide_ = loops_.wide && rows >= loops_.wide_from && in_;
    const int64_t tiles = (wide_ ? kWideTable : kTableFloats) / kTile / std::max<int64_t>(width_, 1);
    table_ = std::min(std::max<int64_t>(tiles, 1) * kTile, rows);
    x_ = aligned<float>(table_ * width_);
    for (const Product& product : products) cut(product);
  }

  void run(const W* x, int64_t x_stride, int64_t rows) {
    if (panels_.empty()) return;
    const int64_t gap = panels_[0].count / loops_.streams * in_, head = std::min(in_, kHead);
    int stream = 0;
    for (int64_t begin = 0; begin < rows; begin = blocks_.last) {
      const int64_t count = std::min(table_, rows - begin);
      blocks_ = {begin, begin + count, !wide_ && count <= loops_.alone ? 1 : divide_up(count, wide_ ? kWideBlock : loops_.rows)};
      for (int64_t block = 0; block < blocks_.count; ++block) {
        for (int64_t row = start(block); row < start(block + 1); ++row) {
          // Fetch the first lines of the streams between the rows, or memory would be idle until all rows are spread.
          // This is no function of its own, because GCC leaves out calls of a function that only fetches.
          for (; stream < loops_.streams && stream * rows < (row + 1) * loops_.streams; ++stream) {
            for (int64_t i = 0; i < head; i += kLineWeights) __builtin_prefetch(panels_[0].weight() + stream * gap + i, 0, 2);
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
  // `count` outputs of a product, from `output` on.
  struct Panel {
    const Product* product;
    int64_t output;
    int count;
    const W* weight() const { return static_cast<const W*>(product->linear->weight) + output * product->linear->in; }
  };

  // Cuts the outputs into panels of similar size. Several threads get about two panels or more each, so that a thread
  // which starts late finds work.
  void cut(const Product& product) {
    const int64_t out = product.linear->out, shared = kPanelBytes / sizeof(W) / std::max<int64_t>(in_, 1);
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

  int64_t start(int64_t block) const { return blocks_.start(block); }
  int64_t step(int64_t block) const { return loops_.slots * (start(block + 1) - start(block)); }
  float* spread(int64_t block, int64_t row) const {
    const int64_t from = start(block);
    return x_.get() + (from - blocks_.first) * width_ + (row - from) * loops_.slots;
  }
  Rows rows(int64_t block, int64_t first, int64_t last) const {
    return {spread(block, first), step(block), static_cast<int>(last - first)};
  }

  // Computes the LoRA's `hidden` for the rows of its span that are in the table.
  void contract(Adapted& adapted) {
    const Span& span = adapted.span;
    for (int64_t block = 0, to; block < blocks_.count; block = to) {
      Dots<W> dots{};
      dots.in = in_;
      for (to = block; to < blocks_.count && start(to + 1) - start(block) <= kTile; ++to) {
        const int64_t first = std::max(start(to), span.first), last = std::min(start(to + 1), span.last);
        if (first < last) dots.blocks[dots.count++] = rows(to, first, last);
      }
      if (!dots.count) continue;
      const int64_t first = std::max(start(block), span.first), last = std::min(start(to), span.last);
      genarm::contract<W>(loops_, dots, first, last, panels_[0].weight(), &adapted);
    }
  }

  // Computes a panel's outputs for all rows in the table.
  void outputs(int64_t index) const {
    const Panel& panel = panels_[index];
    const Panel& next = panels_[index + 1 < static_cast<int64_t>(panels_.size()) ? index + 1 : index];
    alignas(64) float sums[kTile * kPanelRow];
    if (wide_ && wide_outputs(panel, next, sums)) return;
    for (int64_t block = 0, to; block < blocks_.count; block = to) {
      Dots<W> dots{{}, 0, panel.weight(), in_, panel.count, next.weight(), block == 0, sums};
      for (to = block; to < blocks_.count && start(to + 1) - start(block) <= kTile; ++to) {
        dots.blocks[dots.count++] = rows(to, start(to), start(to + 1));
      }
      loops_.dots(dots);
      finish(start(block), start(to), panel, sums);
    }
  }

  // Computes a panel's outputs with WideDots: the weights are converted to float32 once, and stay in the L2 cache for
  // all rows. Returns false, with nothing written, if there is no memory for them.
  bool wide_outputs(const Panel& panel, const Panel& next, float* sums) const {
    const int wide = loops_.wide, outputs = static_cast<int>(divide_up(panel.count, wide) * wide);
    constexpr int64_t kLanesOf = kTile * kStep / 2;
    const Aligned<float> memory(
        static_cast<float*>(operator new[](outputs * (width_ + kLanesOf) * sizeof(float), kLine, std::nothrow)));
    if (!memory) return false;
    float* const weights = memory.get() + outputs * kLanesOf;
    for (int o = 0; o < outputs; ++o) {
      float* const at = weights + o / wide * wide * width_ + o % wide * kStep;
      loops_.spread(panel.weight() + std::min(o, panel.count - 1) * in_, in_, at, wide * kStep);
    }
    const float* far = reinterpret_cast<const float*>(next.weight());
    const float* const far_end = reinterpret_cast<const float*>(next.weight() + (&next == &panel ? 0 : next.count * in_));
    for (int64_t block = 0, to; block < blocks_.count; block = to) {
      WideDots dots{{}, 0, weights, width_, outputs, memory.get(), sums, far, far_end, sizeof(W) == 2};
      for (to = block; to < blocks_.count && start(to + 1) - start(block) <= kWideTile; ++to) {
        dots.blocks[dots.count++] = rows(to, start(to), start(to + 1));
      }
      far = loops_.wide_dots(dots);
      finish(start(block), start(to), panel, sums);
    }
    return true;
  }

  void finish(int64_t first, int64_t last, const Panel& panel, float* sums) const {
    genarm::finish<W>(*panel.product, adapted_, first, last, panel.output, panel.count, sums, kPanelRow);
  }

  static constexpr int64_t kLineWeights = 64 / sizeof(W);
  const LinearLoops<W>& loops_;
  const int64_t in_;
  const int threads_;
  int64_t width_, table_;  // floats of a spread row; rows of the table
  bool wide_;              // whether WideDots multiplies
  Blocks blocks_{};        // blocks of the rows in the table
  Aligned<float> x_;       // [table, width]: the table of spread rows
  std::vector<Adapted> adapted_;
  std::vector<Panel> panels_;
};

template <typename W>
void run(const std::vector<Product>& products, const void* x, int64_t x_stride, int64_t rows, int threads) {
  const int64_t passes = divide_up(rows, products[0].linear->loops.of<W>().small->rows);
  const int worth = worth_it(products, passes, kThreadBytes, threads);
  Multiplication<W>(products, rows, worth).run(static_cast<const W*>(x), x_stride, rows);
}

}  // namespace

void small_linear(const std::vector<Product>& products, const void* x, int64_t x_stride, int64_t rows, int threads) {
  (products[0].linear->is_float32() ? run<float> : run<uint16_t>)(products, x, x_stride, rows, threads);
}

}  // namespace genarm
