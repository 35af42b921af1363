#include "small_linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "pool.h"

namespace genarm {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int64_t kThreadBytes = 1 << 20;    // of weights, for each thread: 70 µs or so, waking one takes 10
constexpr int64_t kTableFloats = 1 << 18;    // of rows that stay in the L2 cache while the weights pass by, 1 MB
constexpr int64_t kPanelBytes = 320 << 10;   // of weights that stay there while the rows pass by
constexpr int kTile = kBlocks * kRows;       // rows that take one pass

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
  void operator()(float* memory) const { operator delete[](memory, kLine); }
};

class Multiplication {
 public:
  Multiplication(const Linear& linear, const std::vector<Span>& spans, int64_t rows, int threads)
      : linear_(linear),
        loops_(*linear.loops),
        spans_(spans),
        threads_(threads),
        width_(divide_up(linear.in, kStep) * kStep) {
    const int64_t tiles = kTableFloats / kTile / std::max<int64_t>(width_, 1);
    table_ = std::min(std::max<int64_t>(tiles, 1) * kTile, rows);
    x_.reset(static_cast<float*>(operator new[](table_ * width_ * sizeof(float), kLine)));
    for (const Span& span : spans) hidden_.emplace_back((span.last - span.first) * linear.loras[span.lora].rank);
    const int64_t shared = kPanelBytes / 2 / std::max<int64_t>(linear.in, 1);
    const int64_t most = table_ > kTile ? std::clamp<int64_t>(shared, kStreams, kOutputs) : kOutputs;
    const int64_t parts = threads > 1 ? 2 * threads : 1;
    const int64_t panels = divide_up(divide_up(linear.out, most), parts) * parts;
    panel_ = divide_up(linear.out, std::max<int64_t>(panels, 1) * kStreams) * kStreams;
  }

  void run(const uint16_t* x, int64_t x_stride, int64_t rows, uint16_t* y) {
    for (first_ = 0; first_ < rows; first_ = last_) {
      last_ = std::min(first_ + table_, rows);
      blocks_ = divide_up(last_ - first_, kRows);
      for (int64_t block = 0; block < blocks_; ++block) {
        for (int64_t row = start(block); row < start(block + 1); ++row) {
          loops_.spread(x + row * x_stride, linear_.in, spread(block, row), step(block));
        }
      }
      for (size_t i = 0; i < spans_.size(); ++i) contract(i);
      parallel(threads_, panel_ ? divide_up(linear_.out, panel_) : 0, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel) outputs(panel * panel_, y);
      });
    }
  }

 private:
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

  // scale · x Aᵀ of a span's rows in the table.
  void contract(size_t i) {
    const Span& span = spans_[i];
    const Lora& lora = linear_.loras[span.lora];
    float y[kTile * kPanelRow];
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t first = std::max(start(block), span.first), last = std::min(start(block + 1), span.last);
      if (first >= last) continue;
      for (int64_t j = 0; j < lora.rank; j += kOutputs) {
        const int count = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
        const uint16_t* a = lora.a + j * linear_.in;
        loops_.dots({{rows(block, first, last)}, 1, a, linear_.in, count, linear_.weight, true, y});
        for (int64_t row = first; row < last; ++row) {
          float* hidden = hidden_[i].data() + (row - span.first) * lora.rank + j;
          for (int o = 0; o < count; ++o) hidden[o] = lora.scale * y[(row - first) * kPanelRow + o];
        }
      }
    }
  }

  // A panel of outputs, of all rows of the table.
  void outputs(int64_t output, uint16_t* y) const {
    const int count = static_cast<int>(std::min<int64_t>(panel_, linear_.out - output));
    const uint16_t* w = linear_.weight + output * linear_.in;
    const uint16_t* next = output + panel_ < linear_.out ? w + panel_ * linear_.in : w;  // w: nothing to fetch
    alignas(64) float sums[kTile * kPanelRow];
    for (int64_t block = 0; block < blocks_; block += kBlocks) {
      Dots dots{{}, 0, w, linear_.in, count, next, block == 0, sums};
      for (int64_t k = block; k < std::min(block + kBlocks, blocks_); ++k) {
        dots.blocks[dots.count++] = rows(k, start(k), start(k + 1));
      }
      loops_.dots(dots);
      for (int k = 0; k < dots.count; ++k) {
        finish(start(block + k), start(block + k + 1), output, count, sums + k * kRows * kPanelRow, y);
      }
    }
  }

  // Rows first .. last - 1 of `count` outputs: LoRA, bias, rounding.
  void finish(int64_t first, int64_t last, int64_t output, int count, float* sums, uint16_t* y) const {
    for (size_t i = 0; i < spans_.size(); ++i) {
      const Span& span = spans_[i];
      const Lora& lora = linear_.loras[span.lora];
      for (int64_t row = std::max(first, span.first); row < std::min(last, span.last); ++row) {
        loops_.expand(hidden_[i].data() + (row - span.first) * lora.rank, lora.rank, lora.b + output, linear_.out,
                      count, sums + (row - first) * kPanelRow);
      }
    }
    const uint16_t* bias = linear_.bias ? linear_.bias + output : nullptr;
    for (int64_t row = first; row < last; ++row) {
      loops_.store(sums + (row - first) * kPanelRow, bias, count, y + row * linear_.out + output);
    }
  }

  const Linear& linear_;
  const LinearLoops& loops_;
  const std::vector<Span>& spans_;
  const int threads_;
  const int64_t width_;
  int64_t table_, panel_;                      // rows, outputs
  int64_t first_ = 0, last_ = 0, blocks_ = 0;  // of the rows in the table
  std::unique_ptr<float[], FreeAligned> x_;    // [table, width], spread
  std::vector<std::vector<float>> hidden_;     // of each span, [rows, rank]
};

}  // namespace

void small_linear(const Linear& linear, const uint16_t* x, int64_t x_stride, int64_t rows, uint16_t* y,
                  const std::vector<Span>& spans, int threads) {
  const int64_t work = linear.out * linear.in * 2 * divide_up(rows, kRows);
  threads = static_cast<int>(std::min<int64_t>(threads, work / kThreadBytes));
  Multiplication(linear, spans, rows, threads).run(x, x_stride, rows, y);
}

}  // namespace genarm
