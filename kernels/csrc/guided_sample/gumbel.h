// Gumbel noise; kernels/ops/philox.py is the specification. Only for files that are compiled once per instruction set,
// like common/simd.h.
#pragma once

#include <initializer_list>

#include "common/simd.h"

namespace genarm {
namespace {

typedef int32_t Integers __attribute__((vector_size(kWidth * 4)));
typedef uint64_t Longs __attribute__((vector_size(kWidth * 4)));

// Products of b and the low halves of 64-bit lanes. The high halves may hold anything.
inline Longs multiply(Longs a, uint32_t b) {
  const Longs splat = Longs{} + b;
#if defined(__AVX512F__)
  return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(splat)));
#elif defined(__AVX2__)
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(splat)));
#elif defined(__SSE2__)
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(splat)));
#else
  return (a & 0xffffffffu) * splat;
#endif
}

// The first output word of Philox 4x32-10 for the counters (index, position, level, 0), in the low half of each lane.
inline Longs philox(Longs index, uint32_t position, uint32_t level, uint64_t seed) {
  Longs c0 = index, c1 = Longs{} + position, c2 = Longs{} + level, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Longs product0 = multiply(c0, 0xD2511F53u), product1 = multiply(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ (Longs{} + k0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ (Longs{} + k1);
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// log(x) for normal x > 0, within 1 ulp (Cephes logf).
inline Floats log_positive(Floats x) {
  const Words bits = reinterpret_cast<Words>(x) - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
  const Floats e = __builtin_convertvector(reinterpret_cast<Integers>(bits) >> 23, Floats);
  const Floats m = reinterpret_cast<Floats>((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  Floats p = splat(7.0376836292e-2f);
  for (float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                            -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = fma(p, m, splat(coefficient));
  }
  const Floats square = m * m;
  const Floats y = fma(e, splat(-2.12194440e-4f), p * m * square) - 0.5f * square;
  return fma(e, splat(0.693359375f), m + y);
}

void gumbel(uint64_t seed, uint32_t level, uint32_t position, uint32_t first, int n, float* out) {
  Longs even;
  for (int lane = 0; lane < kWidth / 2; ++lane) even[lane] = first + 2 * static_cast<uint32_t>(lane);
  for (int i = 0; i < n; i += kWidth, even += kWidth) {
    const Longs low = philox(even, position, level, seed), high = philox(even + 1, position, level, seed);
    const Words bits = reinterpret_cast<Words>((low & 0xffffffffu) | (high << 32));
    const Floats u = (__builtin_convertvector(bits, Floats) + 0.5f) * 0x1p-32f;
    store(out + i, u < 1.f - 0x1p-24f ? u : splat(1.f - 0x1p-24f));
  }
  // A separate loop keeps more iterations of these long dependency chains in flight.
  for (int i = 0; i < n; i += kWidth) {
    const Floats u = load(out + i), w = 1.f - u;
    const auto tiny = w == 1.f;
    const Floats exponential = -log_positive(w) * u / (tiny ? splat(1.f) : 1.f - w);
    store(out + i, -log_positive(tiny ? u : exponential));
  }
}

}  // namespace
}  // namespace genarm
