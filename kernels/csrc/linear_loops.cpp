// Compiled with -DISA=name and that instruction set's flags. vdpbf16ps is two fused multiply-adds, of the odd elements
// first, so the others can do the same (but for subnormal numbers, which it takes as zero).
#include "linear_loops.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace genarm {
namespace {

constexpr int kStep = 32;  // inputs of one dot

#if defined(__AVX512BF16__)

using Sums = __m512;
using Operand = __m512bh;

inline Operand load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Sums dot(Sums sums, Operand w, Operand x) { return _mm512_dpbf16_ps(sums, w, x); }

#elif defined(__AVX512F__)

using Sums = __m512;
struct Operand {
  __m512 odd, even;
};

inline Operand load(const uint16_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))),
          _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
}
inline Sums dot(Sums sums, Operand w, Operand x) {
  return _mm512_fmadd_ps(w.even, x.even, _mm512_fmadd_ps(w.odd, x.odd, sums));
}

#else

struct Sums {
  __m256 low, high;
};
struct Operand {
  __m256 odd[2], even[2];
};

inline Operand load(const uint16_t* p) {
  Operand x;
  for (int half = 0; half < 2; ++half) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + half);
    x.odd[half] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
    x.even[half] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  }
  return x;
}
inline Sums dot(Sums sums, Operand w, Operand x) {
  return {_mm256_fmadd_ps(w.even[0], x.even[0], _mm256_fmadd_ps(w.odd[0], x.odd[0], sums.low)),
          _mm256_fmadd_ps(w.even[1], x.even[1], _mm256_fmadd_ps(w.odd[1], x.odd[1], sums.high))};
}

#endif

#if defined(__AVX512F__)

inline Sums zero() { return _mm512_setzero_ps(); }
inline void store(Sums sums, float* p) { _mm512_store_ps(p, sums); }

// Sum of the 16 lanes of each of 16 vectors: a transposition that adds on the way.
inline void add_lanes(const float* sums, float* y) {
  const auto at = [&](int output) { return _mm512_load_ps(sums + output * 16); };
  const auto fold8 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto fold4 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const auto fold2 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  };
  const auto quarter = [&](int e) { return fold4(fold8(at(e), at(4 + e)), fold8(at(8 + e), at(12 + e))); };
  _mm512_storeu_ps(y, fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3))));
}

#else

inline Sums zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline void store(Sums sums, float* p) {
  _mm256_store_ps(p, sums.low);
  _mm256_store_ps(p + 8, sums.high);
}

inline void add_lanes(const float* sums, float* y) {
  const auto fold8 = [&](int output) {
    return _mm256_add_ps(_mm256_load_ps(sums + output * 16), _mm256_load_ps(sums + output * 16 + 8));
  };
  const auto fold4 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto fold2 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  };
  for (int first = 0; first < 16; first += 8) {
    const auto half = [&](int e) { return fold4(fold8(first + e), fold8(first + 4 + e)); };
    _mm256_storeu_ps(y + first, fold1(fold2(half(0), half(1)), fold2(half(2), half(3))));
  }
}

#endif

// The last in % kStep elements, zeros after them.
inline Operand load_tail(const uint16_t* p, int64_t n) {
  alignas(64) uint16_t padded[kStep] = {};
  std::memcpy(padded, p, n * sizeof *p);
  return load(padded);
}

template <int R, int O>
inline void accumulate(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t in, float* sums) {
  Sums s[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o) s[r][o] = zero();
  }
  int64_t i = 0;
  const auto step = [&](const auto& weights, const auto& inputs) {
    Operand weight[O];
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o) {
      weight[o] = weights(w + o * in);
      // of the next O outputs: the hardware follows so many streams too late (2 rows: 8 to 13 GB/s of 15, Xeon)
      _mm_prefetch(reinterpret_cast<const char*>(w + (O + o) * in + i), _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Operand input = inputs(x + r * x_stride);
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) s[r][o] = dot(s[r][o], weight[o], input);
    }
  };
  for (; i + kStep <= in; i += kStep) {
    const auto at = [i](const uint16_t* p) { return load(p + i); };
    step(at, at);
  }
  if (i < in) {
    const auto tail = [i, in](const uint16_t* p) { return load_tail(p + i, in - i); };
    step(tail, tail);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o) store(s[r][o], sums + (r * kOutputs + o) * 16);
  }
}

// Outputs at a time: enough sums to hide the latency of a dot, as many as registers hold.
template <int R>
constexpr int kWidth =
#if defined(__AVX512F__)
    R == 1 ? 8 : R <= 3 ? 8 : R <= 6 ? 4 : 2;
#else
    R == 1 ? 4 : R == 2 ? 2 : 1;
#endif

template <int R>
void dots_of(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t in, int outputs, float* y) {
  alignas(64) float sums[R * kOutputs * 16];
  int o = 0;
  for (; o + kWidth<R> <= outputs; o += kWidth<R>) accumulate<R, kWidth<R>>(x, x_stride, w + o * in, in, sums + o * 16);
  for (; o < outputs; ++o) accumulate<R, 1>(x, x_stride, w + o * in, in, sums + o * 16);
  for (int r = 0; r < R; ++r) {
    float* of_row = sums + r * kOutputs * 16;
    std::fill(of_row + outputs * 16, of_row + kOutputs * 16, 0.f);
    add_lanes(of_row, y + r * kOutputs);
  }
}

void dots(const uint16_t* x, int64_t x_stride, int rows, const uint16_t* w, int64_t in, int outputs, float* y) {
  switch (rows) {
    case 1: return dots_of<1>(x, x_stride, w, in, outputs, y);
    case 2: return dots_of<2>(x, x_stride, w, in, outputs, y);
    case 3: return dots_of<3>(x, x_stride, w, in, outputs, y);
    case 4: return dots_of<4>(x, x_stride, w, in, outputs, y);
    case 5: return dots_of<5>(x, x_stride, w, in, outputs, y);
    case 6: return dots_of<6>(x, x_stride, w, in, outputs, y);
    case 7: return dots_of<7>(x, x_stride, w, in, outputs, y);
    default: return dots_of<8>(x, x_stride, w, in, outputs, y);
  }
}

inline float as_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t as_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

void expand(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y) {
  if (n < kOutputs) {
    for (int64_t j = 0; j < rank; ++j) {
      for (int o = 0; o < n; ++o) y[o] += hidden[j] * as_float(b[j * b_stride + o]);
    }
    return;
  }
  float sums[kOutputs];
  std::memcpy(sums, y, sizeof sums);
  for (int64_t j = 0; j < rank; ++j) {
#pragma omp simd
    for (int o = 0; o < kOutputs; ++o) sums[o] += hidden[j] * as_float(b[j * b_stride + o]);
  }
  std::memcpy(y, sums, sizeof sums);
}

void store_bf16(const float* y, const uint16_t* bias, int n, uint16_t* out) {
  alignas(64) float sums[kOutputs];
  std::memcpy(sums, y, sizeof sums);
  if (bias) {
    for (int o = 0; o < n; ++o) sums[o] += as_float(bias[o]);
  }
  uint16_t rounded[kOutputs];
#pragma omp simd
  for (int o = 0; o < kOutputs; ++o) rounded[o] = as_bf16(sums[o]);
  if (n == kOutputs) {
    std::memcpy(out, rounded, sizeof rounded);
  } else {
    std::memcpy(out, rounded, n * sizeof *out);
  }
}

#define TABLE_(isa) linear_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const LinearLoops TABLE(ISA) = {dots, expand, store_bf16};

}  // namespace genarm

#endif  // __AVX2__
