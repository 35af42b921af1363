// rotary_append on the CPU; kernels/ops/rotary_append/reference.py is the specification.
#pragma once

#include <cstdint>

#include "ragged_attention/ragged_attention.h"

namespace genarm {

struct Heads {  // of a token, side by side: of queries or of keys
  int64_t column, count;
  const void* norm;  // [D], or null
};

struct RotaryAppend {
  const char *y, *cos, *sin;
  char *query, *keys, *values;
  int64_t y_strides[2], cos_strides[2], sin_strides[2], key_strides[3], value_strides[3];  // in elements
  int64_t rows, block, width, value_width, unit;  // unit: bytes of an element
  Heads query_heads, key_heads;
  Places places;
  float eps;
  bool bfloat16;
};

// Slots and positions must be in range. Throws std::bad_alloc.
void rotary_append(const RotaryAppend& call);

}  // namespace genarm
