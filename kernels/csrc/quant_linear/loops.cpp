// Compiled with -DISA=name and that instruction set's flags.
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/float_math.h"
#include "grid.h"
#include "tile.h"

namespace genarm {
namespace {

// Biased exponents of float32. A group is scaled as if its largest value were at least 2^-60, so that no result is a
// subnormal number, which some threads may flush to zero. A value of 2^97 or more, an infinity or a NaN gives its row
// NaNs.
constexpr int kSmallest = 127 - 60, kLargest = 127 + 96;
// The largest whole number of a group is in [2^14, 2^15). So all 8 bits of a bfloat16 are kept down to 2^-7 of the
// largest.
constexpr int kBits = 14;

void prepare_group(const uint16_t* x, const QuantRows& rows, int64_t at) {
  int top = 0;
#pragma omp simd reduction(max : top)
  for (int i = 0; i < kGroup; ++i) top = std::max(top, x[i] & 0x7fff);
  const int exponent = std::max(top >> 7, kSmallest);
  int16_t* codes = rows.codes + at * kGroup;
  if (exponent > kLargest) {
    std::fill_n(codes, kGroup, 0);
    rows.scales[at] = rows.sums[at] = as_float(0x7fc00000), rows.starts[at] = 0;
    return;
  }
  constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it leaves the nearest whole number in the low bits
  const float up = as_float(static_cast<uint32_t>(2 * 127 + kBits - exponent) << 23);
  const float scale = as_float(static_cast<uint32_t>(exponent - kBits) << 23);
  int sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kGroup; ++i) {
    const int code = static_cast<int>(as_bits(as_float32(x[i]) * up + kRound)) - static_cast<int>(0x4b400000);
    codes[i] = static_cast<int16_t>(code);
    sum += code;
  }
  rows.scales[at] = scale;
  rows.sums[at] = static_cast<float>(sum) * scale;
  rows.starts[at] = -128 * sum;
}

void prepare(const uint16_t* x, int64_t n, const QuantRows& rows, int index) {
  int64_t i = 0, at = index;
  for (; i + kGroup <= n; i += kGroup, at += rows.count) prepare_group(x + i, rows, at);
  if (i < n) {
    uint16_t tail[kGroup] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof *x);
    prepare_group(tail, rows, at);
  }
}

template <int Bits, int R = kQuantRows>
void tile_of(const uint8_t* weights, const uint8_t* next, int64_t groups, const QuantRows& rows, float* y) {
  if constexpr (R > 1) {
    if (rows.count < R) return tile_of<Bits, R - 1>(weights, next, groups, rows, y);
  }
  tile<Bits, R>(weights, next, groups, rows, y);
}

void tile_of_bits(int bits, const uint8_t* weights, const uint8_t* next, int64_t groups, const QuantRows& rows,
                  float* y) {
  bits == 8 ? tile_of<8>(weights, next, groups, rows, y) : tile_of<4>(weights, next, groups, rows, y);
}

void output(int bits, const uint8_t* weights, int index, int64_t width, uint16_t* y) {
  // The inputs of the codes in a dword, from the lowest bits up: ORDER of kernels/ops/quant_linear/weights.py.
  static constexpr int kOrder8[] = {0, 2, 1, 3}, kOrder4[] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int* order = bits == 8 ? kOrder8 : kOrder4;
  const int per_step = 32 / bits, first = bits == 8 ? -128 : 0;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t begin = 0; begin < width; begin += kGroup, weights += group_bytes(bits)) {
    uint16_t halves[2 * kTileOutputs] = {}, values[kGroup];
    std::memcpy(halves, weights + bits * kStepBytes, group_bytes(bits) - bits * kStepBytes);
    const float scale = of_half(halves[index]), minimum = bits == 8 ? 0.f : of_half(halves[kTileOutputs + index]);
    for (int step = 0; step < bits; ++step) {
      uint32_t codes;
      std::memcpy(&codes, weights + step * kStepBytes + index * sizeof codes, sizeof codes);
      for (int i = 0; i < per_step; ++i, codes >>= bits) {
        const float code = static_cast<float>(static_cast<int>(codes & mask) + first);
        put(values + step * per_step + order[i], scale * code + minimum);
      }
    }
    std::memcpy(y + begin, values, std::min<int64_t>(kGroup, width - begin) * sizeof *y);
  }
}

#define TABLE_(isa) quant_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const QuantLoops TABLE(ISA) = {find_grid, prepare, tile_of_bits, output};

}  // namespace genarm
