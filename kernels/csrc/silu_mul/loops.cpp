// Compiled with -DISA=name and that instruction set's flags.
#include <cmath>

#include "common/float_math.h"
#include "silu_mul.h"

namespace genarm {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

template <typename T>
void silu_mul(const void* gate, const void* up, int64_t n, void* out) {
  const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
  T* y = static_cast<T*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = as_float32(g[i]), power = exp2_negative(-kLog2e * std::fabs(x));
    T silu;  // rounded to T, because PyTorch computes it by a separate operation
    put(&silu, (x < 0.f ? x * power : x) / (1.f + power));
    put(y + i, as_float32(silu) * as_float32(u[i]));
  }
}

#define TABLE_(isa) silu_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const SiluLoops TABLE(ISA) = {silu_mul<float>, silu_mul<uint16_t>};

}  // namespace genarm
