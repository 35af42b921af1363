// rotary_append on the CPU; kernels/ops/rotary_append/reference.py is the specification.
#include "rotary_append.h"

#include <new>

#include "common/tensors.h"
#include "ragged_attention/arguments.h"
#include "rms_norm/rms_norm.h"
#include "rotary/rotary.h"

namespace genarm {

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
      !norm_weight(in[kQueryNorm], type, call.width, &call.query_heads.norm) ||
      !norm_weight(in[kKeyNorm], type, call.width, &call.key_heads.norm) ||
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
    rotary_append(call);
  } catch (const std::bad_alloc&) {
    Py_DECREF(out);
    return PyErr_NoMemory();
  }
  return out;
}

}  // namespace genarm
