// One step of the innermost loop of small_linear: the products of 32 inputs of a few rows and a few outputs, added to
// sums in registers. Only for files that are compiled once per instruction set, AVX2 at least.
//
// A pair of bfloat16 takes two fused multiply-adds (FMA), or one vdpbf16ps. Both give the same bits if subnormal
// numbers count as zeros. vdpbf16ps is twice as fast on a Zen 4 and half as fast on an Emerald Rapids: 43 billion
// products a second there, and 89 with FMA, or 79 with FMA and the conversions for 8 rows. module.cpp chooses between
// them.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "loops.h"

namespace genarm {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kLanes / kWidth;      // vectors that hold the 16 lanes of a sum
constexpr int kSums = kWidth == 16 ? 16 : 12;  // most sums of a group: rows times outputs
constexpr int kRows = kWidth == 16 ? 8 : 4;    // most rows in a block, if there are several blocks
constexpr int kAlone = kWidth == 16 ? 8 : 6;   // most rows in a block that is the only one

// Sets, while the object lives, whether this thread reads and writes numbers below 2^-126 as zeros. Weights of bfloat16
// need zeros, since vdpbf16ps always flushes. Float32 keeps such numbers, whatever the calling thread has set, because
// helper threads do not have the caller's setting.
class Subnormals {
 public:
  explicit Subnormals(bool flush) : before_(_mm_getcsr()) { _mm_setcsr(flush ? before_ | kFlush : before_ & ~kFlush); }
  ~Subnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlush = 0x8040;
  const unsigned before_;
};

inline Floats odd(Words pairs) { return reinterpret_cast<Floats>(pairs & 0xffff0000u); }
inline Floats even(Words pairs) { return reinterpret_cast<Floats>(pairs << 16); }

#if defined(__AVX512BF16__)

constexpr int kSlots = kStep / 2;  // floats that a step takes in a spread row: its 32 inputs stay pairs of bfloat16

template <int R, int O, int V>
inline void step(const float* x, const uint16_t* w, int64_t w_stride, Floats (&s)[R][O][V]) {
  static_assert(V == 1);
  Words weights[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) weights[o] = load_as<Words>(w + o * w_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Words input = load_as<Words>(x + r * kSlots);
    asm("" : "+v"(input));  // forces a single load of the input for all outputs
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      s[r][o][0] = _mm512_dpbf16_ps(s[r][o][0], reinterpret_cast<__m512bh>(weights[o]), reinterpret_cast<__m512bh>(input));
    }
  }
}

#else

constexpr int kSlots = kStep;

// Loads vector v of one half of an output's 32 weights as floats. Half 0 has, for bfloat16, the weights at odd places
// and, for float32, the first 16. Half 1 has the others.
inline Floats weight(const uint16_t* w, int v, int half) {
  const Words pairs = load_as<Words>(w + v * 2 * kWidth);
  return half == 0 ? odd(pairs) : even(pairs);
}
inline Floats weight(const float* w, int v, int half) { return load(w + half * kLanes + v * kWidth); }

// Adds the products of 32 inputs to V vectors of the lanes of each sum.
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
        asm("" : "+v"(input));  // forces a single load of the input for all outputs
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) s[r][o][v] = fma(weights[o], input, s[r][o][v]);
      }
    }
  }
}

#endif

#if !defined(__AVX512F__)

// `step` of 4 rows and 3 outputs in assembly. The sums, weights and input fill all 16 registers, and GCC 12 would move
// sums to the stack and back.
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
  alignas(32) static constexpr uint32_t odd_half[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                       0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
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
inline void step<4, 3, 1>(const float* x, const float* w, int64_t w_stride, Floats (&s)[4][3][1]) {
  asm("vmovups (%[w]), %%ymm12\n"
      "vmovups (%[w],%[stride],4), %%ymm13\n"
      "vmovups (%[w],%[stride],8), %%ymm14\n"
      GENARM_ODD
      "vmovups 64(%[w]), %%ymm12\n"
      "vmovups 64(%[w],%[stride],4), %%ymm13\n"
      "vmovups 64(%[w],%[stride],8), %%ymm14\n"
      GENARM_EVEN
      : GENARM_SUMS
      : [x] "r"(x), [w] "r"(w), [stride] "r"(w_stride)
      : GENARM_USED);
}

#undef GENARM_ROW
#undef GENARM_ODD
#undef GENARM_EVEN
#undef GENARM_SUMS
#undef GENARM_USED

#endif

}  // namespace
}  // namespace genarm
