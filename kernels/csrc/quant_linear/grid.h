// Find codes, scale and minimum that give back 32 bfloat16 weights bit for bit. kernels/ops/quant_linear/rounding.py is
// the specification, and tries the same numbers in the same order. Only for files that are compiled once per
// instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/float_math.h"
#include "loops.h"

namespace genarm {
namespace {

constexpr int kNeighbours = 8;  // float16 numbers that are tried on each side of the best fit
constexpr int kMostSteps = 15;  // steps between the lowest and the highest code of 4 bits
constexpr float kWhole = 12582912.f;  // 1.5 · 2^23: a number added to it is rounded to a whole number, ties to even

inline uint16_t half_of(float x) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude >= 0x477ff000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (magnitude < (113u << 23)) return sign | static_cast<uint16_t>(as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
  return sign | static_cast<uint16_t>((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

inline float of_half(uint16_t half) {  // `half` is finite
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const float value = magnitude < (1u << 23) ? as_float(magnitude + (113u << 23)) - as_float(113u << 23)
                                             : as_float(magnitude + (112u << 23));
  return as_float(as_bits(value) | sign);
}

// The float16 number `by` places away from `half`: away from zero if `by` is positive. Never NaN or infinite.
inline uint16_t moved(uint16_t half, int by) {
  return static_cast<uint16_t>((half & 0x8000) | std::clamp((half & 0x7fff) + by, 0, 0x7bff));
}

// A group of wanted bfloat16 values. Every float32 between low and high rounds to the wanted value; low and high
// themselves may round to it or to a neighbour. least and most are the smallest and the largest wanted value.
struct Group {
  alignas(64) float wanted[kGroup], low[kGroup], high[kGroup];
  float least, most;
};

inline void load_group(const uint16_t* w, Group* group) {
  Group& g = *group;
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t bits = static_cast<uint32_t>(w[i]) << 16, magnitude = bits & 0x7fffffff;
    const float far = as_float(magnitude + 0x8000), near = magnitude ? as_float(magnitude - 0x8000) : -far;
    g.wanted[i] = as_float(bits);
    g.low[i] = bits >> 31 && magnitude ? -far : near;
    g.high[i] = bits >> 31 && magnitude ? -near : far;
  }
  float least = g.wanted[0], most = g.wanted[0];
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int i = 0; i < kGroup; ++i) least = std::min(least, g.wanted[i]), most = std::max(most, g.wanted[i]);
  g.least = least, g.most = most;
}

inline bool gives(const Group& g, const float* codes, float scale, float low) {
  int wrong = 0;
#pragma omp simd reduction(| : wrong)
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t bits = as_bits(codes[i] * scale + low);
    wrong |= as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u) != g.wanted[i];
  }
  return !wrong;
}

// Codes: the whole numbers nearest to (wanted - start) / step.
inline void round_codes(const Group& g, float start, float step, float* codes) {
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) codes[i] = ((g.wanted[i] - start) / step + kWhole) - kWhole;
}

inline bool fit_8(const Group& g, float* codes, uint16_t* scale) {
  const uint16_t best = half_of(std::max(std::fabs(g.least), std::fabs(g.most)) / 127);
  for (int place = 0; place <= 2 * kNeighbours; ++place) {
    *scale = moved(best, place & 1 ? -(place + 1) / 2 : place / 2);
    const float step = of_half(*scale);
    round_codes(g, 0, step == 0 ? 1 : step, codes);
    for (int i = 0; i < kGroup; ++i) codes[i] = std::clamp(codes[i], -127.f, 127.f);
    if (gives(g, codes, step, 0)) return true;
  }
  return false;
}

inline bool fit_4(const Group& g, int steps, float* codes, uint16_t* scale, uint16_t* minimum) {
  const float step = (g.most - g.least) / static_cast<float>(steps);
  if (!std::isfinite(step)) return false;
  round_codes(g, steps < 0 ? g.most : g.least, step == 0 ? 1 : step, codes);
  // Fit the scale by least squares. In float64 these sums are exact in any order, unless the group spans 2^40.
  double sum = 0, squares = 0, values = 0, both = 0;
  for (int i = 0; i < kGroup; ++i) {
    const double code = codes[i], value = g.wanted[i];
    sum += code, squares += code * code, values += value, both += code * value;
  }
  const double spread = kGroup * squares - sum * sum;
  const uint16_t best = half_of(static_cast<float>((kGroup * both - sum * values) / (spread == 0 ? 1 : spread)));
  for (int place = 0; place <= 2 * kNeighbours; ++place) {
    *scale = moved(best, place & 1 ? -(place + 1) / 2 : place / 2);
    const float by = of_half(*scale);
    float least = -INFINITY, most = INFINITY;
#pragma omp simd reduction(max : least) reduction(min : most)
    for (int i = 0; i < kGroup; ++i) {
      least = std::max(least, g.low[i] - codes[i] * by), most = std::min(most, g.high[i] - codes[i] * by);
    }
    const uint16_t nearest = half_of((least + most) / 2);
    if ((nearest & 0x7c00) == 0x7c00) continue;
    // Two float16 numbers may be equally near to the middle, both at an end of the range. There a value may round to
    // the neighbour of the wanted bfloat16, so the next numbers are tried too.
    for (int next : {0, 1, -1}) {
      *minimum = moved(nearest, next);
      const float low = of_half(*minimum);
      if ((next == 0 || (least <= low && low <= most)) && gives(g, codes, by, low)) return true;
    }
  }
  return false;
}

// Finds the grid of 32 weights w, and gives int8 codes (8 bits) or uint8 codes (4 bits). False if there is none.
inline bool find_grid(int bits, const uint16_t* w, uint8_t* codes, uint16_t* scale, uint16_t* minimum) {
  Group group;
  alignas(64) float found[kGroup];
  load_group(w, &group);
  bool fits = bits == 8 && fit_8(group, found, scale);
  for (int steps = kMostSteps; bits == 4 && steps > 0 && !fits; --steps) {
    fits = fit_4(group, steps, found, scale, minimum) || fit_4(group, -steps, found, scale, minimum);
  }
  for (int i = 0; i < kGroup && fits; ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(found[i]));
  return fits;
}

}  // namespace
}  // namespace genarm
