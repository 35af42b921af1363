// Plain loops for the compiler to vectorise, compiled with -DISA=name and that instruction set's flags.
// -ffp-contract=off keeps the reference's rounding of c = z + w · z', so that ties and thresholds agree with the
// reference. Only the polynomials call fused multiply-add explicitly, if the instruction set has it.
#include "loops.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "common/float_math.h"
#include "gumbel.h"
#include "log_sums.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;

void load_bf16(const uint16_t* source, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = as_float(static_cast<uint32_t>(source[i]) << 16);
}

void load_fp16(const uint16_t* source, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    uint32_t half = source[i], magnitude = half & 0x7fff;
    uint32_t bits = as_bits(as_float(magnitude << 13) * 0x1p112f);  // changes the exponent's bias, also for subnormals
    bits |= magnitude >= 0x7c00 ? 0x7f800000u : 0u;                 // keeps infinities and NaNs
    out[i] = as_float(bits | (half & 0x8000) << 16);
  }
}

Scan scan(const float* x, int n) {
  float peak = -kInf;
  uint32_t bad = 0;
#pragma omp simd reduction(max : peak) reduction(| : bad)
  for (int i = 0; i < n; ++i) {
    peak = x[i] > peak ? x[i] : peak;
    bad |= x[i] <= FLT_MAX ? 0u : 1u;
  }
  return {peak, bad != 0};
}

Scan add_member(const float* c, const float* z, int n, float weight, float hole, float* out) {
  float peak = -kInf;
  uint32_t bad = 0;
#pragma omp simd reduction(max : peak) reduction(| : bad)
  for (int i = 0; i < n; ++i) {
    float value = z[i];
    peak = value > peak ? value : peak;
    bad |= value <= FLT_MAX ? 0u : 1u;
    float term = weight * value;
    out[i] = c[i] + (value == -kInf ? hole : term);
  }
  return {peak, bad != 0};
}

void add(const float* a, const float* b, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

float exp_sum(const float* x, int n, float peak, float scale) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp2_negative((x[i] - peak) * scale);
  return sum;
}

float exp_sum_above(const float* x, int n, float lowest, float peak, float scale) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    float power = exp2_negative((x[i] - peak) * scale);
    sum += x[i] >= lowest ? power : 0.f;
  }
  return sum;
}

void exps(const float* x, int n, float peak, float scale, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = exp2_negative((x[i] - peak) * scale);
}

void lane_peaks(const float* x, int n, float* out) {
  constexpr int kVectors = kLanes / kWidth;
  Floats peaks[kVectors];
  for (int v = 0; v < kVectors; ++v) peaks[v] = load(x + v * kWidth);
  for (int i = kLanes; i < n; i += kLanes) {
    for (int v = 0; v < kVectors; ++v) peaks[v] = max(peaks[v], load(x + i + v * kWidth));
  }
  std::memcpy(out, peaks, sizeof peaks);
}

int draw(const float* x, const float* noise, int n, float lowest, float peak, float coldness) {
  float values[kTile], best = -kInf;
#pragma omp simd reduction(max : best)
  for (int i = 0; i < n; ++i) {
    float value = (x[i] - peak) * coldness + noise[i];
    values[i] = x[i] >= lowest ? value : -kInf;
    best = values[i] > best ? values[i] : best;
  }
  int first = 0;
  while (first < n - 1 && values[first] != best) ++first;
  return first;
}

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)
#define TABLE_(isa) loops_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const TileLoops TABLE(ISA) = {NAME(ISA), add_member_once, peak_sum, scaled_sum, load_bf16, load_fp16,  scan,   add_member, add,
                                     exp_sum,   exp_sum_above, exps, lane_peaks, gumbel, draw};

}  // namespace genarm
