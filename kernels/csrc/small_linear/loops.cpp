// Compiled with -DISA=name and that instruction set's flags; the baseline has none of it.
#include "loops.h"

#if defined(__AVX2__)

#include <algorithm>
#include <cstring>

#include "common/float_math.h"
#include "dot_group.h"

namespace genarm {
namespace {

// Inputs that stay in the L1 cache: 20 KB of a block beside the lanes of all streams, 32 KB of two blocks beside twice
// as many; where one chunk is all, no lanes are kept, and two blocks may take 40 KB.
constexpr int64_t kWhole = 640, kChunk[kBlocks] = {640, 512};

// Outputs at a time: enough sums to hide the latency of the fma, no more than the registers and a group hold.
constexpr int together(int rows) {
  if (kWidth == 16) return rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

// Outputs first .. first + streams * length - 1, O at a time. The weights pass in many streams of `length` outputs
// each, in turn: while some are read, the hardware goes on fetching the others. Few streams, or outputs that share a
// page of memory, leave it behind the multiply-adds (576 x 576, 8 rows: 3 streams 0.74 of the read bandwidth, 16 0.84).
template <int O>
void sweep(const Dots& d, int first, int streams, int length) {
  constexpr int kGroups = kStreams / O;
  alignas(64) float lanes[kGroups][kBlocks][kSums * kLanes];
  Places places;
  for (int sum = 0; sum < kSums; ++sum) places.of[sum] = sum / O * kPanelRow + sum % O * length;
  const int groups = streams / O;
  const int64_t in = d.in, gap = length * in;
  const int64_t limit = in <= kWhole ? kWhole : kChunk[d.count - 1];
  const int64_t steps = (in + kStep - 1) / kStep, chunks = (in + limit - 1) / limit;
  const int64_t chunk = (steps + chunks - 1) / chunks * kStep;
  Group run[kBlocks];
  for (int k = 0; k < d.count; ++k) run[k] = group_of<O>(d.blocks[k].count);
  for (int b = 0; b < length; ++b) {
    for (int64_t i = 0; i < in; i += chunk) {
      const int64_t n = std::min(chunk, in - i);
      const bool end = i + n == in;
      const float* x[kBlocks];
      Strip strips[kBlocks];
      for (int k = 0; k < d.count; ++k) {
        x[k] = d.blocks[k].x + i / kStep * d.blocks[k].step;
        strips[k] = {d.blocks[k].step, gap, n, i == 0, end};
      }
      const uint16_t* here = d.w + (first + b) * in + i;
      const uint16_t* after = end && b + 1 == length ? d.next : here + n;
      for (int g = 0; g < groups; ++g, here += O * gap) {
        const uint16_t* near = g + 1 < groups ? here + O * gap : after;
        const uint16_t* far = d.cold ? after + g * O * gap : here;
        float* y = d.y + first + g * O * length + b;
        if (d.count == 1) {
          run[0](strips[0], x[0], here, near, far, lanes[g][0], places, y);
        } else {
          run[0](strips[0], x[0], here, here, far, lanes[g][0], places, y);
          run[1](strips[1], x[1], here, near, here, lanes[g][1], places, y + kRows * kPanelRow);
        }
      }
    }
  }
}

template <int O>
void panel(const Dots& d) {
  const int length = d.outputs / kStreams;
  if (length) sweep<O>(d, 0, kStreams, length);
  const int left = d.outputs % kStreams, groups = left / O * O;
  if (groups) sweep<O>(d, d.outputs - left, groups, 1);
  if (groups < left) sweep<1>(d, d.outputs - left + groups, left - groups, 1);
}

void dots(const Dots& d) {
  if (d.in == 0) {
    std::fill_n(d.y, kBlocks * kRows * kPanelRow, 0.f);
    return;
  }
  switch (together(std::max(d.blocks[0].count, d.blocks[d.count - 1].count))) {
    case 8: return panel<8>(d);
    case 4: return panel<4>(d);
    case 2: return panel<2>(d);
    default: return panel<1>(d);
  }
}

void spread_step(const uint16_t* x, float* out) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words pairs = load_as<Words>(x + v * 2 * kWidth);
    store(out + v * kWidth, odd(pairs));
    store(out + kLanes + v * kWidth, even(pairs));
  }
}

void spread(const uint16_t* x, int64_t n, float* out, int64_t step) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, out += step) spread_step(x + i, out);
  if (i < n) {
    uint16_t tail[kStep] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof *x);
    spread_step(tail, out);
  }
}

void expand(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y) {
  constexpr int kBlock = 64;
  for (int first = 0; first < n; first += kBlock) {
    const int count = std::min(kBlock, n - first);
    float sums[kBlock] = {};
    std::memcpy(sums, y + first, count * sizeof *sums);
    for (int64_t j = 0; j < rank; ++j) {
      uint16_t padded[kBlock] = {};
      std::memcpy(padded, b + j * b_stride + first, count == kBlock ? sizeof padded : count * sizeof *b);
#pragma omp simd
      for (int o = 0; o < kBlock; ++o) sums[o] += hidden[j] * as_float32(padded[o]);
    }
    std::memcpy(y + first, sums, count * sizeof *sums);
  }
}

void store_bf16(const float* y, const uint16_t* bias, int n, uint16_t* out) {
#pragma omp simd
  for (int o = 0; o < n; ++o) {
    const float sum = bias ? y[o] + as_float32(bias[o]) : y[o];
    const uint32_t bits = as_bits(sum);
    out[o] = static_cast<uint16_t>(sum == sum ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
  }
}

#define TABLE_(isa) linear_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const LinearLoops TABLE(ISA) = {spread, dots, expand, store_bf16};

}  // namespace genarm

#endif  // __AVX2__
