// The loops that touch every logit, over one tile. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kTile = 1024;  // part of the random-number contract
constexpr int kLanes = 16;   // every count n below is a multiple of it: ragged tiles are padded with -inf

struct Scan {
  float peak;  // largest value, NaNs aside
  bool bad;    // a NaN or +inf among the values
};

struct PartialSum {
  float ref, sum;  // Σ 2^((x - ref) · scale); a sum that is NaN or +inf says nothing: see log_sums.h
};

struct PeakSum {
  float peak;
  PartialSum part;
};

constexpr float kLog2e = 1.44269504088896340736f;

struct TileLoops {
  const char* name;
  // In one pass over a member's logits z, float32 or bfloat16: out = c + weight · z, or z itself where c is null; the
  // sum, if wanted, is of the member's own probabilities. A sum that is not finite stands for +inf in z as well.
  PartialSum (*add_member_once)(const void* z, bool bf16, int n, const float* c, float weight, bool sum, float* out);
  PeakSum (*peak_sum)(const float* x, int n, float scale);
  // Σ sums · 2^((refs - ref) · scale), ref the largest
  float (*scaled_sum)(const float* refs, const float* sums, int n, float ref, float scale);
  // The loops below work for any values.
  void (*load_bf16)(const uint16_t* source, int n, float* out);
  void (*load_fp16)(const uint16_t* source, int n, float* out);
  Scan (*scan)(const float* x, int n);
  // out = c + weight · z, where a z of -inf adds `hole` instead; the scan is of z
  Scan (*add_member)(const float* c, const float* z, int n, float weight, float hole, float* out);
  void (*add)(const float* a, const float* b, int n, float* out);
  // Σ 2^((x - peak) · scale), peak the largest x; the second only over x >= lowest
  float (*exp_sum)(const float* x, int n, float peak, float scale);
  float (*exp_sum_above)(const float* x, int n, float lowest, float peak, float scale);
  void (*exps)(const float* x, int n, float peak, float scale, float* out);
  // largest x of each lane, so kLanes disjoint groups of n / kLanes values
  void (*lane_peaks)(const float* x, int n, float* out);
  // Gumbel noise of indices first .. first + n - 1 (philox.py is the specification)
  void (*gumbel)(uint64_t seed, uint32_t level, uint32_t position, uint32_t first, int n, float* out);
  // first argmax of (x - peak) · coldness + noise over x >= lowest
  int (*draw)(const float* x, const float* noise, int n, float lowest, float peak, float coldness);
};

extern const TileLoops loops_baseline;
#ifdef GENARM_X86
extern const TileLoops loops_avx2, loops_avx512;
#endif

}  // namespace genarm
