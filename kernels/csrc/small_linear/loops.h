// The loops of small_linear. loops.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace genarm {

constexpr int kStep = 32;      // inputs that the lanes of a sum take in one step
constexpr int kTile = 16;      // Most rows in a call. Their blocks share one load of a weight into the L1 cache.
constexpr int kOutputs = 256;  // most outputs of a panel
// Floats between two rows of a panel's sums. The 16 floats between the rows keep these out of the same few cache sets.
constexpr int kPanelRow = kOutputs + 16;

// A block of spread rows. Row r starts at x + r * LinearLoops::slots, so that the block is read as one stream.
struct Rows {
  const float* x;
  int64_t step;  // floats from one step of a row to the next
  int count;     // rows: 1..LinearLoops::rows, or up to LinearLoops::alone if this is the only block
};

// y[r, o] = Σ_i x[r, i] · w[o, i] for a panel of outputs. W: type of the weights, uint16_t (bfloat16) or float.
template <typename W>
struct Dots {
  Rows blocks[kTile];
  int count;   // number of blocks
  const W* w;  // [outputs, in]
  int64_t in;
  int outputs;    // outputs of the panel, at most kOutputs
  const W* next;  // weights that the caller reads after this panel
  bool cold;      // Whether the weights come from memory. The loop then fetches them ahead into the L2 cache.
  float* y;       // [kTile, kPanelRow]: the sums of all rows, block after block
};

constexpr int kWideBlock = 4;  // most rows in a block of WideDots

// The sums of Dots for weights that were converted to float32 and spread like x. Groups of LinearLoops::wide outputs
// have the layout of a block's rows.
struct WideDots {
  Rows blocks[kTile];
  int count;  // number of blocks
  const float* w;
  int64_t width;  // floats of a spread row
  int outputs;    // at most kOutputs, rounded up to a multiple of LinearLoops::wide
  float* lanes;   // [outputs, kTile, kStep / 2]
  float* y;       // [kTile, kPanelRow]
  const float *far, *far_end;  // begin and end of memory that the loop fetches into the L2 cache meanwhile
  bool flush;                  // whether subnormal numbers count as zeros, as they do for weights of bfloat16
};

// Every sum has one order, whatever the rows, the panel and the instruction set. Lane l of 16 adds the products of two
// elements of each 32 inputs. Then lanes 8, 4, 2 and 1 apart are added. For weights of bfloat16 the elements of lane l
// are 2l + 1 and 2l, and subnormal numbers count as zeros. For float32 the elements are l and l + 16.
// ops/small_linear/reference.py has the order of float32.
template <typename W>
struct LinearLoops {
  int rows;     // Most rows in a block. The rows of a block share each load of a weight into a register.
  int alone;    // most rows in a block that is the only one
  int streams;  // streams of weights that a panel reads in turn
  int slots;    // floats that the inputs of a step take in a spread row: kStep, or kStep / 2 for pairs of bfloat16
  // Writes n inputs as a spread row: each step takes `slots` floats, and the next step starts `step` floats after it.
  // Zeros fill the last step. Pairs of bfloat16 stay as they are, or become floats, those at odd places first. Float32
  // stays in order.
  void (*spread)(const W* x, int64_t n, float* out, int64_t step);
  void (*dots)(const Dots<W>& dots);
  int wide;       // outputs that WideDots multiplies at a time; 0 if WideDots is never faster
  int wide_from;  // least number of rows for which WideDots is faster
  const float* (*wide_dots)(const WideDots& dots);  // returns the begin of the memory not yet fetched, up to far_end
};

extern const LinearLoops<uint16_t> linear_avx2, linear_avx512, linear_avx512bf16;
extern const LinearLoops<float> float_linear_avx2, float_linear_avx512;

}  // namespace genarm
