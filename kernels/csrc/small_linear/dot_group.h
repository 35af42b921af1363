// The innermost loop of small_linear: products of a few rows and a few outputs, held in registers. Only for files that
// are compiled once per instruction set, AVX2 at least.
//
// A pair of bfloat16 takes two fused multiply-adds, or one vdpbf16ps, which has the same bits where subnormal numbers
// count as zeros. That is twice as fast on a Zen 4 and half as fast on an Emerald Rapids (43 billion products a second,
// 89 with FMA; 79 with the conversions for 8 rows): module.cpp chooses.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "loops.h"

namespace genarm {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kLanes / kWidth;  // in the lanes of a sum
constexpr int kSums = kWidth == 16 ? 16 : 12;  // of a group at most: rows by outputs
constexpr int kRows = kWidth == 16 ? 8 : 4;    // of a group, where there are many
constexpr int kAlone = kWidth == 16 ? 8 : 6;   // of a group, where these are all

// Numbers below 2^-126 count as zeros meanwhile, read and written: vdpbf16ps knows no others.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

inline Floats odd(Words pairs) { return reinterpret_cast<Floats>(pairs & 0xffff0000u); }
inline Floats even(Words pairs) { return reinterpret_cast<Floats>(pairs << 16); }

#if defined(__AVX512BF16__)

constexpr int kSlots = kStep / 2;  // a row's inputs stay pairs, in the memory of half as many floats

template <int R, int O, int V>
inline void step(const float* x, const uint16_t* w, int64_t w_stride, Floats (&s)[R][O][V]) {
  static_assert(V == 1);
  Words weights[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) weights[o] = load_as<Words>(w + o * w_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Words input = load_as<Words>(x + r * kSlots);
    asm("" : "+v"(input));  // one load for all outputs
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      s[r][o][0] = _mm512_dpbf16_ps(s[r][o][0], reinterpret_cast<__m512bh>(weights[o]), reinterpret_cast<__m512bh>(input));
    }
  }
}

#else

constexpr int kSlots = kStep;

// A vector of an output's 32 inputs, those at odd places or at even ones.
inline Floats weight(const uint16_t* w, int v, int half) {
  const Words pairs = load_as<Words>(w + v * 2 * kWidth);
  return half == 0 ? odd(pairs) : even(pairs);
}
inline Floats weight(const float* w, int v, int half) { return load(w + half * kLanes + v * kWidth); }

// The products of 32 inputs, those of V vectors of lanes.
template <int R, int O, int V, typename W>
inline void step(const float* x, const W* w, int64_t w_stride, Floats (&s)[R][O][V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Floats weights[O];
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) weights[o] = weight(w + o * w_stride, v, half);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Floats input = load(x + r * kSlots + half * kLanes + v * kWidth);
        asm("" : "+v"(input));  // one load for all outputs
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) s[r][o][v] = fma(weights[o], input, s[r][o][v]);
      }
    }
  }
}

#endif

#if !defined(__AVX512F__)

// The same, where sums, weights and input fill all 16 registers: GCC 12 moves sums to the stack and back.
#define GENARM_ROW(at, a, b, c)                       \
  "vmovups " at "(%[x]), %%ymm15\n"                   \
  "vfmadd231ps %%ymm12, %%ymm15, %[" a "]\n"          \
  "vfmadd231ps %%ymm13, %%ymm15, %[" b "]\n"          \
  "vfmadd231ps %%ymm14, %%ymm15, %[" c "]\n"
#define GENARM_ODD                                                             \
  GENARM_ROW("0", "a0", "a1", "a2") GENARM_ROW("128", "b0", "b1", "b2")        \
  GENARM_ROW("256", "c0", "c1", "c2") GENARM_ROW("384", "d0", "d1", "d2")
#define GENARM_EVEN                                                            \
  GENARM_ROW("64", "a0", "a1", "a2") GENARM_ROW("192", "b0", "b1", "b2")       \
  GENARM_ROW("320", "c0", "c1", "c2") GENARM_ROW("448", "d0", "d1", "d2")
#define GENARM_SUMS                                                                         \
  [a0] "+x"(s[0][0][0]), [a1] "+x"(s[0][1][0]), [a2] "+x"(s[0][2][0]),                      \
  [b0] "+x"(s[1][0][0]), [b1] "+x"(s[1][1][0]), [b2] "+x"(s[1][2][0]),                      \
  [c0] "+x"(s[2][0][0]), [c1] "+x"(s[2][1][0]), [c2] "+x"(s[2][2][0]),                      \
  [d0] "+x"(s[3][0][0]), [d1] "+x"(s[3][1][0]), [d2] "+x"(s[3][2][0])
#define GENARM_USED "xmm12", "xmm13", "xmm14", "xmm15", "memory"

template <>
inline void step<4, 3, 1>(const float* x, const uint16_t* w, int64_t w_stride, Floats (&s)[4][3][1]) {
  alignas(32) static constexpr uint32_t odd_half[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  asm("vmovaps %[odd], %%ymm15\n"
      "vpand (%[w]), %%ymm15, %%ymm12\n"
      "vpand (%[w],%[stride],2), %%ymm15, %%ymm13\n"
      "vpand (%[w],%[stride],4), %%ymm15, %%ymm14\n"
      GENARM_ODD
      "vmovdqu (%[w]), %%ymm12\n"
      "vmovdqu (%[w],%[stride],2), %%ymm13\n"
      "vmovdqu (%[w],%[stride],4), %%ymm14\n"
      "vpslld $16, %%ymm12, %%ymm12\n"
      "vpslld $16, %%ymm13, %%ymm13\n"
      "vpslld $16, %%ymm14, %%ymm14\n"
      GENARM_EVEN
      : GENARM_SUMS
      : [x] "r"(x), [w] "r"(w), [stride] "r"(w_stride), [odd] "m"(odd_half)
      : GENARM_USED);
}

template <>
inline void step<4, 3, 1>(const float* x, const float* w, int64_t, Floats (&s)[4][3][1]) {
  static_assert(kStep == 32);
  asm("vmovups 0(%[w]), %%ymm12\n"
      "vmovups 128(%[w]), %%ymm13\n"
      "vmovups 256(%[w]), %%ymm14\n"
      GENARM_ODD
      "vmovups 64(%[w]), %%ymm12\n"
      "vmovups 192(%[w]), %%ymm13\n"
      "vmovups 320(%[w]), %%ymm14\n"
      GENARM_EVEN
      : GENARM_SUMS
      : [x] "r"(x), [w] "r"(w)
      : GENARM_USED);
}

#undef GENARM_ROW
#undef GENARM_ODD
#undef GENARM_EVEN
#undef GENARM_SUMS
#undef GENARM_USED

#endif

constexpr int kSumsFilled = 16;  // with those that fill up the last vectors

struct Places {
  int of[kSumsFilled];  // in y, of each sum of a group
};

// Σ of the 16 lanes of each sum, `count` of them to their places: a transposition that adds on the way.
// In registers: what is stored in whole vectors and read back in halves, or the other way round, waits for the cache.
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

struct Strip {
  int64_t x_step, w_stride;
  int64_t inputs;
  bool begin, end;  // of the sums
};

// Outputs of bfloat16 lie w_stride apart, and their inputs side by side. Those of float32 lie as the rows do, O outputs
// for R rows.
template <int O, typename W>
inline int64_t step_of_weights() { return sizeof(W) == sizeof(float) ? O * kStep : kStep; }

// Adds the products of n inputs, whole steps, to V vectors of the lanes of R rows by O outputs.
// Fetches the weights at `near` into the L1 cache, those at `far` into L2, if there are some. In no other function, so
// that GCC 12 keeps the sums in registers.
template <int R, int O, int V, typename W, bool Fetch = false>
inline void pass(const float* x, int64_t x_step, const W* w, int64_t w_stride, int64_t n,
                                    const float* from, float* to, const W* near = nullptr, const W* far = nullptr) {
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
  for (int64_t i = 0; i < n; i += kStep, x += x_step, w += step_of_weights<O, W>()) {
    if (Fetch) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
        _mm_prefetch(reinterpret_cast<const char*>(near + o * w_stride + i), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(far + o * w_stride + i), _MM_HINT_T1);
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

// Adds those of the last inputs, less than a step, to `lanes`. Never inlined: GCC 12 would store all sums twice before it.
template <int R, int O>
[[gnu::noinline]] void rest(const float* x, const uint16_t* w, int64_t w_stride, int64_t inputs, float* lanes) {
  constexpr int V = R * O * kVectors <= kSums ? kVectors : 1;
  uint16_t filled[O * kStep] = {};
  for (int o = 0; o < O; ++o) std::memcpy(filled + o * kStep, w + o * w_stride, inputs * sizeof *w);
  for (int v = 0; v < kVectors; v += V) {
    float* const at = lanes + v * kWidth;
    pass<R, O, V>(x + v * kWidth, 0, filled + v * 2 * kWidth, kStep, kStep, at, at);
  }
}

// Adds the products of a strip of inputs to the lanes of R rows by O outputs, and at the end puts their sums in y. Where
// the registers hold one vector of the lanes only, the strip passes twice: lines that are read again from L1 cost less
// than sums that leave the registers.
template <int R, int O>
void group(const Strip& strip, const float* x, const uint16_t* w, const uint16_t* near, const uint16_t* far,
           float* lanes, const Places& places, float* y) {
  static_assert(R * O <= kSums);
  constexpr int V = R * O * kVectors <= kSums ? kVectors : 1;
  alignas(64) float last[kSumsFilled * kLanes];
  const int64_t left = strip.inputs % kStep, whole = strip.inputs - left;
  const float* from = strip.begin ? zeros : lanes;
  float* const to = strip.end ? last : lanes;
  pass<R, O, V, uint16_t, true>(x, strip.x_step, w, strip.w_stride, whole, from, to, near, far);
  if (V < kVectors) {
    pass<R, O, V>(x + kWidth, strip.x_step, w + 2 * kWidth, strip.w_stride, whole, from + kWidth, to + kWidth);
  }
  if (left) rest<R, O>(x + whole / kStep * strip.x_step, w + whole, strip.w_stride, left, to);
  if (strip.end) add_lanes(last, places, R * O, y);
}

using Group = decltype(&group<1, 1>);

// That of so many rows.
template <int O, int R = kAlone>
Group group_of(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return group_of<O, R - 1>(rows);
  }
  if constexpr (R * O <= kSums) return group<R, O>;
  return nullptr;
}

#if !defined(__AVX512F__)

// The same over weights of float32, O outputs spread as rows are.
template <int R, int O>
void wide_group(const Strip& strip, const float* x, const float* w, float* lanes, const Places& places, float* y) {
  static_assert(R * O <= kSums);
  alignas(64) float last[kSumsFilled * kLanes];
  const float* from = strip.begin ? zeros : lanes;
  float* const to = strip.end ? last : lanes;
  for (int v = 0; v < kLanes; v += kWidth) {
    pass<R, O, 1>(x + v, strip.x_step, w + v, kStep, strip.inputs, from + v, to + v);
  }
  if (strip.end) add_lanes(last, places, R * O, y);
}

using WideGroup = decltype(&wide_group<1, 1>);

template <int O, int R = kRows>
WideGroup wide_group_of(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return wide_group_of<O, R - 1>(rows);
  }
  return wide_group<R, O>;
}

#endif

}  // namespace
}  // namespace genarm
