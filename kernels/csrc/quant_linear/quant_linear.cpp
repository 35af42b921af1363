#include "quant_linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "common/pool.h"

namespace genarm {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int64_t kThreadBytes = 1 << 19;  // of weights, for each thread
constexpr int64_t kTableBytes = 1 << 20;   // of rows that stay in the L2 cache while the weights pass by
constexpr int64_t kTileBytes = 64 << 10;   // of a tile that stays there while the rows pass by
constexpr int64_t kAhead = 8 << 10;         // bytes of weights fetched in advance

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
  void operator()(void* memory) const { operator delete[](memory, kLine); }
};

template <typename T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(operator new[](count * sizeof(T), kLine)));
}

class Multiplication {
 public:
  Multiplication(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows)
      : loops_(*products[0].linear->quant), x_(x), x_stride_(x_stride), in_(products[0].linear->in) {
    groups_ = divide_up(in_, kGroup);
    table_ = std::min(std::max<int64_t>(kTableBytes / std::max<int64_t>(groups_ * kGroup * 2, 1), 2 * kQuantRows), rows);
    codes_ = aligned<int16_t>(table_ * groups_ * kGroup);
    scales_ = aligned<float>(table_ * groups_), sums_ = aligned<float>(table_ * groups_);
    starts_ = aligned<int32_t>(table_ * groups_);
    for (const Product& product : products) {
      for (const Span& span : product.spans) {
        const Lora& lora = product.linear->loras[span.lora];
        adapted_.push_back({&product, span, lora, std::vector<float>((span.last - span.first) * lora.rank)});
        contract(adapted_.back());
      }
      for (int64_t output = 0; output < product.linear->out; output += kTileOutputs) {
        tiles_.push_back({&product, output});
      }
    }
  }

  void run(int64_t rows, int threads) {
    for (first_ = 0; first_ < rows; first_ = last_) {
      last_ = std::min(first_ + table_, rows);
      blocks_ = divide_up(last_ - first_, kQuantRows);
      for (int64_t block = 0; block < blocks_; ++block) {
        const QuantRows prepared = rows_of(block);
        for (int r = 0; r < prepared.count; ++r) {
          loops_.prepare(x_ + (start(block) + r) * x_stride_, in_, prepared, r);
        }
      }
      parallel(threads, static_cast<int64_t>(tiles_.size()), [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) outputs(tiles_[tile]);
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
  struct Tile {
    const Product* product;
    int64_t output;
  };

  // Blocks of the table have as many rows as each other, or one more.
  int64_t start(int64_t block) const { return first_ + (last_ - first_) * block / blocks_; }
  QuantRows rows_of(int64_t block) const {
    const int64_t at = (start(block) - first_) * groups_;
    const int count = static_cast<int>(start(block + 1) - start(block));
    return {codes_.get() + at * kGroup, scales_.get() + at, sums_.get() + at, starts_.get() + at, count};
  }

  void contract(Adapted& adapted) const {
    const LinearLoops& linear = *adapted.product->linear->loops;
    const Lora& lora = adapted.lora;
    const int most = linear.rows;
    const Aligned<float> spread = aligned<float>(most * divide_up(in_, kStep) * kStep);
    float y[kTile * kPanelRow];
    for (int64_t first = adapted.span.first; first < adapted.span.last; first += most) {
      const int count = static_cast<int>(std::min<int64_t>(most, adapted.span.last - first));
      for (int r = 0; r < count; ++r) {
        linear.spread(x_ + (first + r) * x_stride_, in_, spread.get() + r * kStep, count * kStep);
      }
      for (int64_t j = 0; j < lora.rank; j += kOutputs) {
        const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, lora.rank - j));
        const uint16_t* a = lora.a + j * in_;
        linear.dots({{{spread.get(), count * kStep, count}}, 1, a, in_, outputs, a, true, y});
        for (int r = 0; r < count; ++r) {
          float* hidden = adapted.hidden.data() + (first - adapted.span.first + r) * lora.rank + j;
          for (int o = 0; o < outputs; ++o) hidden[o] = lora.scale * y[r * kPanelRow + o];
        }
      }
    }
  }

  // Of all rows in the table.
  void outputs(const Tile& tile) const {
    const Linear& linear = *tile.product->linear;
    const int64_t bytes = groups_ * group_bytes(linear.bits);
    const uint8_t* weights = linear.packed + tile.output / kTileOutputs * bytes;
    const bool once = blocks_ == 1 || bytes > kTileBytes;
    alignas(64) float y[kQuantRows * kTileOutputs];
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t ahead = once ? kAhead : block + 1 == blocks_ ? bytes : 0;
      loops_.tile(linear.bits, weights, weights + ahead, groups_, rows_of(block), y);
      finish(start(block), start(block + 1), tile, y);
    }
  }

  // Rows first .. last - 1: LoRA, bias, rounding.
  void finish(int64_t first, int64_t last, const Tile& tile, float* y) const {
    const Linear& linear = *tile.product->linear;
    const int count = static_cast<int>(std::min<int64_t>(kTileOutputs, linear.out - tile.output));
    for (const Adapted& adapted : adapted_) {
      if (adapted.product != tile.product) continue;
      const Span& span = adapted.span;
      const Lora& lora = adapted.lora;
      for (int64_t row = std::max(first, span.first); row < std::min(last, span.last); ++row) {
        linear.loops->expand(adapted.hidden.data() + (row - span.first) * lora.rank, lora.rank, lora.b + tile.output,
                             linear.out, count, y + (row - first) * kTileOutputs);
      }
    }
    const uint16_t* bias = linear.bias ? linear.bias + tile.output : nullptr;
    for (int64_t row = first; row < last; ++row) {
      loops_.store(y + (row - first) * kTileOutputs, bias, count, tile.product->y + row * linear.out + tile.output);
    }
  }

  const QuantLoops& loops_;
  const uint16_t* const x_;
  const int64_t x_stride_, in_;
  int64_t groups_, table_;                     // of a row, in rows
  int64_t first_ = 0, last_ = 0, blocks_ = 0;  // of the rows in the table
  Aligned<int16_t> codes_;                     // of its blocks, as QuantRows has them
  Aligned<float> scales_, sums_;
  Aligned<int32_t> starts_;
  std::vector<Adapted> adapted_;
  std::vector<Tile> tiles_;
};

}  // namespace

void quant_linear(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows,
                  int threads) {
  int64_t work = 0;
  for (const Product& product : products) work += product.linear->out * product.linear->in * product.linear->bits / 8;
  threads = static_cast<int>(std::min<int64_t>(threads, work * divide_up(rows, kQuantRows) / kThreadBytes));
  Multiplication(products, x, x_stride, rows).run(rows, threads);
}

}  // namespace genarm
