// The build compiles this file once per instruction set, with -DISA=name and its flags. Without AVX2 the file is empty.
#include "loops.h"

#if defined(__AVX2__)

#include <algorithm>
#include <cstring>

#include "common/float_math.h"
#include "dot_group.h"

namespace genarm {
namespace {

// Most inputs of one row in a chunk. A chunk of the rows stays in the L1 cache, beside the lanes of all streams, the
// weights of a group and those of the next group.
constexpr int64_t kChunk = 640 * kStep / kSlots;

// Most inputs of all rows together in a chunk. Weights of float32 leave half of the room. With 16 rows, the smaller
// chunk takes 0.9 of the time for a step of SmolLM2-135M (AMD EPYC, Zen 4, AVX-512 and AVX2, 2026-11-29, with other
// work on the machine).
template <typename W>
constexpr int64_t kChunked = (sizeof(W) == 2 ? 8192 : 4096) * kStep / kSlots;
// Most inputs of all rows together if one chunk holds them all. The limit is higher, since no lanes are kept.
template <typename W>
constexpr int64_t kWhole = kChunked<W> / 4 * 5;

// Most inputs of all rows together in a chunk of wide_dots, beside the weights of a group as float32.
constexpr int64_t kWideChunk = 5120;

constexpr int kStreams = kWidth == 16 ? 16 : 12;  // a multiple of every value of `together`

// Returns how many outputs a group multiplies at a time. The sums are enough to hide the latency of the FMA, and fit in
// the registers and in a group.
constexpr int together(int rows) {
  if (kWidth == 16) return rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
  return rows == 1 ? 4 : rows == 2 || rows > 4 ? 2 : 3;
}

// Multiplies outputs first .. first + streams * length - 1, O at a time. The weights are read in many streams of
// `length` outputs each, in turn: while some are read, the hardware goes on fetching the others. With few streams, or
// outputs that share a page of memory, the fetches fall behind the multiply-adds. With 576 x 576 weights and 8 rows, 3
// streams reach 0.74 of the read bandwidth, and 16 streams 0.84.
template <int O, typename W>
void sweep(const Dots<W>& d, int first, int streams, int length) {
  alignas(64) float lanes[kStreams / O][kTile][O * kLanes];
  Places places;
  for (int sum = 0; sum < kSumsFilled; ++sum) places.of[sum] = sum / O * kPanelRow + sum % O * length;
  const int groups = streams / O;
  const int64_t in = d.in, gap = length * in;
  Group<W> run[kTile];
  int rows[kTile + 1] = {};
  for (int k = 0; k < d.count; ++k) {
    run[k] = group_of<W, O>(d.blocks[k].count);
    rows[k + 1] = rows[k] + d.blocks[k].count;
  }
  const int64_t limit = std::min(in * rows[d.count] <= kWhole<W> ? in : kChunked<W> / rows[d.count], kChunk);
  const int64_t steps = (in + kStep - 1) / kStep, chunks = (in + limit - 1) / limit;
  const int64_t chunk = (steps + chunks - 1) / chunks * kStep;
  for (int b = 0; b < length; ++b) {
    for (int64_t i = 0; i < in; i += chunk) {
      const int64_t n = std::min(chunk, in - i);
      const bool end = i + n == in;
      const W* here = d.w + (first + b) * in + i;
      const W* after = end && b + 1 == length ? d.next : here + n;
      for (int g = 0; g < groups; ++g, here += O * gap) {
        const W* near = g + 1 < groups ? here + O * gap : after;
        const W* far = d.cold ? after + g * O * gap : here;
        float* y = d.y + first + g * O * length + b;
        for (int k = 0; k < d.count; ++k) {
          const Rows& block = d.blocks[k];
          run[k]({block.step, gap, n, i == 0, end}, block.x + i / kStep * block.step, here,
                 k + 1 < d.count ? here : near, k ? here : far, lanes[g][rows[k]], places, y + rows[k] * kPanelRow);
        }
      }
    }
  }
}

template <int O, typename W>
void panel(const Dots<W>& d) {
  const int length = d.outputs / kStreams;
  if (length) sweep<O>(d, 0, kStreams, length);
  const int left = d.outputs % kStreams, groups = left / O * O;
  if (groups) sweep<O>(d, d.outputs - left, groups, 1);
  if (groups < left) sweep<1>(d, d.outputs - left + groups, left - groups, 1);
}

template <typename W>
void dots(const Dots<W>& d) {
  if (d.in == 0) {
    std::fill_n(d.y, kTile * kPanelRow, 0.f);
    return;
  }
  const Subnormals mode(sizeof(W) == 2);
  int most = 0;
  for (int k = 0; k < d.count; ++k) most = std::max(most, d.blocks[k].count);
  switch (together(most)) {
    case 8: return panel<8, W>(d);
    case 4: return panel<4, W>(d);
    case 3: return panel<3, W>(d);
    default: return panel<2, W>(d);
  }
}

#if !defined(__AVX512BF16__)

constexpr int kWide = kSums / kWideBlock;

// Keeps a chunk of the rows in the L1 cache while it reads all weights of the panel from L2. Returns the new `far`.
const float* wide_dots(const WideDots& d) {
  const Subnormals mode(d.flush);
  constexpr int O = kWide;
  constexpr int kPasses = kLanes / kWidth;
  const float* far = d.far;
  Places places;
  for (int sum = 0; sum < kSumsFilled; ++sum) places.of[sum] = sum / O * kPanelRow + sum % O;
  WideGroup run[kTile];
  int rows[kTile + 1] = {};
  for (int k = 0; k < d.count; ++k) {
    run[k] = wide_group_of<O>(d.blocks[k].count);
    rows[k + 1] = rows[k] + d.blocks[k].count;
  }
  const int64_t chunks = (d.width * rows[d.count] + kWideChunk - 1) / kWideChunk;
  const int64_t chunk = (d.width / kStep + chunks - 1) / chunks * kStep;
  for (int64_t i = 0; i < d.width; i += chunk) {
    const int64_t n = std::min(chunk, d.width - i);
    const int64_t fetched = kPasses * n / kStep * kFarLines * kLine;
    for (int o = 0; o < d.outputs; o += O) {
      const float* const w = d.w + o * d.width + i * O;
      for (int k = 0; k < d.count; ++k) {
        const Rows& block = d.blocks[k];
        float* lanes = d.lanes + (o * kTile + rows[k] * O) * kLanes;
        run[k]({block.step, 0, n, i == 0, i + n == d.width}, block.x + i / kStep * block.step, w, far, lanes, places,
               d.y + rows[k] * kPanelRow + o);
        far = std::min(far + fetched, d.far_end);
      }
    }
  }
  return far;
}

#endif

void spread_step(const uint16_t* x, float* out) {
#if defined(__AVX512BF16__)
  std::memcpy(out, x, kStep * sizeof *x);
#else
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words pairs = load_as<Words>(x + v * 2 * kWidth);
    store(out + v * kWidth, odd(pairs));
    store(out + kLanes + v * kWidth, even(pairs));
  }
#endif
}

[[maybe_unused]] void spread_step(const float* x, float* out) { std::memcpy(out, x, kStep * sizeof *x); }

template <typename W>
void spread(const W* x, int64_t n, float* out, int64_t step) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, out += step) spread_step(x + i, out);
  if (i < n) {
    W tail[kStep] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof *x);
    spread_step(tail, out);
  }
}

}  // namespace

#define TABLE_(name, isa) name##isa
#define TABLE(name, isa) TABLE_(name, isa)

// With AVX-512 and weights of bfloat16, WideDots is not faster: it saves the conversions, a twentieth of the time.
#if defined(__AVX512F__)
extern const LinearLoops<uint16_t> TABLE(linear_, ISA) = {kRows, kAlone, kStreams, kSlots, spread, dots, 0, 0, nullptr};
#else
extern const LinearLoops<uint16_t> TABLE(linear_, ISA) = {kRows, kAlone, kStreams, kSlots, spread, dots, kWide, 32, wide_dots};
#endif
#if !defined(__AVX512BF16__)
constexpr int kFloatFrom = kWidth == 16 ? 64 : 32;  // with AVX-512 and 32 rows, WideDots and Dots take the same time
extern const LinearLoops<float> TABLE(float_linear_, ISA) = {kRows,  kAlone, kStreams,   kSlots,   spread,
                                                             dots,   kWide,  kFloatFrom, wide_dots};
#endif

}  // namespace genarm

#endif  // __AVX2__
