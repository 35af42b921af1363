// The innermost loop of small_linear: products of a few rows and a few outputs, held in registers. Only for files that
// are compiled once per instruction set, AVX2 at least.
//
// Two fused multiply-adds per pair of bfloat16, not one vdpbf16ps: that has half their rate (Emerald Rapids: 43
// billion products a second, 89 with FMA; 79 with the conversions for 8 rows), and flushes subnormal numbers.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "loops.h"

namespace genarm {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kLanes / kWidth;  // in the lanes of a sum
constexpr int kSums = kWidth == 16 ? 16 : 12;  // of a group at most: rows by outputs
constexpr int kRows = kWidth == 16 ? 8 : 4;    // of a group at most

inline Floats odd(Words pairs) { return reinterpret_cast<Floats>(pairs & 0xffff0000u); }
inline Floats even(Words pairs) { return reinterpret_cast<Floats>(pairs << 16); }

// The products of 32 inputs, those of V vectors of lanes. The fewer of rows and outputs are held in registers, the others
// pass through one.
template <int R, int O, int V>
inline void step(const float* x, const uint16_t* w, int64_t w_stride, Floats (&s)[R][O][V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto weight = [&](int o) {
        const Words pairs = load_as<Words>(w + o * w_stride + v * 2 * kWidth);
        return half == 0 ? odd(pairs) : even(pairs);
      };
      const auto input = [&](int r) {
        Floats found = load(x + r * kStep + half * kLanes + v * kWidth);
        asm("" : "+v"(found));  // one load for all outputs
        return found;
      };
      if constexpr (R < O) {
        Floats inputs[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) inputs[r] = input(r);
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          const Floats passing = weight(o);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) s[r][o][v] = fma(passing, inputs[r], s[r][o][v]);
        }
      } else {
        Floats weights[O];
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) weights[o] = weight(o);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Floats passing = input(r);
#pragma GCC unroll 8
          for (int o = 0; o < O; ++o) s[r][o][v] = fma(weights[o], passing, s[r][o][v]);
        }
      }
    }
  }
}

constexpr int kSumsFilled = 16;  // with those that fill up the last vectors

struct Places {
  alignas(64) int of[kSumsFilled];  // in y, of each sum of a group
};

// Σ of the 16 lanes of each sum, `count` of them to their places: a transposition that adds on the way.
// In registers: what is stored in whole vectors and read back in halves, or the other way round, waits for the cache.
#if defined(__AVX512F__)

inline void add_lanes(const Floats (&s)[kSumsFilled][kVectors], const Places& places, int count, float* y) {
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
  const auto quarter = [&](int e) { return fold4(fold8(s[e][0], s[e + 4][0]), fold8(s[e + 8][0], s[e + 12][0])); };
  const __m512 sum = fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3)));
  _mm512_mask_i32scatter_ps(y, (1u << count) - 1, _mm512_load_si512(places.of), sum, 4);
}

#else

inline void add_lanes(const Floats (&s)[kSumsFilled][kVectors], const Places& places, int count, float* y) {
  float sums[kSumsFilled];
  const auto fold8 = [&](int e) { return s[e][0] + s[e][1]; };
  const auto fold4 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto fold2 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  };
#pragma GCC unroll 2
  for (int first = 0; first < count; first += 8) {
    const auto quarter = [&](int e) { return fold4(fold8(first + e), fold8(first + 4 + e)); };
    store(sums + first, fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3))));
  }
  for (int i = 0; i < count; ++i) y[places.of[i]] = sums[i];
}

#endif

struct Strip {
  int64_t x_step, w_stride;
  int64_t inputs;
  bool begin, end;  // of the sums
};

// Adds the products of a strip of inputs to the lanes of R rows by O outputs, and at the end puts their sums in y.
// Fetches the weights at `near` into the L1 cache, those at `far` into L2. Where the registers hold one vector of the
// lanes only, the strip passes twice: sums that leave the registers cost more than lines that are read again from L1.
template <int R, int O>
void group(const Strip& strip, const float* x, const uint16_t* w, const uint16_t* near, const uint16_t* far,
           float* lanes, const Places& places, float* y) {
  static_assert(R * O <= kSums);
  constexpr int V = R * O * kVectors <= kSums ? kVectors : 1;
  const int64_t x_step = strip.x_step, w_stride = strip.w_stride, n = strip.inputs;
  Floats flat[kSumsFilled][kVectors];
#pragma GCC unroll 1
  for (int pass = 0; pass < kVectors; pass += V) {
    const auto at = [&](int r, int o, int v) { return lanes + (r * O + o) * kLanes + (pass + v) * kWidth; };
    const float* inputs = x + pass * kWidth;
    const uint16_t* weights = w + pass * 2 * kWidth;
    Floats s[R][O][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) s[r][o][v] = strip.begin ? Floats{} : load(at(r, o, v));
      }
    }
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep, inputs += x_step) {
      if (pass == 0) {
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          _mm_prefetch(reinterpret_cast<const char*>(near + o * w_stride + i), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(far + o * w_stride + i), _MM_HINT_T1);
        }
      }
      step<R, O, V>(inputs, weights + i, w_stride, s);
    }
    if (i < n) {
      uint16_t tail[O * kStep] = {};
      for (int o = 0; o < O; ++o) std::memcpy(tail + o * kStep, w + o * w_stride + i, (n - i) * sizeof *w);
      step<R, O, V>(inputs, tail + pass * 2 * kWidth, kStep, s);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          if (strip.end) flat[r * O + o][pass + v] = s[r][o][v];
          else store(at(r, o, v), s[r][o][v]);
        }
      }
    }
  }
  if (!strip.end) return;
#pragma GCC unroll 16
  for (int sum = R * O; sum < kSumsFilled; ++sum) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) flat[sum][v] = Floats{};
  }
  add_lanes(flat, places, R * O, y);
}

using Group = decltype(&group<1, 1>);

// That of so many rows.
template <int O, int R = kRows>
Group group_of(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return group_of<O, R - 1>(rows);
  }
  if constexpr (R * O <= kSums) return group<R, O>;
  return nullptr;
}

}  // namespace
}  // namespace genarm
