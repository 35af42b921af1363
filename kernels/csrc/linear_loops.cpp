// Compiled with -DISA=name and that instruction set's flags; the baseline has none of it.
//
// Two fused multiply-adds per pair of bfloat16, not one vdpbf16ps: that has half their rate (Sapphire Rapids: 43 billion
// products a second, 89 with FMA), and flushes subnormal numbers.
#include "linear_loops.h"

#if defined(__AVX2__)

#include <algorithm>
#include <cstring>
#include <iterator>

#include "float_math.h"
#include "simd.h"

namespace genarm {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kLanes / kWidth;  // in the lanes of a sum
constexpr int64_t kChunk = 640;            // inputs of 8 rows that stay in the L1 cache, 20 KB
constexpr int kNear = 1, kFar = 4;         // outputs of a stream ahead that are fetched into L1, and into L2

inline Floats odd(Words pairs) { return reinterpret_cast<Floats>(pairs & 0xffff0000u); }
inline Floats even(Words pairs) { return reinterpret_cast<Floats>(pairs << 16); }

template <int R, int O>
inline void step(const float* x, const uint16_t* w, int64_t w_stride, Floats (&s)[R][O][kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Floats weights[O];
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
        const Words pairs = load_as<Words>(w + o * w_stride + v * 2 * kWidth);
        weights[o] = half == 0 ? odd(pairs) : even(pairs);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Floats input = load(x + r * kStep + half * kLanes + v * kWidth);
        asm("" : "+v"(input));  // one load for all outputs
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) s[r][o][v] = fma(weights[o], input, s[r][o][v]);
      }
    }
  }
}

// Adds n inputs to the lanes [R, kOutputs, kLanes] of O outputs that lie `gap` apart, or begins them.
template <int R, int O>
inline void accumulate(const float* x, int64_t x_step, const uint16_t* w, int64_t w_stride, const uint16_t* near,
                       const uint16_t* far, int64_t n, bool begin, float* lanes, int gap) {
  const auto at = [&](int r, int o, int v) { return lanes + (r * kOutputs + o * gap) * kLanes + v * kWidth; };
  Floats s[R][O][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) s[r][o][v] = begin ? Floats{} : load(at(r, o, v));
    }
  }
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, x += x_step) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      _mm_prefetch(reinterpret_cast<const char*>(near + o * w_stride + i), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(far + o * w_stride + i), _MM_HINT_T1);
    }
    step<R, O>(x, w + i, w_stride, s);
  }
  if (i < n) {
    uint16_t tail[O * kStep] = {};
    for (int o = 0; o < O; ++o) std::memcpy(tail + o * kStep, w + o * w_stride + i, (n - i) * sizeof *w);
    step<R, O>(x, tail, kStep, s);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(at(r, o, v), s[r][o][v]);
    }
  }
}

// Σ of the 16 lanes of each of 16 outputs: a transposition that adds on the way.
#if defined(__AVX512F__)

inline void add_lanes(const float* lanes, float* y) {
  const auto halves = [&](int output, int half) {  // of two outputs, joined by the load: shuffles have one port
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(lanes + output * kLanes + half));
    return _mm512_insertf32x8(low, _mm256_loadu_ps(lanes + (output + 4) * kLanes + half), 1);
  };
  const auto fold8 = [&](int output) { return _mm512_add_ps(halves(output, 0), halves(output, 8)); };
  const auto fold4 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const auto fold2 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  };
  const auto quarter = [&](int e) { return fold4(fold8(e), fold8(8 + e)); };
  store(y, fold1(fold2(quarter(0), quarter(1)), fold2(quarter(2), quarter(3))));
}

#else

inline void add_lanes(const float* lanes, float* y) {
  const auto fold8 = [&](int output) { return load(lanes + output * kLanes) + load(lanes + output * kLanes + 8); };
  const auto fold4 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto fold2 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  };
  const auto fold1 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  };
  for (int first = 0; first < kOutputs; first += 8) {
    const auto half = [&](int e) { return fold4(fold8(first + e), fold8(first + 4 + e)); };
    store(y + first, fold1(fold2(half(0), half(1)), fold2(half(2), half(3))));
  }
}

#endif

// Outputs at a time: enough sums to hide the latency of the fma, as many as fit the registers.
template <int R>
constexpr int kTogether = kWidth == 16 ? (R <= 2 ? 8 : R <= 6 ? 4 : 3) : (R == 1 ? 4 : R == 2 ? 2 : 1);

// The weights pass in O streams, each of which reads its outputs one after the other: the hardware follows one stream in
// a page of memory, and gets lost where the O outputs of a step are neighbours of 1 KB each (in = 576, 8 rows: 0.76 of the
// read bandwidth, 0.83 with streams). What comes next is fetched by hand all the same, as a stream's turns are far apart.
template <int R>
void dots_of(const float* x, int64_t x_step, const uint16_t* w, int64_t in, int outputs, const uint16_t* next_block,
             float* y) {
  constexpr int O = kTogether<R>;
  alignas(64) float lanes[R * kOutputs * kLanes];
  if (outputs < kOutputs || in == 0) std::fill(std::begin(lanes), std::end(lanes), 0.f);
  const int length = outputs / O;  // of a stream
  const int64_t steps = (in + kStep - 1) / kStep, chunks = (in + kChunk - 1) / kChunk;
  const int64_t chunk = chunks ? (steps + chunks - 1) / chunks * kStep : 0;
  for (int64_t i = 0; i < in; i += chunk, x += chunk / kStep * x_step) {
    const int64_t n = std::min(chunk, in - i);
    const uint16_t* after = i + n < in ? w + i + n : next_block;
    const auto next = [&](int o) { return o < length ? w + o * in + i : after + (o - length) * in; };
    for (int o = 0; o < length; ++o) {
      accumulate<R, O>(x, x_step, w + o * in + i, length * in, next(o + kNear), next(o + kFar), n, i == 0,
                       lanes + o * kLanes, length);
    }
    for (int o = O * length; o < outputs; ++o) {
      const uint16_t* next = after + o * in;
      accumulate<R, 1>(x, x_step, w + o * in + i, in, next, next, n, i == 0, lanes + o * kLanes, 1);
    }
  }
  for (int r = 0; r < R; ++r) add_lanes(lanes + r * kOutputs * kLanes, y + r * kOutputs);
}

void dots(const float* x, int64_t x_step, int rows, const uint16_t* w, int64_t in, int outputs, const uint16_t* next,
          float* y) {
  switch (rows) {
    case 1: return dots_of<1>(x, x_step, w, in, outputs, next, y);
    case 2: return dots_of<2>(x, x_step, w, in, outputs, next, y);
    case 3: return dots_of<3>(x, x_step, w, in, outputs, next, y);
    case 4: return dots_of<4>(x, x_step, w, in, outputs, next, y);
    case 5: return dots_of<5>(x, x_step, w, in, outputs, next, y);
    case 6: return dots_of<6>(x, x_step, w, in, outputs, next, y);
    case 7: return dots_of<7>(x, x_step, w, in, outputs, next, y);
    default: return dots_of<8>(x, x_step, w, in, outputs, next, y);
  }
}

void spread(const uint16_t* x, int64_t n, float* out, int64_t step) {
  for (int64_t i = 0; i < n; i += kStep, x += kStep, out += step) {
    uint16_t padded[kStep] = {};
    std::memcpy(padded, x, n - i < kStep ? (n - i) * sizeof *x : sizeof padded);
    for (int v = 0; v < kVectors; ++v) {
      const Words pairs = load_as<Words>(padded + v * 2 * kWidth);
      store(out + v * kWidth, odd(pairs));
      store(out + kLanes + v * kWidth, even(pairs));
    }
  }
}

void expand(const float* hidden, int64_t rank, const uint16_t* b, int64_t b_stride, int n, float* y) {
  float sums[kOutputs];
  std::memcpy(sums, y, sizeof sums);
  for (int64_t j = 0; j < rank; ++j, b += b_stride) {
    uint16_t padded[kOutputs] = {};
    std::memcpy(padded, b, n == kOutputs ? sizeof padded : n * sizeof *b);
#pragma omp simd
    for (int o = 0; o < kOutputs; ++o) sums[o] += hidden[j] * as_float32(padded[o]);
  }
  std::memcpy(y, sums, sizeof sums);
}

void store_bf16(const float* y, const uint16_t* bias, int n, uint16_t* out) {
  uint16_t biases[kOutputs] = {}, rounded[kOutputs];
  if (bias) std::memcpy(biases, bias, n * sizeof *bias);
#pragma omp simd
  for (int o = 0; o < kOutputs; ++o) {
    const float sum = bias ? y[o] + as_float32(biases[o]) : y[o];
    const uint32_t bits = as_bits(sum);
    rounded[o] = static_cast<uint16_t>(sum == sum ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
  }
  std::memcpy(out, rounded, n == kOutputs ? sizeof rounded : n * sizeof *out);
}

#define TABLE_(isa) linear_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const LinearLoops TABLE(ISA) = {spread, dots, expand, store_bf16};

}  // namespace genarm

#endif  // __AVX2__
