#include "quant_linear.h"

#include "common/pool.h"
#include "linear/parts.h"
#include "loops.h"

namespace genarm {
namespace {

constexpr int64_t kThreadBytes = 1 << 19;  // bytes of weights that are worth a thread
constexpr int64_t kTableBytes = 1 << 20;   // bytes of prepared rows, which stay in the L2 cache while weights are read
constexpr int64_t kTileBytes = 64 << 10;   // bytes of the largest tile that stays in the L2 cache for several blocks
// kAhead bytes of weights are prefetched for more than kStreamed rows. For fewer rows, the processor's own prefetching
// is ahead of the arithmetic. On a Zen 4 a step of SmolLM2-135M in 8 bits takes 10.1 ms without kAhead, 11.4 ms with
// 2 KiB, and 13.1 ms with 8 KiB. With 4 rows in 4 bits it takes 12.1, 11.8 and 12.5 ms. (Measured by hand, in turn in
// one process.)
constexpr int64_t kAhead = 2 << 10;
constexpr int64_t kStreamed = 2;

class Multiplication {
 public:
  Multiplication(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows)
      : loops_(*products[0].linear->loops.quant), x_(x), x_stride_(x_stride), in_(products[0].linear->in), adapted_(adapted_of(products)) {
    groups_ = divide_up(in_, kGroup);
    ahead_ = rows > kStreamed ? kAhead : 0;
    table_ = std::min(std::max<int64_t>(kTableBytes / std::max<int64_t>(groups_ * kGroup * 2, 1), 2 * kQuantRows), rows);
    codes_ = aligned<int16_t>(table_ * groups_ * kGroup);
    scales_ = aligned<float>(table_ * groups_), sums_ = aligned<float>(table_ * groups_);
    starts_ = aligned<int32_t>(table_ * groups_);
    for (Adapted& adapted : adapted_) contract(adapted);
    for (const Product& product : products) {
      for (int64_t output = 0; output < product.linear->out; output += kTileOutputs) {
        tiles_.push_back({&product, output});
      }
    }
  }

  void run(int64_t rows, int threads) {
    for (int64_t begin = 0; begin < rows; begin = blocks_.last) {
      const int64_t count = std::min(table_, rows - begin);
      blocks_ = {begin, begin + count, divide_up(count, kQuantRows)};
      for (int64_t block = 0; block < blocks_.count; ++block) {
        const QuantRows prepared = rows_of(block);
        for (int r = 0; r < prepared.count; ++r) {
          loops_.prepare(x_ + (blocks_.start(block) + r) * x_stride_, in_, prepared, r);
        }
      }
      parallel(threads, static_cast<int64_t>(tiles_.size()), [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) outputs(tiles_[tile]);
      });
    }
  }

 private:
  struct Tile {
    const Product* product;
    int64_t output;
  };

  QuantRows rows_of(int64_t block) const {
    const int64_t at = (blocks_.start(block) - blocks_.first) * groups_;
    const int count = static_cast<int>(blocks_.start(block + 1) - blocks_.start(block));
    return {codes_.get() + at * kGroup, scales_.get() + at, sums_.get() + at, starts_.get() + at, count};
  }

  void contract(Adapted& adapted) const {
    const LinearLoops<uint16_t>& linear = *adapted.product->linear->loops.bfloat16.small;
    const int most = linear.rows, slots = linear.slots;
    const Aligned<float> spread = aligned<float>(most * divide_up(in_, kStep) * slots);
    for (int64_t first = adapted.span.first; first < adapted.span.last; first += most) {
      const int count = static_cast<int>(std::min<int64_t>(most, adapted.span.last - first));
      for (int r = 0; r < count; ++r) {
        linear.spread(x_ + (first + r) * x_stride_, in_, spread.get() + r * slots, count * slots);
      }
      Dots<uint16_t> dots{{{spread.get(), count * slots, count}}, 1};
      dots.in = in_;
      genarm::contract<uint16_t>(linear, dots, first, first + count, nullptr, &adapted);
    }
  }

  // Computes a tile's outputs for all rows in the table.
  void outputs(const Tile& tile) const {
    const Linear& linear = *tile.product->linear;
    const int64_t bytes = groups_ * group_bytes(linear.bits);
    const uint8_t* weights = linear.packed + tile.output / kTileOutputs * bytes;
    const bool once = blocks_.count == 1 || bytes > kTileBytes;
    const int count = static_cast<int>(std::min<int64_t>(kTileOutputs, linear.out - tile.output));
    alignas(64) float y[kQuantRows * kTileOutputs];
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const int64_t ahead = once ? ahead_ : block + 1 == blocks_.count ? bytes : 0;
      loops_.tile(linear.bits, weights, weights + ahead, groups_, rows_of(block), y);
      finish<uint16_t>(*tile.product, adapted_, blocks_.start(block), blocks_.start(block + 1), tile.output, count, y, kTileOutputs);
    }
  }

  const QuantLoops& loops_;
  const uint16_t* const x_;
  const int64_t x_stride_, in_;
  int64_t groups_, table_, ahead_;  // groups of a row, most rows in the table, bytes that are prefetched
  Blocks blocks_{};         // the blocks of the rows in the table
  Aligned<int16_t> codes_;  // the table: the arrays of QuantRows, for one block after the other
  Aligned<float> scales_, sums_;
  Aligned<int32_t> starts_;
  std::vector<Adapted> adapted_;
  std::vector<Tile> tiles_;
};

}  // namespace

void quant_linear(const std::vector<Product>& products, const uint16_t* x, int64_t x_stride, int64_t rows,
                  int threads) {
  const int worth = worth_it(products, divide_up(rows, kQuantRows), kThreadBytes, threads);
  Multiplication(products, x, x_stride, rows).run(rows, worth);
}

}  // namespace genarm
