// The loops of small_linear. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kStep = 32;                 // inputs that the lanes take at a time
constexpr int kTile = 16;                 // rows in blocks that share one load of a weight into the L1 cache
constexpr int kOutputs = 256;             // of a panel at most
constexpr int kPanelRow = kOutputs + 16;  // between the rows of its sums, which would meet in few sets of the cache

struct Rows {
  const float* x;  // spread, row r at x + r * LinearLoops::slots, so that a block is one stream
  int64_t step;    // between steps
  int count;       // 1..LinearLoops::rows, or alone
};

// y[r, o] = Σ_i x[r, i] · w[o, i] for a panel of outputs.
struct Dots {
  Rows blocks[kTile];
  int count;  // of blocks
  const uint16_t* w;
  int64_t in;
  int outputs;           // at most kOutputs
  const uint16_t* next;  // the weights to come
  bool cold;             // whether these come from memory, and are fetched ahead
  float* y;              // [kTile, kPanelRow], row after row of all blocks
};

// The same for weights that were spread too, as float32: `wide` outputs at a time, which lie as the rows of a block do.
struct WideDots {
  Rows blocks[kTile];
  int count;  // of blocks
  const float* w;
  int64_t width;  // of a spread row
  int outputs;    // at most kOutputs, filled up to a multiple of `wide`
  float* lanes;   // [outputs, kTile, kStep / 2]
  float* y;       // [kTile, kPanelRow]
};

// Every sum has one order, whatever the rows, the panel and the instruction set: lane l of 16 adds the products of
// elements 2l + 1 and 2l of each 32 inputs, then lanes 8, 4, 2 and 1 apart are added. Subnormal numbers count as zeros.
struct LinearLoops {
  int rows;     // of a block at most: they share one load of a weight into a register
  int alone;    // of a block that is the only one, at most
  int streams;  // of a panel's weights, which are read in turn
  int wide;     // outputs of WideDots at a time; 0: never faster here
  int slots;    // floats that the inputs of a step take in a spread row: kStep, or half of it for pairs of bfloat16
  // n bfloat16 as a spread row, zeros at the end: `slots` floats every `step` floats. Pairs stay as they are; of floats,
  // those at odd places come first.
  void (*spread)(const uint16_t* x, int64_t n, float* out, int64_t step);
  void (*dots)(const Dots& dots);
  void (*wide_dots)(const WideDots& dots);
};

extern const LinearLoops linear_avx2, linear_avx512, linear_avx512bf16;

}  // namespace genarm
