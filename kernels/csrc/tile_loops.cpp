// Plain loops for the compiler to vectorise, compiled with -DISA=name and that instruction set's flags.
// -ffp-contract=off keeps c = z + w · z' at the reference's rounding, so that ties and thresholds agree with it;
// only the polynomials ask for fused multiply-add, where there is one.
#include "tile_loops.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "float_math.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;

// log(x) for normal x > 0, within 1 ulp (Cephes logf)
inline float log_positive(float x) {
  uint32_t bits = as_bits(x) - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
  float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  float m = as_float((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  float p = 7.0376836292e-2f;
  p = fma(p, m, -1.1514610310e-1f);
  p = fma(p, m, 1.1676998740e-1f);
  p = fma(p, m, -1.2420140846e-1f);
  p = fma(p, m, 1.4249322787e-1f);
  p = fma(p, m, -1.6668057665e-1f);
  p = fma(p, m, 2.0000714765e-1f);
  p = fma(p, m, -2.4999993993e-1f);
  p = fma(p, m, 3.3333331174e-1f);
  float square = m * m;
  float y = fma(e, -2.12194440e-4f, p * m * square) - 0.5f * square;
  return fma(e, 0.693359375f, m + y);
}

void load_bf16(const uint16_t* source, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = as_float(static_cast<uint32_t>(source[i]) << 16);
}

void load_fp16(const uint16_t* source, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    uint32_t half = source[i], magnitude = half & 0x7fff;
    uint32_t bits = as_bits(as_float(magnitude << 13) * 0x1p112f);  // moves the exponent's bias, subnormals included
    bits |= magnitude >= 0x7c00 ? 0x7f800000u : 0u;                 // infinities and NaNs
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
  float peaks[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) peaks[lane] = x[lane];
  for (int i = kLanes; i < n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) peaks[lane] = x[i + lane] > peaks[lane] ? x[i + lane] : peaks[lane];
  }
  std::memcpy(out, peaks, sizeof peaks);
}

void gumbel(uint64_t seed, uint32_t level, uint32_t position, uint32_t first, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = position, c2 = level, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u, product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    float u = (static_cast<float>(c0) + 0.5f) * 0x1p-32f;
    u = u < 1.f - 0x1p-24f ? u : 1.f - 0x1p-24f;
    float w = 1.f - u;
    float quotient = -log_positive(w) * u / (w == 1.f ? 1.f : 1.f - w);
    out[i] = -log_positive(w == 1.f ? u : quotient);
  }
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

extern const TileLoops TABLE(ISA) = {NAME(ISA), load_bf16, load_fp16,  scan,   add_member, add,
                                     exp_sum,   exp_sum_above, exps, lane_peaks, gumbel, draw};

}  // namespace genarm
