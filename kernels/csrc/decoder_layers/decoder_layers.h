// All layers of a decoder in one call, by the functions of the single ops: the same bits.
// genarm_fast/models/fused_decoder.py is the specification.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "linear/linear.h"
#include "ragged_attention/ragged_attention.h"

namespace genarm {

struct Norm {
  const void* weight;  // [width]
  float eps, offset;
};

struct AdaptedLinear {
  const Linear* linear;
  int lanes;  // which of a call's lists of spans is its own
};

struct DecoderLayer {
  AdaptedLinear qkv[3], o, gate_up[2], down;
  Norm norm, next_norm;             // before the MLP; before the next layer, or the head
  const void *query_norm, *key_norm;  // [head_width], or null
  float head_eps, scale;
  int64_t head_width, window;  // window: INT64_MAX for none
};

struct LayerCache {
  char *keys, *values;                           // [slots, heads, capacity, width]
  int64_t key_strides[3], value_strides[3];      // in elements
  int64_t heads, value_width;
};

struct DecoderCall {
  bool bfloat16;           // the type of every number here, in the norms and in the cache; else float32
  const char *hidden, *x;  // [rows, block, width]: the residual stream, and the first layer's input
  char* out;               // the same, after the last norm
  const char *cos, *sin;   // [rows or 1, block, head_width]
  int64_t cos_strides[2], sin_strides[2];
  int64_t rows, block, width;
  Places places;
  std::vector<std::vector<Span>> spans;  // lists for linears by their `lanes`
  int threads;
  std::function<bool()> interrupted;  // asked between two layers, if set
};

// Whether all of it was done, and nothing interrupted it. Slots, positions and spans must be in range, and shapes fit.
// Throws std::bad_alloc.
bool decoder_layers(const DecoderCall& call, const std::vector<DecoderLayer>& layers,
                    const std::vector<LayerCache>& caches);

}  // namespace genarm
