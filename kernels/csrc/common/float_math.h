// Scalar functions for loops that the compiler vectorises. Only for files that are compiled once per instruction set:
// the anonymous namespace keeps the code of different instruction sets apart.
#pragma once

#include <cstdint>
#include <cstring>

namespace genarm {
namespace {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float as_float32(float x) { return x; }
inline float as_float32(uint16_t bf16) { return as_float(static_cast<uint32_t>(bf16) << 16); }

inline void put(float* out, float x) { *out = x; }
inline void put(uint16_t* out, float x) {  // round to nearest even
  const uint32_t bits = as_bits(x);
  *out = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^max(y, -126) for y <= 0, with a relative error of 1e-7. A masked value adds 1e-38 to sums that are at least 1.
inline float exp2_negative(float y) {
  constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it leaves round(y) in the low bits
  float clamped = y < -126.f ? -126.f : y;
  float shifted = clamped + kRound;
  float f = clamped - (shifted - kRound);  // in [-1/2, 1/2]; minimax polynomial of degree 6 (Cephes exp2f)
  float p = 1.535336188319500e-4f;
  p = fma(p, f, 1.339887440266574e-3f);
  p = fma(p, f, 9.618437357674640e-3f);
  p = fma(p, f, 5.550332471162809e-2f);
  p = fma(p, f, 2.402264791363012e-1f);
  p = fma(p, f, 6.931472028550421e-1f);
  p = fma(p, f, 1.f);
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

}  // namespace
}  // namespace genarm
