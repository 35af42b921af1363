// The build compiles this file once per instruction set, with -DISA=name and its flags.
#include "loops.h"

#include <cstring>

#include "common/float_math.h"

namespace genarm {
namespace {

constexpr int kBlock = 32;  // number of outputs whose sums stay in registers

// Expands `count` outputs. For the constant kBlock, the compiler can leave out the padding.
template <typename W>
inline void expand_block(const float* hidden, int64_t rank, const W* b, int64_t b_stride, int count, float* y) {
  float sums[kBlock] = {};
  std::memcpy(sums, y, count * sizeof *sums);
  for (int64_t j = 0; j < rank; ++j) {
    W padded[kBlock] = {};
    std::memcpy(padded, b + j * b_stride, count * sizeof *b);
#pragma omp simd
    for (int o = 0; o < kBlock; ++o) sums[o] += hidden[j] * as_float32(padded[o]);
  }
  std::memcpy(y, sums, count * sizeof *sums);
}

template <typename W>
void expand(const float* hidden, int64_t rank, const W* b, int64_t b_stride, int n, float* y) {
  int first = 0;
  for (; first + kBlock <= n; first += kBlock) expand_block(hidden, rank, b + first, b_stride, kBlock, y + first);
  if (first < n) expand_block(hidden, rank, b + first, b_stride, n - first, y + first);
}

template <typename W>
void store(const float* y, const W* bias, int n, W* out) {
#pragma omp simd
  for (int o = 0; o < n; ++o) put(out + o, bias ? y[o] + as_float32(bias[o]) : y[o]);
}

#define TABLE_(name, isa) name##isa
#define TABLE(name, isa) TABLE_(name, isa)

}  // namespace

extern const OutputLoops<uint16_t> TABLE(output_, ISA) = {expand<uint16_t>, store<uint16_t>};
#if defined(__AVX2__)
extern const OutputLoops<float> TABLE(float_output_, ISA) = {expand<float>, store<float>};
#endif

}  // namespace genarm
