#include "rotary_append.h"

#include <cstring>
#include <vector>

#include "rms_norm/rms_norm.h"
#include "rotary/rotary.h"

namespace genarm {
namespace {

// Rotates the heads of one token, after their norm if there is one, and writes them `out_stride` elements apart.
void rotate(const RotaryAppend& a, int64_t row, int64_t token, const Heads& heads, void* out, int64_t out_stride,
            std::vector<char>* scratch) {
  const char* x = a.y + (row * a.y_strides[0] + token * a.y_strides[1] + heads.column) * a.unit;
  if (heads.norm) {
    RmsNorm norm{};
    scratch->resize(heads.count * a.width * a.unit);
    norm.x = x, norm.weight = heads.norm, norm.out = scratch->data();
    norm.rows = heads.count, norm.width = a.width, norm.eps = a.eps, norm.bfloat16 = a.bfloat16;
    run_norm(norm);
    x = scratch->data();
  }
  Rotary call{};
  call.x = x, call.out = out, call.x_strides[1] = a.width, call.out_strides[1] = out_stride;
  call.cos = a.cos + (row * a.cos_strides[0] + token * a.cos_strides[1]) * a.unit;
  call.sin = a.sin + (row * a.sin_strides[0] + token * a.sin_strides[1]) * a.unit;
  call.rows = call.block = 1, call.heads = heads.count, call.width = a.width, call.bfloat16 = a.bfloat16;
  run_rotary(call);
}

}  // namespace

void rotary_append(const RotaryAppend& a) {
  std::vector<char> scratch;
  const int64_t values = a.key_heads.column + a.key_heads.count * a.width;
  char* query = a.query;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t slot = a.places.slot(row);
    for (int64_t token = 0; token < a.block; ++token, query += a.query_heads.count * a.width * a.unit) {
      const int64_t position = a.places.position(row, token);
      rotate(a, row, token, a.query_heads, query, a.width, &scratch);
      char* key = a.keys + (slot * a.key_strides[0] + position * a.key_strides[2]) * a.unit;
      rotate(a, row, token, a.key_heads, key, a.key_strides[1], &scratch);
      const char* source = a.y + (row * a.y_strides[0] + token * a.y_strides[1] + values) * a.unit;
      char* value = a.values + (slot * a.value_strides[0] + position * a.value_strides[2]) * a.unit;
      for (int64_t head = 0; head < a.key_heads.count; ++head) {
        std::memcpy(value + head * a.value_strides[1] * a.unit, source + head * a.value_width * a.unit,
                    a.value_width * a.unit);
      }
    }
  }
}

}  // namespace genarm
