// The loops of quant_linear. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kGroup = 32;         // inputs that share a scale
constexpr int kTileOutputs = 32;   // whose codes lie together: four vectors of AVX2, two of AVX-512
constexpr int kQuantRows = 8;      // of a block
constexpr int kStepBytes = 4 * kTileOutputs;  // a dword of each output: four inputs of 8 bits, or eight of 4

// A group of a tile: codes, float16 scales, and of 4 bits float16 minimums. Whole lines of the cache.
constexpr int64_t group_bytes(int bits) { return bits == 8 ? 8 * kStepBytes + 64 : 4 * kStepBytes + 128; }

// Rows as whole numbers of 16 bits and a power of two for each group.
struct QuantRows {
  int16_t* codes;   // [groups, count, kGroup]
  float* scales;    // [groups, count]
  float* sums;      // [groups, count]: Σ codes · scale
  int32_t* starts;  // [groups, count]: -128 Σ codes
  int count;        // 1..kQuantRows
};

struct QuantLoops {
  // Codes, scale and minimum that give 32 bfloat16 weights back bit for bit; false where the search finds none.
  bool (*grid)(int bits, const uint16_t* weights, uint8_t* codes, uint16_t* scale, uint16_t* minimum);
  // Row `index` of a block, from n bfloat16.
  void (*prepare)(const uint16_t* x, int64_t n, const QuantRows& rows, int index);
  // y[r, o] of a tile for a block; each weight is fetched from `next`, where the stream goes on. y: [count, kTileOutputs]
  void (*tile)(int bits, const uint8_t* weights, const uint8_t* next, int64_t groups, const QuantRows& rows, float* y);
  // The weights of one output of a tile, bfloat16 [width].
  void (*output)(int bits, const uint8_t* weights, int index, int64_t width, uint16_t* y);
};

extern const QuantLoops quant_avx2, quant_avx512, quant_avx512vnni, quant_baseline;

}  // namespace genarm
