#include "small_linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "pool.h"

namespace genarm {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int64_t kThreadBytes = 1 << 20;   // of weights, for each thread: 70 µs or so, waking one takes 10
constexpr int64_t kPanelFloats = 1 << 18;  // of rows that stay in the L2 cache while the weights pass by, 1 MB

struct FreeAligned {
  void operator()(float* memory) const { operator delete[](memory, kLine); }
};

class Multiplication {
 public:
  Multiplication(const Linear& linear, const std::vector<Span>& spans, int64_t rows)
      : linear_(linear), loops_(*linear.loops), spans_(spans), width_((linear.in + kStep - 1) / kStep * kStep) {
    const int64_t blocks = kPanelFloats / kRows / std::max<int64_t>(width_, 1);
    panel_ = std::min(std::max<int64_t>(blocks, 1) * kRows, rows);
    x_.reset(static_cast<float*>(operator new[](panel_ * width_ * sizeof(float), kLine)));
    for (const Span& span : spans) hidden_.emplace_back((span.last - span.first) * linear.loras[span.lora].rank);
  }

  void run(const uint16_t* x, int64_t x_stride, int64_t rows, uint16_t* y, int threads) {
    for (first_ = 0; first_ < rows; first_ = last_) {
      last_ = std::min(first_ + panel_, rows);
      for (int64_t row = first_; row < last_; ++row) {
        const int64_t start = start_of(row);
        loops_.spread(x + row * x_stride, linear_.in, spread(row), kStep * (end_of(start) - start));
      }
      for (size_t i = 0; i < spans_.size(); ++i) contract(i);
      parallel(threads, (linear_.out + kOutputs - 1) / kOutputs, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) outputs(block * kOutputs, y);
      });
    }
  }

 private:
  // Rows are multiplied in blocks of kRows, counted from the panel's first.
  int64_t start_of(int64_t row) const { return row - (row - first_) % kRows; }
  int64_t end_of(int64_t start) const { return std::min(start + kRows, last_); }
  float* spread(int64_t row) const {
    const int64_t start = start_of(row);
    return x_.get() + (start - first_) * width_ + (row - start) * kStep;
  }

  void dots(int64_t row, int64_t end, const uint16_t* w, int outputs, const uint16_t* next, float* y) const {
    const int64_t start = start_of(row);
    const int64_t step = kStep * (end_of(start) - start);
    loops_.dots(spread(row), step, static_cast<int>(end - row), w, linear_.in, outputs, next, y);
  }

  // scale · x Aᵀ of a span's rows in this panel.
  void contract(size_t i) {
    const Span& span = spans_[i];
    const Lora& lora = linear_.loras[span.lora];
    float y[kRows * kOutputs];
    for (int64_t row = std::max(span.first, first_), end; row < std::min(span.last, last_); row = end) {
      end = std::min(end_of(start_of(row)), span.last);
      for (int64_t j = 0; j < lora.rank; j += kOutputs) {
        const int count = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
        dots(row, end, lora.a + j * linear_.in, count, linear_.weight, y);
        for (int64_t r = row; r < end; ++r) {
          float* hidden = hidden_[i].data() + (r - span.first) * lora.rank + j;
          for (int o = 0; o < count; ++o) hidden[o] = lora.scale * y[(r - row) * kOutputs + o];
        }
      }
    }
  }

  // Up to kOutputs outputs of all rows of this panel.
  void outputs(int64_t output, uint16_t* y) const {
    const int count = static_cast<int>(std::min<int64_t>(kOutputs, linear_.out - output));
    const uint16_t* w = linear_.weight + output * linear_.in;
    const uint16_t* next = output + kOutputs < linear_.out ? w + kOutputs * linear_.in : w;  // w: nothing to fetch
    const uint16_t* bias = linear_.bias ? linear_.bias + output : nullptr;
    alignas(64) float sums[kRows * kOutputs];
    for (int64_t row = first_, end; row < last_; row = end) {
      end = end_of(row);
      dots(row, end, w, count, next, sums);
      for (size_t i = 0; i < spans_.size(); ++i) {
        const Span& span = spans_[i];
        const Lora& lora = linear_.loras[span.lora];
        for (int64_t r = std::max(row, span.first); r < std::min(end, span.last); ++r) {
          loops_.expand(hidden_[i].data() + (r - span.first) * lora.rank, lora.rank, lora.b + output, linear_.out,
                        count, sums + (r - row) * kOutputs);
        }
      }
      for (int64_t r = row; r < end; ++r) {
        loops_.store(sums + (r - row) * kOutputs, bias, count, y + r * linear_.out + output);
      }
    }
  }

  const Linear& linear_;
  const LinearLoops& loops_;
  const std::vector<Span>& spans_;
  const int64_t width_;
  int64_t panel_, first_ = 0, last_ = 0;
  std::unique_ptr<float[], FreeAligned> x_;   // [panel, width], spread
  std::vector<std::vector<float>> hidden_;  // of each span, [rows, rank]
};

}  // namespace

void small_linear(const Linear& linear, const uint16_t* x, int64_t x_stride, int64_t rows, uint16_t* y,
                  const std::vector<Span>& spans, int threads) {
  const int64_t work = linear.out * linear.in * 2 * ((rows + kRows - 1) / kRows);
  threads = static_cast<int>(std::min<int64_t>(threads, work / kThreadBytes));
  Multiplication(linear, spans, rows).run(x, x_stride, rows, y, threads);
}

}  // namespace genarm
