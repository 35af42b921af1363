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

// y[r, o] = Σ_i x[r, i] · w[o, i] for a panel of outputs. W: of the weights, uint16_t (bfloat16) or float.
template <typename W>
struct Dots {
  Rows blocks[kTile];
  int count;  // of blocks
  const W* w;
  int64_t in;
  int outputs;    // at most kOutputs
  const W* next;  // the weights to come
  bool cold;      // whether these come from memory, and are fetched ahead
  float* y;       // [kTile, kPanelRow], row after row of all blocks
};

constexpr int kWideBlock = 4;  // rows of a block at most

// The same for weights that were spread too, as float32: `wide` outputs at a time, which lie as the rows of a block do.
struct WideDots {
  Rows blocks[kTile];
  int count;  // of blocks
  const float* w;
  int64_t width;  // of a spread row
  int outputs;    // at most kOutputs, filled up to a multiple of `wide`
  float* lanes;   // [outputs, kTile, kStep / 2]
  float* y;       // [kTile, kPanelRow]
  const float *far, *far_end;  // memory to fetch into the L2 cache meanwhile
  bool flush;                  // whether subnormal numbers count as zeros, as for weights of bfloat16
};

// Every sum has one order, whatever the rows, the panel and the instruction set. Lane l of 16 adds the products of two
// elements of each 32 inputs, and then lanes 8, 4, 2 and 1 apart are added. For weights of bfloat16 these elements are 2l + 1
// and 2l, and subnormal numbers count as zeros. For float32 they are l and l + 16; see ops/small_linear/reference.py.
template <typename W>
struct LinearLoops {
  int rows;     // of a block at most: they share one load of a weight into a register
  int alone;    // of a block that is the only one, at most
  int streams;  // of a panel's weights, which are read in turn
  int slots;    // floats that the inputs of a step take in a spread row: kStep, or half of it for pairs of bfloat16
  // n inputs as a spread row, zeros at the end: `slots` floats every `step` floats. Pairs of bfloat16 stay as they are, or
  // become floats, those at odd places first. Float32 stays in order.
  void (*spread)(const W* x, int64_t n, float* out, int64_t step);
  void (*dots)(const Dots<W>& dots);
  int wide;       // outputs of WideDots at a time; 0: never faster here
  int wide_from;  // rows from which on they are faster
  const float* (*wide_dots)(const WideDots& dots);  // gives what is left of `far`
};

extern const LinearLoops<uint16_t> linear_avx2, linear_avx512, linear_avx512bf16;
extern const LinearLoops<float> float_linear_avx2, float_linear_avx512;

}  // namespace genarm
