// rotary_append on the CPU; kernels/ops/rotary_append/reference.py is the specification.
#pragma once

#include <cstdint>

#include "ragged_attention/ragged_attention.h"

namespace genarm {

struct Heads {            // the adjacent heads of a token: all queries, or all keys
  int64_t column, count;  // first column in y, and number of heads
  const void* norm;       // weight [D] of their RMSNorm, or null
};

struct RotaryAppend {
  const char *y, *cos, *sin;    // inputs: [rows, block, columns], and [rows or 1, block, width] twice
  char *query, *keys, *values;  // outputs: [rows, block, heads, width], and the two caches
  int64_t y_strides[2], cos_strides[2], sin_strides[2], key_strides[3], value_strides[3];  // strides count elements
  int64_t rows, block, width, value_width, unit;  // unit: size of an element, bytes
  Heads query_heads, key_heads;
  Places places;
  float eps;      // epsilon of the RMSNorm
  bool bfloat16;  // dtype of all tensors: bfloat16, or float32 if false
};

// Slots and positions must be in range. Throws std::bad_alloc.
void rotary_append(const RotaryAppend& call);

}  // namespace genarm
