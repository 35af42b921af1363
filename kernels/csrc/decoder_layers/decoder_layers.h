// All layers of a decoder in one call. It runs the functions of the single ops, so the results have the same bits.
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

// A linear with the LoRA lanes that adapt it.
struct AdaptedLinear {
  const Linear* linear;
  int lanes;  // index into DecoderCall::spans: the list of spans that this linear uses
};

struct DecoderLayer {
  AdaptedLinear qkv[3], o, gate_up[2], down;
  Norm norm, next_norm;               // the norm before the MLP; the norm before the next layer or the head
  const void *query_norm, *key_norm;  // weights [head_width]; null if heads are not normalised
  float head_eps, scale;
  int64_t head_width, window;  // window: tokens of sliding attention, INT64_MAX without a limit
};

// The KV cache of one layer.
struct LayerCache {
  char *keys, *values;                       // [slots, heads, capacity, width]
  int64_t key_strides[3], value_strides[3];  // strides count elements
  int64_t heads, value_width;
};

struct DecoderCall {
  bool bfloat16;           // dtype of the tensors, the norms and the cache: bfloat16, or float32 if false
  const char *hidden, *x;  // [rows, block, width]: the residual stream, and the first layer's input
  char* out;               // [rows, block, width]: output of the last norm
  const char *cos, *sin;   // [rows or 1, block, head_width]
  int64_t cos_strides[2], sin_strides[2];
  int64_t rows, block, width;
  Places places;
  std::vector<std::vector<Span>> spans;  // lists of spans; AdaptedLinear::lanes is an index into them
  int threads;
  std::function<bool()> interrupted;  // Called between two layers, if set. True ends the call.
};

// Runs all layers and writes `out`. Returns false if `interrupted` ended the call early. The caller has checked that
// shapes fit and that slots, positions and spans are in range. Throws std::bad_alloc.
bool decoder_layers(const DecoderCall& call, const std::vector<DecoderLayer>& layers,
                    const std::vector<LayerCache>& caches);

}  // namespace genarm
