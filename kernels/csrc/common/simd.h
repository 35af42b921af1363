// Vectors of floats, as wide as the instruction set of this translation unit has them. Only for files that are compiled
// once per instruction set, like float_math.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace genarm {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#define GENARM_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GENARM_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#define GENARM_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define GENARM_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr int kWidth = 4;
#define GENARM_LOW 0, 4, 1, 5
#define GENARM_HIGH 2, 6, 3, 7
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

template <typename V, typename T>
inline V load_as(const T* source) {
  V v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

inline Floats load(const float* source) { return load_as<Floats>(source); }
inline Floats load(const uint16_t* bf16) {
#if defined(__AVX512F__)  // GCC 12 splits the conversion below into two halves
  const Words wide = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load_as<__m256i>(bf16)));
#elif defined(__AVX2__)
  const Words wide = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load_as<__m128i>(bf16)));
#else
  const Words wide = __builtin_convertvector(load_as<Halves>(bf16), Words);
#endif
  return reinterpret_cast<Floats>(wide << 16);
}

// The first n < kWidth elements, then zeros.
template <typename T>
inline Floats load_some(const T* source, int64_t n) {
  T padded[kWidth] = {};
  std::memcpy(padded, source, n * sizeof(T));
  return load(padded);
}

inline Floats splat(float x) { return x - Floats{}; }  // x - 0 costs nothing; 0 + x is an addition, as x may be -0

inline void store(float* out, Floats v) { std::memcpy(out, &v, sizeof v); }

// The nearest bfloat16, ties to even, in the upper half of each word.
inline Words bf16_words(Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return v == v ? rounded : (Words{} + 0x7fc00000u);
}

inline void store(uint16_t* bf16, Floats v) {
  const Words words = bf16_words(v) >> 16;
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words));
#else
  const Halves halves = __builtin_convertvector(words, Halves);
#endif
  std::memcpy(bf16, &halves, sizeof halves);
}

template <typename T>
inline void store_some(T* out, Floats v, int64_t n) {
  T padded[kWidth];
  store(padded, v);
  std::memcpy(out, padded, n * sizeof(T));
}

// The value after it is stored as a T (the type of the second argument) and loaded again.
inline Floats rounded(Floats v, const float*) { return v; }
inline Floats rounded(Floats v, const uint16_t*) { return reinterpret_cast<Floats>(bf16_words(v)); }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline void transpose(Words (&m)[kWidth]) {
  for (int step = 1; step < kWidth; step *= 2) {
    Words next[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(m[i], m[i + kWidth / 2], GENARM_LOW);
      next[2 * i + 1] = __builtin_shufflevector(m[i], m[i + kWidth / 2], GENARM_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) m[i] = next[i];
  }
}

}  // namespace
}  // namespace genarm
