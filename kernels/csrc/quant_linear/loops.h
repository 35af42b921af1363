// The loops of quant_linear. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kGroup = 32;         // inputs that share a scale
constexpr int kTileOutputs = 32;   // outputs whose codes are stored together: four vectors of AVX2, two of AVX-512
constexpr int kQuantRows = 8;      // most rows of x in a block
// Bytes of a step: a dword of codes for each output of a tile, so four inputs of 8 bits, or eight of 4 bits.
constexpr int kStepBytes = 4 * kTileOutputs;

// Bytes of a tile's group: codes, float16 scales, and with 4 bits float16 minimums. They are whole cache lines.
constexpr int64_t group_bytes(int bits) { return bits == 8 ? 8 * kStepBytes + 64 : 4 * kStepBytes + 128; }

// A block of rows of x. Each group of 32 inputs is whole numbers of 16 bits times a power of two.
struct QuantRows {
  int16_t* codes;   // [groups, count, kGroup]
  float* scales;    // [groups, count]
  float* sums;      // [groups, count]: Σ codes · scale
  int32_t* starts;  // [groups, count]: -128 Σ codes
  int count;        // rows, 1..kQuantRows
};

struct QuantLoops {
  // Finds codes, scale and minimum that give 32 bfloat16 weights back bit for bit. False if the search finds none.
  bool (*grid)(int bits, const uint16_t* weights, uint8_t* codes, uint16_t* scale, uint16_t* minimum);
  // Writes row `index` of a block, from n bfloat16 values.
  void (*prepare)(const uint16_t* x, int64_t n, const QuantRows& rows, int index);
  // Writes y [count, kTileOutputs] of a tile and a block. While it reads `weights`, it prefetches as many bytes at
  // `next`.
  void (*tile)(int bits, const uint8_t* weights, const uint8_t* next, int64_t groups, const QuantRows& rows, float* y);
  // Writes the weights of one output of a tile, bfloat16 [width].
  void (*output)(int bits, const uint8_t* weights, int index, int64_t width, uint16_t* y);
};

extern const QuantLoops quant_avx2, quant_avx512, quant_avx512vnni, quant_baseline;

}  // namespace genarm
