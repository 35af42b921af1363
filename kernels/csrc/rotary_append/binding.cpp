// rotary_append on the CPU; kernels/ops/rotary_append/reference.py is the specification.
#include <cstring>
#include <new>
#include <vector>

#include "common/tensors.h"
#include "ragged_attention/arguments.h"
#include "rms_norm/rms_norm.h"
#include "rotary/rotary.h"

namespace genarm {
namespace {

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

// Heads of one token: normed, if that is asked for, rotated, and written `out_stride` elements apart.
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

void run(const RotaryAppend& a) {
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

// A weight [width] of this dtype, contiguous, or None.
bool norm_of(PyObject* object, ElementType type, int64_t width, const void** data) {
  *data = nullptr;
  if (object == Py_None) return true;
  DLTensor weight;
  if (!borrow(object, &weight) || !(type_of(weight) == type) || weight.ndim != 1 || weight.shape[0] != width ||
      !contiguous(weight)) {
    return false;
  }
  *data = weight.at<void>();
  return true;
}

}  // namespace

PyObject* rotary_append_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  enum Argument {
    kY, kCos, kSin, kKeys, kValues, kSlots, kPositions, kQueryNorm, kKeyNorm, kEps, kBias, kLanesB, kLanesIndex,
    kArguments
  };
  if (!takes(count, kArguments)) return nullptr;
  if (in[kBias] != Py_None || in[kLanesB] != Py_None) Py_RETURN_NONE;
  DLTensor y, cos, sin, keys, values;
  RotaryAppend call{};
  if (!borrow(in[kY], &y) || y.ndim != 3 || y.strides[2] != 1 || !ragged_cache(in + kKeys, &keys, &values)) {
    Py_RETURN_NONE;
  }
  const ElementType type = type_of(y);
  call.bfloat16 = type == kBfloat16, call.unit = type.bits / 8;
  call.rows = y.shape[0], call.block = y.shape[1], call.width = keys.shape[3], call.value_width = values.shape[3];
  const int64_t kv_heads = keys.shape[1], of_queries = y.shape[2] - kv_heads * (call.width + call.value_width);
  if (!(call.bfloat16 || type == kFloat32) || !(type_of(keys) == type) || !(type_of(values) == type) ||
      call.width < 2 || call.width % 2 || of_queries < call.width || of_queries % call.width ||
      !ragged_places(in + kSlots, call.rows, call.block, &call.places)) {
    Py_RETURN_NONE;
  }
  const int64_t heads = of_queries / call.width, angles[] = {call.rows, call.block, call.width};
  const void *cos_data = nullptr, *sin_data = nullptr;
  call.query_heads = {0, heads, nullptr}, call.key_heads = {of_queries, kv_heads, nullptr};
  if (!borrow(in[kCos], &cos) || !rotary_angles(cos, type, angles, &cos_data, call.cos_strides) ||
      !borrow(in[kSin], &sin) || !rotary_angles(sin, type, angles, &sin_data, call.sin_strides) ||
      !norm_of(in[kQueryNorm], type, call.width, &call.query_heads.norm) ||
      !norm_of(in[kKeyNorm], type, call.width, &call.key_heads.norm) ||
      !call.query_heads.norm != !call.key_heads.norm) {
    Py_RETURN_NONE;
  }
  call.eps = static_cast<float>(PyFloat_AsDouble(in[kEps]));
  if (PyErr_Occurred() || !places_in_range(call.places, call.rows, call.block, keys)) return nullptr;
  call.y = y.at<char>(), call.cos = static_cast<const char*>(cos_data), call.sin = static_cast<const char*>(sin_data);
  call.keys = keys.at<char>(), call.values = values.at<char>();
  for (int i = 0; i < 2; ++i) call.y_strides[i] = y.strides[i];
  for (int i = 0; i < 3; ++i) call.key_strides[i] = keys.strides[i], call.value_strides[i] = values.strides[i];
  int64_t shape[] = {call.rows, call.block, heads, call.width};
  void* query = nullptr;
  PyObject* out = new_tensor(type, 4, shape, &query);
  if (!out) return nullptr;
  call.query = static_cast<char*>(query);
  try {
    const WithoutGil without_gil;
    run(call);
  } catch (const std::bad_alloc&) {
    Py_DECREF(out);
    return PyErr_NoMemory();
  }
  return out;
}

}  // namespace genarm
