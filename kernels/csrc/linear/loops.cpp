// Compiled with -DISA=name and that instruction set's flags.
#include "loops.h"

#include <cstring>

#include "common/float_math.h"

namespace genarm {
namespace {

constexpr int kBlock = 32;  // outputs whose sums stay in registers

// `count` of them; all, where the compiler knows that.
inline void expand_block(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int count, float* y) {
  float sums[kBlock] = {};
  std::memcpy(sums, y, count * sizeof *sums);
  for (int64_t j = 0; j < rank; ++j) {
    uint16_t padded[kBlock] = {};
    std::memcpy(padded, b + j * b_stride, count * sizeof *b);
#pragma omp simd
    for (int o = 0; o < kBlock; ++o) sums[o] += hidden[j] * as_float32(padded[o]);
  }
  std::memcpy(y, sums, count * sizeof *sums);
}

void expand(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y) {
  int first = 0;
  for (; first + kBlock <= n; first += kBlock) expand_block(hidden, rank, b + first, b_stride, kBlock, y + first);
  if (first < n) expand_block(hidden, rank, b + first, b_stride, n - first, y + first);
}

void store_bf16(const float* y, const uint16_t* bias, int n, uint16_t* out) {
#pragma omp simd
  for (int o = 0; o < n; ++o) {
    const float sum = bias ? y[o] + as_float32(bias[o]) : y[o];
    const uint32_t bits = as_bits(sum);
    out[o] = static_cast<uint16_t>(sum == sum ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
  }
}

#define TABLE_(isa) output_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const OutputLoops TABLE(ISA) = {expand, store_bf16};

}  // namespace genarm
