// The loops that read every logit of a tile. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kTile = 1024;  // part of the random-number contract
constexpr int kLanes = 16;   // Every count n below is a multiple of it. A shorter tile is padded with -inf.

struct Scan {
  float peak;  // largest value that is not NaN
  bool bad;    // whether any value is NaN or +inf
};

struct PartialSum {
  float ref, sum;  // sum = Σ 2^((x - ref) · scale). NaN or +inf means that the sum is not known: see log_sums.h.
};

struct PeakSum {
  float peak;
  PartialSum part;
};

constexpr float kLog2e = 1.44269504088896340736f;

struct TileLoops {
  const char* name;
  // Writes out = c + weight · z, or out = z if c is null, in one pass over a member's logits z, float32 or bfloat16. If
  // `sum`, returns the sum of the member's own probabilities. A +inf in z makes the result not finite, or it is in
  // `out`.
  PartialSum (*add_member_once)(const void* z, bool bf16, int n, const float* c, float weight, bool sum, float* out);
  PeakSum (*peak_sum)(const float* x, int n, float scale);
  // Σ sums · 2^((refs - ref) · scale); ref is the largest of refs.
  float (*scaled_sum)(const float* refs, const float* sums, int n, float ref, float scale);
  // The loops below work for any values.
  void (*load_bf16)(const uint16_t* source, int n, float* out);
  void (*load_fp16)(const uint16_t* source, int n, float* out);
  Scan (*scan)(const float* x, int n);
  // out = c + weight · z, where a z of -inf adds `hole` instead. Returns the scan of z.
  Scan (*add_member)(const float* c, const float* z, int n, float weight, float hole, float* out);
  void (*add)(const float* a, const float* b, int n, float* out);
  // Σ 2^((x - peak) · scale), where peak is the largest x. exp_sum_above sums only over x >= lowest.
  float (*exp_sum)(const float* x, int n, float peak, float scale);
  float (*exp_sum_above)(const float* x, int n, float lowest, float peak, float scale);
  void (*exps)(const float* x, int n, float peak, float scale, float* out);
  // The largest x of each lane. A lane has n / kLanes of the values, and each value is in one lane.
  void (*lane_peaks)(const float* x, int n, float* out);
  // The Gumbel noise of indices first .. first + n - 1 (philox.py is the specification).
  void (*gumbel)(uint64_t seed, uint32_t level, uint32_t position, uint32_t first, int n, float* out);
  // The index of the first maximum of (x - peak) · coldness + noise, over x >= lowest.
  int (*draw)(const float* x, const float* noise, int n, float lowest, float peak, float coldness);
};

extern const TileLoops loops_baseline;
#ifdef GENARM_X86
extern const TileLoops loops_avx2, loops_avx512;
#endif

}  // namespace genarm
