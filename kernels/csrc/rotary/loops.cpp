// Compiled with -DISA=name and that instruction set's flags. Every product and every sum is rounded to the tensors'
// dtype, because PyTorch computes them by separate operations.
#include "common/simd.h"
#include "rotary.h"

namespace genarm {
namespace {

// Rotates the pairs (x[d], x[d + half]) for d = 0 .. n - 1, n <= kWidth.
template <typename T>
void rotate_pairs(const T* x, const T* cos, const T* sin, int64_t half, int64_t n, T* out) {
  const auto get = [n](const T* source) { return n == kWidth ? load(source) : load_some(source, n); };
  const auto put = [n](T* target, Floats v) { n == kWidth ? store(target, v) : store_some(target, v, n); };
  const Floats low = get(x), high = get(x + half);
  put(out, rounded(low * get(cos), x) + rounded(-high * get(sin), x));
  put(out + half, rounded(high * get(cos + half), x) + rounded(low * get(sin + half), x));
}

template <typename T>
void rotate(const Rotary& a) {
  const int64_t half = a.width / 2;
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t i = 0; i < a.block; ++i) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_strides[0] + head * a.x_strides[1] + i * a.x_strides[2];
        T* out = static_cast<T*>(a.out) + row * a.out_strides[0] + head * a.out_strides[1] + i * a.out_strides[2];
        const T* cos = static_cast<const T*>(a.cos) + row * a.cos_strides[0] + i * a.cos_strides[1];
        const T* sin = static_cast<const T*>(a.sin) + row * a.sin_strides[0] + i * a.sin_strides[1];
        int64_t d = 0;
        for (; d + kWidth <= half; d += kWidth) rotate_pairs(x + d, cos + d, sin + d, half, kWidth, out + d);
        if (d < half) rotate_pairs(x + d, cos + d, sin + d, half, half - d, out + d);
      }
    }
  }
}

void rotate_any(const Rotary& a) { (a.bfloat16 ? rotate<uint16_t> : rotate<float>)(a); }

#define TABLE_(isa) rotary_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const RotaryLoops TABLE(ISA) = {rotate_any};

}  // namespace genarm
