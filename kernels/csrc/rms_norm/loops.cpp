// Compiled with -DISA=name and that instruction set's flags.
#include <cmath>

#include "common/float_math.h"
#include "common/simd.h"
#include "rms_norm.h"

namespace genarm {
namespace {

// Sums in torch's order on every CPU (ATen/native/cpu/SumKernel.cpp), to give the same bits. There are four sums of
// eight lanes, which move up a level every 16 additions. Then come the elements that are left, and then the lanes one
// by one.
template <typename T>
float sum_of_squares(const T* x, int64_t n) {
  constexpr int kLanes = 8, kAtOnce = 4 * kLanes, kLevels = 3, kSteps = 16, kVectors = kAtOnce / kWidth;
  const auto square = [](float v) { return v * v; };
  Floats sums[kLevels][kVectors] = {};
  const int64_t steps = n / kAtOnce;
  for (int64_t step = 0; step < steps;) {
    for (int k = 0; k < kVectors; ++k) {
      const Floats v = load(x + step * kAtOnce + k * kWidth);
      sums[0][k] += v * v;
    }
    ++step;
    for (int64_t level = 1, full = kSteps; level < kLevels && step % full == 0; ++level, full *= kSteps) {
      for (int k = 0; k < kVectors; ++k) sums[level][k] += sums[level - 1][k], sums[level - 1][k] = Floats{};
    }
  }
  for (int level = 1; level < kLevels; ++level) {
    for (int k = 0; k < kVectors; ++k) sums[0][k] += sums[level][k];
  }
  float lanes[kAtOnce], rest[kAtOnce] = {}, total = 0.f;
  std::memcpy(lanes, sums[0], sizeof lanes);
  const int64_t left = n - steps * kAtOnce, vectors = left / kLanes * kLanes;
  for (int64_t i = 0; i < left; ++i) rest[i] = square(as_float32(x[steps * kAtOnce + i]));
  for (int64_t i = 0; i < vectors; ++i) lanes[i % kLanes] += rest[i];
  for (int i = kLanes; i < kAtOnce; ++i) lanes[i % kLanes] += lanes[i];
  for (int64_t i = vectors; i < left; ++i) total += rest[i];
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Writes out[i] = x[i] + y[i], rounded to the dtype.
template <typename T>
void add(const T* x, const T* y, int64_t n, T* out) {
  int64_t d = 0;
  for (; d + kWidth <= n; d += kWidth) store(out + d, load(x + d) + load(y + d));
  if (const int64_t rest = n - d) store_some(out + d, load_some(x + d, rest) + load_some(y + d, rest), rest);
}

template <typename T>
void rms_norm(const RmsNorm& a) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    if (a.added) {
      T* total = static_cast<T*>(a.total) + row * a.width;
      add(x, static_cast<const T*>(a.added) + row * a.width, a.width, total);
      x = total;
    }
    T* out = static_cast<T*>(a.out) + row * a.width;
    const Floats scale = splat(1.f / std::sqrt(sum_of_squares(x, a.width) / static_cast<float>(a.width) + a.eps));
    const auto scaled = [&](Floats v, Floats w) {
      return a.offset == 0.f ? rounded(v * scale, x) * w : v * scale * (a.offset + w);
    };
    int64_t d = 0;
    for (; d + kWidth <= a.width; d += kWidth) store(out + d, scaled(load(x + d), load(weight + d)));
    if (const int64_t rest = a.width - d) {
      store_some(out + d, scaled(load_some(x + d, rest), load_some(weight + d, rest)), rest);
    }
  }
}

void rms_norm_any(const RmsNorm& a) { (a.bfloat16 ? rms_norm<uint16_t> : rms_norm<float>)(a); }

#define TABLE_(isa) norm_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const NormLoops TABLE(ISA) = {rms_norm_any};

}  // namespace genarm
