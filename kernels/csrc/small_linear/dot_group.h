// The innermost loop of small_linear: the products of a few rows and a few outputs, whose sums stay in registers. Only
// for files that are compiled once per instruction set, AVX2 at least.
#pragma once

#include <algorithm>
#include <cstring>

#include "dot_step.h"

namespace genarm {
namespace {

constexpr int kSumsFilled = 16;  // kSums, rounded up to whole vectors

struct Places {
  int of[kSumsFilled];  // index in y for each sum of a group
};

// Adds the 16 lanes of each sum, and writes `count` sums to their places in y. The code is a transposition that adds on
// the way. It stays in registers, because what is stored in whole vectors and read back in halves, or the other way
// round, waits for the cache.
#if defined(__AVX512F__)

inline void add_lanes(float* lanes, const Places& places, int count, float* y) {
  std::fill(lanes + count * kLanes, lanes + kSums * kLanes, 0.f);
  const auto s = [&](int e) { return load(lanes + e * kLanes); };
  const auto fold8 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto fold4 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const auto fold2 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  };
  const auto quarter = [&](int e) { return fold4(fold8(s(e), s(e + 4)), fold8(s(e + 8), s(e + 12))); };
  const __m512 sum = fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3)));
  alignas(64) float sums[kSumsFilled];
  store(sums, sum);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) y[places.of[i]] = sums[i];
}

#else

inline void add_lanes(float* lanes, const Places& places, int count, float* y) {
  const int filled = (count + 7) / 8 * 8;
  std::fill(lanes + count * kLanes, lanes + filled * kLanes, 0.f);
  float sums[kSumsFilled];
  const auto fold8 = [&](int e) { return load(lanes + e * kLanes) + load(lanes + e * kLanes + kWidth); };
  const auto fold4 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto fold2 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  };
  for (int first = 0; first < filled; first += 8) {
    const auto quarter = [&](int e) { return fold4(fold8(first + e), fold8(first + 4 + e)); };
    store(sums + first, fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3))));
  }
  for (int i = 0; i < count; ++i) y[places.of[i]] = sums[i];
}

#endif

// A range of inputs that a group multiplies in one go.
struct Strip {
  int64_t x_step, w_stride;  // floats between steps of x; weights between outputs
  int64_t inputs;
  bool begin, end;  // whether the strip has the first inputs, and the last inputs, of the sums
};

// The weights that each step of a pass fetches into a cache: none, the same inputs of other outputs, or the next lines
// of one stream.
enum Fetched { kNothing, kOfOutputs, kAhead };
constexpr int kFarLines = kWidth == 16 ? 2 : 1;  // lines of the stream that a step fetches
constexpr int kLine = 16;                        // floats in a cache line

// Distance, in weights of an output, between the first weights of two vectors of lanes.
template <typename W>
constexpr int kApart = sizeof(W) == 2 ? 2 * kWidth : kWidth;

// Adds the products of n inputs, a multiple of kStep, to V vectors of the lanes of R rows by O outputs. Reads the lanes
// at `from` and writes them at `to`. Outputs are w_stride weights apart, and the steps of an output Step weights.
// Fetches the weights at `near` into the L1 cache, and those at `far` into L2. The pass fetches them itself: if another
// function did, GCC 12 would move sums out of the registers.
template <int R, int O, int V, typename W, Fetched Fetch = kNothing, int Step = kStep>
inline void pass(const float* x, int64_t x_step, const W* w, int64_t w_stride, int64_t n,
                                    const float* from, float* to, const W* near = nullptr, const W* far = nullptr) {
  constexpr int kLineWeights = 64 / sizeof(W);
  Floats s[R][O][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) s[r][o][v] = load(from + (r * O + o) * kLanes + v * kWidth);
    }
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i += kStep, x += x_step, w += Step) {
    if (Fetch == kAhead) {
#pragma GCC unroll 2
      for (int line = 0; line < kFarLines; ++line, far += kLineWeights) {
        _mm_prefetch(reinterpret_cast<const char*>(far), _MM_HINT_T1);
      }
    }
    if (Fetch == kOfOutputs) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
        for (int line = 0; line < kStep; line += kLineWeights) {
          _mm_prefetch(reinterpret_cast<const char*>(near + o * w_stride + i + line), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(far + o * w_stride + i + line), _MM_HINT_T1);
        }
      }
    }
    step<R, O, V>(x, w, w_stride, s);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(to + (r * O + o) * kLanes + v * kWidth, s[r][o][v]);
    }
  }
}

alignas(64) constexpr float zeros[kSumsFilled * kLanes] = {};

// Adds the products of the last inputs, fewer than a step, to `lanes`. Never inlined, because GCC 12 would store all
// sums twice before it.
template <int R, int O, typename W>
[[gnu::noinline]] void rest(const float* x, const W* w, int64_t w_stride, int64_t inputs, float* lanes) {
  constexpr int V = R * O * kVectors <= kSums ? kVectors : 1;
  W filled[O * kStep] = {};
  for (int o = 0; o < O; ++o) std::memcpy(filled + o * kStep, w + o * w_stride, inputs * sizeof *w);
  for (int v = 0; v < kVectors; v += V) {
    float* const at = lanes + v * kWidth;
    pass<R, O, V>(x + v * kWidth, 0, filled + v * kApart<W>, kStep, kStep, at, at);
  }
}

// Adds the products of a strip of inputs to the lanes of R rows by O outputs. The last strip puts the sums in y. If the
// registers hold only one of the two vectors of lanes, the strip is read twice. To read lines again from L1 costs less
// than to move sums out of the registers.
template <int R, int O, typename W>
void group(const Strip& strip, const float* x, const W* w, const W* near, const W* far, float* lanes,
           const Places& places, float* y) {
  static_assert(R * O <= kSums);
  constexpr int V = R * O * kVectors <= kSums ? kVectors : 1;
  alignas(64) float last[kSumsFilled * kLanes];
  const int64_t left = strip.inputs % kStep, whole = strip.inputs - left;
  const float* from = strip.begin ? zeros : lanes;
  float* const to = strip.end ? last : lanes;
  pass<R, O, V, W, kOfOutputs>(x, strip.x_step, w, strip.w_stride, whole, from, to, near, far);
  if (V < kVectors) {
    pass<R, O, V>(x + kWidth, strip.x_step, w + kApart<W>, strip.w_stride, whole, from + kWidth, to + kWidth);
  }
  if (left) rest<R, O>(x + whole / kStep * strip.x_step, w + whole, strip.w_stride, left, to);
  if (strip.end) add_lanes(last, places, R * O, y);
}

template <typename W>
using Group = decltype(&group<1, 1, W>);

// Returns `group` for this number of rows and O outputs; null if the group would have more than kSums sums.
template <typename W, int O, int R = kAlone>
Group<W> group_of(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return group_of<W, O, R - 1>(rows);
  }
  if constexpr (R * O <= kSums) return group<R, O, W>;
  return nullptr;
}

#if !defined(__AVX512BF16__)

// `group` for WideDots: the weights are float32, and O outputs have the layout of a block's rows. Each step fetches the
// next lines of `far` into the L2 cache.
template <int R, int O>
void wide_group(const Strip& strip, const float* x, const float* w, const float* far, float* lanes, const Places& places,
                float* y) {
  static_assert(R * O <= kSums);
  alignas(64) float last[kSumsFilled * kLanes];
  const float* from = strip.begin ? zeros : lanes;
  float* const to = strip.end ? last : lanes;
  for (int v = 0; v < kLanes; v += kWidth) {
    pass<R, O, 1, float, kAhead, O * kStep>(x + v, strip.x_step, w + v, kStep, strip.inputs, from + v, to + v, nullptr, far);
    far += strip.inputs / kStep * kFarLines * kLine;
  }
  if (strip.end) add_lanes(last, places, R * O, y);
}

using WideGroup = decltype(&wide_group<1, 1>);

template <int O, int R = kWideBlock>
WideGroup wide_group_of(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return wide_group_of<O, R - 1>(rows);
  }
  return wide_group<R, O>;
}

#endif

}  // namespace
}  // namespace genarm
