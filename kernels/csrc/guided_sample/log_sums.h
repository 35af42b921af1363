// Sums of exponentials in one pass, without knowing the maximum first. The largest of a tile's first logits is the
// reference value r. Σ 2^((x - r) · scale) is as accurate for any r, as long as no term overflows float32 (2^127). If
// one does, if a logit is NaN or +inf, or if all of the first logits are masked, the sum is not finite. Then the caller
// computes the tile again with the loops that know the maximum. Only for files that are compiled once per instruction
// set, like common/simd.h.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "loops.h"

namespace genarm {
namespace {

inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^y with a relative error of 1.4e-7. For y >= 128 or NaN the result is +inf or NaN, so that a sum shows it. Results
// below 2^-126 become 0 or 2^-126.
inline Floats exp2_any(Floats y) {
#if defined(__AVX512F__)
  const Floats f = _mm512_reduce_ps(y, 0x09);  // y - floor(y), and 0 for infinities
  Floats p = splat(1.8755693e-3f);             // minimax on [0, 1]
  p = fma(p, f, splat(8.994675e-3f));
  p = fma(p, f, splat(5.582121e-2f));
  p = fma(p, f, splat(2.4015573e-1f));
  p = fma(p, f, splat(6.931527e-1f));
  p = fma(p, f, splat(0.99999994f));
  return _mm512_scalef_ps(p, y);  // p · 2^floor(y)
#else
  const Floats round = splat(12582912.f + 127.f);  // 1.5 · 2^23: adding it leaves round(y) + 127 in the low bits
  const Floats clamped = max(splat(-126.f), y);    // this order of arguments keeps a NaN
  const Floats shifted = clamped + round;
  const Floats f = clamped - (shifted - round);
  Floats p = splat(1.3269555e-3f);  // minimax on [-1/2, 1/2]
  p = fma(p, f, splat(9.671293e-3f));
  p = fma(p, f, splat(5.550711e-2f));
  p = fma(p, f, splat(2.4022247e-1f));
  p = fma(p, f, splat(6.93147e-1f));
  p = fma(p, f, splat(1.f));
  const Floats power = p * reinterpret_cast<Floats>(reinterpret_cast<Words>(shifted) << 23);
  return y < 128.f ? power : y + INFINITY;
#endif
}

typedef float Quad __attribute__((vector_size(16)));

inline float sum_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  Quad parts[kWidth / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int i = 1; i < kWidth / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
#endif
}

inline float max_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  Quad parts[kWidth / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int i = 1; i < kWidth / 4; ++i) parts[0] = parts[0] > parts[i] ? parts[0] : parts[i];
  const float left = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
  const float right = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
  return left > right ? left : right;
#endif
}

// The largest of the first kLanes values.
template <typename T>
inline float reference(const T* x) {
  Floats first = load(x);
  for (int i = kWidth; i < kLanes; i += kWidth) first = max(first, load(x + i));
  return max_of(first);
}

// Fetches the same place of the next tile. The hardware stops fetching ahead at the end of a page, and a tile is a page
// if its logits are float32.
template <typename T>
inline void fetch_next(const T* x) {
  __builtin_prefetch(x + kTile);
}

// 2^((x - ref) · scale) for one reference and scale. A fused multiply-add saves the subtraction. The rounding error of
// ref · scale is then the same for every x, and `correct` makes up for it in the sum.
class Powers {
 public:
#if defined(__FMA__)
  Powers(float ref, float scale)
      : scale_(splat(scale)), shift_(splat(-(ref * scale))), left_out_(std::fma(ref, scale, -(ref * scale))) {}
  Floats operator()(Floats x) const { return exp2_any(fma(x, scale_, shift_)); }
  float correct(float sum) const {  // multiplies by 2^-left_out_
    return std::fabs(left_out_) < 1e-3f ? sum * (1.f - left_out_ * 0.693147181f) : INFINITY;
  }

 private:
  Floats scale_, shift_;
  float left_out_;
#else
  Powers(float ref, float scale) : scale_(splat(scale)), ref_(splat(ref)) {}
  Floats operator()(Floats x) const { return exp2_any((x - ref_) * scale_); }
  float correct(float sum) const { return sum; }

 private:
  Floats scale_, ref_;
#endif
};

// The term that a member adds: the base's logits, or an ARM's with a positive or any weight. An ARM's -inf times a
// positive weight is right as it is; other weights need a test for it.
enum class Term { kBase, kPositive, kAny };

template <typename T, Term kTerm, bool kSum>
PartialSum add_term(const T* z, int n, const float* c, float weight, float* out) {
  const float ref = kSum ? reference(z) : 0.f;
  const Powers powers(ref, kLog2e);
  const Floats weights = splat(weight);
  const Floats hole = splat(weight == 0.f ? 0.f : -INFINITY);
  Floats sums[2] = {}, peak = splat(-INFINITY);
  const auto step = [&](int i, Floats& sum) {
    fetch_next(z + i);
    if (kTerm != Term::kBase && !kSum) fetch_next(c + i);  // c is in the cache in other cases
    const Floats value = load(z + i);
    if (kSum) sum += powers(value);
    if (kTerm == Term::kBase) {
      if (out) store(out + i, value);
    } else if (kTerm == Term::kPositive) {
      store(out + i, load(c + i) + weights * value);
    } else {
      const Floats term = weights * value;
      store(out + i, load(c + i) + (value == -INFINITY ? hole : term));
      peak = max(peak, value);
    }
  };
  int i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) step(i, sums[0]), step(i + kWidth, sums[1]);
  if (i < n) step(i, sums[0]);
  const float sum = powers.correct(sum_of(sums[0] + sums[1]));
  return {ref, kTerm == Term::kAny && max_of(peak) == INFINITY ? INFINITY : sum};
}

template <typename T, bool kSum>
PartialSum add_member_as(const T* z, int n, const float* c, float weight, float* out) {
  if (!c) return add_term<T, Term::kBase, kSum>(z, n, c, weight, out);
  if (weight > 0) return add_term<T, Term::kPositive, kSum>(z, n, c, weight, out);
  return add_term<T, Term::kAny, kSum>(z, n, c, weight, out);
}

PartialSum add_member_once(const void* z, bool bf16, int n, const float* c, float weight, bool sum, float* out) {
  if (bf16) {
    const auto* bits = static_cast<const uint16_t*>(z);
    return sum ? add_member_as<uint16_t, true>(bits, n, c, weight, out)
               : add_member_as<uint16_t, false>(bits, n, c, weight, out);
  }
  const auto* floats = static_cast<const float*>(z);
  return sum ? add_member_as<float, true>(floats, n, c, weight, out)
             : add_member_as<float, false>(floats, n, c, weight, out);
}

PeakSum peak_sum(const float* x, int n, float scale) {
  const float ref = reference(x);
  const Powers powers(ref, scale);
  Floats sums[2] = {}, peaks[2] = {splat(-INFINITY), splat(-INFINITY)};
  const auto step = [&](int i, int k) {
    fetch_next(x + i);
    const Floats value = load(x + i);
    peaks[k] = max(peaks[k], value);
    sums[k] += powers(value);
  };
  int i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) step(i, 0), step(i + kWidth, 1);
  if (i < n) step(i, 0);
  return {max_of(max(peaks[0], peaks[1])), {ref, powers.correct(sum_of(sums[0] + sums[1]))}};
}

float scaled_sum(const float* refs, const float* sums, int n, float ref, float scale) {
  const Floats scales = splat(scale), top = splat(ref);
  Floats total{};
  for (int i = 0; i < n; i += kWidth) total += load(sums + i) * exp2_any((load(refs + i) - top) * scales);
  return sum_of(total);
}

}  // namespace
}  // namespace genarm
