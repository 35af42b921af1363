// The innermost loop of quant_linear: whole numbers of 16 bits times codes of 8 or 4 bits. Only for files that are
// compiled once per instruction set.
//
// A vector has one dword for each output, and a pair of 16-bit inputs is broadcast to all of them. So no sum goes
// across a vector, and all rows share the instructions that unpack codes. Codes of 8 bits are stored plus 128. That
// unpacks with one shift instead of three, and sums begin at -128 Σ inputs. A sum over 32 inputs is below 2^29, so it
// is exact in any order. Inputs have 16 bits, because vpmaddwd takes no longer with them than vpmaddubsw with 8 bits,
// whose sums have to be widened.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/float_math.h"
#include "grid.h"
#include "loops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace genarm {
namespace {

#if defined(__AVX512F__)

constexpr int kOutputsAtOnce = 16;
using Ints = __m512i;
using Reals = __m512;
inline Ints ints(const void* p) { return _mm512_load_si512(p); }
inline Ints broadcast(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
#if defined(__AVX512VNNI__)
inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
template <int N> inline Ints right(Ints v) { return _mm512_srli_epi16(v, N); }
inline Ints low_byte(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi16(255)); }
inline Ints low_nibble(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi16(15)); }
inline Reals reals(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Reals no_reals() { return _mm512_setzero_ps(); }
inline Reals halves(const void* p) { return _mm512_cvtph_ps(_mm256_load_si256(static_cast<const __m256i*>(p))); }
inline Reals splat_real(float x) { return _mm512_set1_ps(x); }
inline Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
inline void put_reals(float* p, Reals v) { _mm512_storeu_ps(p, v); }
constexpr int together(int rows) { return rows <= 4 ? 2 : 1; }  // vectors of outputs in one pass over the inputs

#elif defined(__AVX2__)

constexpr int kOutputsAtOnce = 8;
using Ints = __m256i;
using Reals = __m256;
inline Ints ints(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline Ints broadcast(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm256_set1_epi32(pair);
}
inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
template <int N> inline Ints right(Ints v) { return _mm256_srli_epi16(v, N); }
inline Ints low_byte(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
inline Ints low_nibble(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi16(15)); }
inline Reals reals(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Reals no_reals() { return _mm256_setzero_ps(); }
inline Reals halves(const void* p) { return _mm256_cvtph_ps(_mm_load_si128(static_cast<const __m128i*>(p))); }
inline Reals splat_real(float x) { return _mm256_set1_ps(x); }
inline Reals times(Reals a, Reals b) { return _mm256_mul_ps(a, b); }
inline Reals fused(Reals a, Reals b, Reals c) { return _mm256_fmadd_ps(a, b, c); }
inline void put_reals(float* p, Reals v) { _mm256_storeu_ps(p, v); }
// Vectors of outputs in one pass over the inputs: at most 8 sums of the 16 registers.
constexpr int together(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

#endif

#if defined(__AVX2__)

// Adds the products of one step, 4 or 8 inputs, to the sums of R rows by P vectors of outputs.
template <int Bits, int R, int P>
inline void step(const uint8_t* w, const int16_t* x, Ints (&sums)[P][R]) {
  constexpr int kPairs = Bits == 8 ? 2 : 4;
  Ints codes[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) codes[p] = ints(w + p * kOutputsAtOnce * 4);
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    Ints wide[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (Bits == 8) wide[p] = pair == 0 ? low_byte(codes[p]) : right<8>(codes[p]);
      else if (pair == 0) wide[p] = low_nibble(codes[p]);
      else if (pair == 1) wide[p] = low_nibble(right<4>(codes[p]));
      else if (pair == 2) wide[p] = low_nibble(right<8>(codes[p]));
      else wide[p] = right<12>(codes[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Ints inputs = broadcast(x + r * kGroup + 2 * pair);
      asm("" : "+v"(inputs));  // makes GCC load the inputs once for all outputs
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[p][r] = add_products(sums[p][r], wide[p], inputs);
        asm("" : "+v"(sums[p][r]));  // keeps GCC 12 from storing all products of a group until its end
      }
    }
  }
}

template <int Bits, int R>
void tile(const uint8_t* w, const uint8_t* next, int64_t groups, const QuantRows& rows, float* y) {
  constexpr int P = together(R), kSteps = Bits, kVectors = kTileOutputs / kOutputsAtOnce;
  constexpr int64_t kBytes = group_bytes(Bits);
  static_assert(Bits == 8 || Bits == 4);
  Reals totals[kVectors][R];
#pragma GCC unroll 4
  for (auto& of_vector : totals) {
#pragma GCC unroll 8
    for (Reals& total : of_vector) total = no_reals();
  }
  const int16_t* x = rows.codes;
  const float *scales = rows.scales, *input_sums = rows.sums;
  const int32_t* starts = rows.starts;
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 20
    for (int64_t line = 0; line < kBytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T0);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += P) {
      Ints sums[P][R];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[p][r] = Bits == 8 ? broadcast(starts + r) : Ints{};
      }
#pragma GCC unroll 1
      for (int s = 0; s < kSteps; ++s) {
        step<Bits, R, P>(w + s * kStepBytes + v * kOutputsAtOnce * 4, x + s * (kGroup / kSteps), sums);
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* parts = w + kSteps * kStepBytes + (v + p) * kOutputsAtOnce * 2;
        const Reals scale = halves(parts);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Reals& total = totals[v + p][r];
          total = fused(reals(sums[p][r]), times(scale, splat_real(scales[r])), total);
        }
        if (Bits == 4) {
          const Reals minimum = halves(parts + 2 * kTileOutputs);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            totals[v + p][r] = fused(splat_real(input_sums[r]), minimum, totals[v + p][r]);
          }
        }
      }
    }
    w += kBytes, next += kBytes, x += R * kGroup, scales += R, input_sums += R, starts += R;
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int r = 0; r < R; ++r) put_reals(y + r * kTileOutputs + v * kOutputsAtOnce, totals[v][r]);
  }
}

#else

template <int Bits, int R>
void tile(const uint8_t* w, const uint8_t*, int64_t groups, const QuantRows& rows, float* y) {
  constexpr int kSteps = Bits, kPerStep = kGroup / kSteps, kPairs = kPerStep / 2;
  std::memset(y, 0, sizeof *y * R * kTileOutputs);
  for (int64_t g = 0; g < groups; ++g, w += group_bytes(Bits)) {
    uint16_t halves[2 * kTileOutputs] = {};
    std::memcpy(halves, w + kSteps * kStepBytes, group_bytes(Bits) - kSteps * kStepBytes);
    for (int r = 0; r < R; ++r) {
      const int16_t* x = rows.codes + (g * R + r) * kGroup;
      const float scale = rows.scales[g * R + r], input_sum = rows.sums[g * R + r];
      int32_t sums[kTileOutputs];
      std::fill_n(sums, kTileOutputs, Bits == 8 ? rows.starts[g * R + r] : 0);
      for (int s = 0; s < kSteps; ++s, x += kPerStep) {
        uint32_t codes[kTileOutputs];
        std::memcpy(codes, w + s * kStepBytes, sizeof codes);
        for (int pair = 0; pair < kPairs; ++pair) {
          const int32_t first = x[2 * pair], second = x[2 * pair + 1];
#pragma omp simd
          for (int o = 0; o < kTileOutputs; ++o) {
            const uint32_t low = codes[o] >> (Bits * pair), high = low >> 16, mask = (1 << Bits) - 1;
            sums[o] += static_cast<int32_t>(low & mask) * first + static_cast<int32_t>(high & mask) * second;
          }
        }
      }
      // The C library's fmaf serves if the processor has none. It is slow, but exact.
      for (int o = 0; o < kTileOutputs; ++o) {
        float& total = y[r * kTileOutputs + o];
        total = __builtin_fmaf(static_cast<float>(sums[o]), of_half(halves[o]) * scale, total);
        if (Bits == 4) total = __builtin_fmaf(input_sum, of_half(halves[kTileOutputs + o]), total);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace genarm
