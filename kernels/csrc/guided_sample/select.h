// Thresholds of top-k and top-p, found by pivoting instead of a sort.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "loops.h"

namespace genarm {

struct ScoredRow {  // the combined scores of one row, padded with -inf to whole lanes
  const float* scores;
  const float* tile_peaks;  // [tiles]
  const float* lane_peaks;  // [tiles · kLanes]
  int64_t vocab, tiles;
};

// Fills `out` with the row's scores >= lowest. Tiles whose peak is below `lowest` are not read.
inline void gather_above(const ScoredRow& row, float lowest, std::vector<float>& out) {
  out.clear();
  for (int64_t t = 0; t < row.tiles; ++t) {
    if (!(row.tile_peaks[t] >= lowest)) continue;
    const float* x = row.scores + t * kTile;
    const int64_t n = std::min<int64_t>(kTile, row.vocab - t * kTile);
    size_t kept = out.size();
    out.resize(kept + n);
    for (int64_t i = 0; i < n; ++i) {  // without a branch, because it could not be predicted
      out[kept] = x[i];
      kept += x[i] >= lowest;
    }
    out.resize(kept);
  }
}

// The k-th largest score, 1 <= k <= vocab. The k-th largest lane peak is a lower bound, and about k scores reach it.
inline float kth_score(const ScoredRow& row, int64_t k, std::vector<float>& scratch) {
  float bound = -INFINITY;
  if (k <= row.tiles * kLanes) {
    scratch.assign(row.lane_peaks, row.lane_peaks + row.tiles * kLanes);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
    bound = scratch[k - 1];
  }
  gather_above(row, bound, scratch);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
  return scratch[k - 1];
}

// The largest value v with Σ mass over {value >= v} >= target > 0, or the smallest value if rounding leaves no such v.
inline float mass_threshold(std::vector<float>& value, std::vector<float>& mass, double target) {
  std::vector<float> lower_value(value.size()), lower_mass(value.size());
  size_t n = value.size();
  double above = 0;  // mass of the values that are known to be kept
  for (;;) {
    float sample[9];
    for (size_t i = 0; i < 9; ++i) sample[i] = value[i * (n - 1) / 8];
    std::nth_element(sample, sample + 4, sample + 9);
    const float pivot = sample[4];
    size_t larger = 0, smaller = 0;
    double larger_mass = 0, equal_mass = 0;
    for (size_t i = 0; i < n; ++i) {
      const float v = value[i], m = mass[i];
      larger_mass += v > pivot ? m : 0.f;
      equal_mass += v == pivot ? m : 0.f;
      lower_value[smaller] = v, lower_mass[smaller] = m;
      smaller += v < pivot;
      value[larger] = v, mass[larger] = m;
      larger += v > pivot;
    }
    if (above + larger_mass >= target && larger > 0) {
      n = larger;
    } else if (above + larger_mass + equal_mass >= target || smaller == 0) {
      return pivot;
    } else {
      above += larger_mass + equal_mass;
      n = smaller;
      std::swap(value, lower_value);
      std::swap(mass, lower_mass);
    }
  }
}

}  // namespace genarm
