// ragged_attention and ragged_append on the CPU; kernels/ops/ragged_attention/reference.py is the specification.
#include <cfloat>
#include <cstring>
#include <new>

#include "common/tensors.h"
#include "arguments.h"
#include "ragged_attention.h"

namespace genarm {
namespace {

const RaggedLoops* loops = &ragged_baseline;

template <int N>
void copy_strides(const DLTensor& tensor, int64_t unit, int64_t (&out)[N]) {
  for (int i = 0; i < N; ++i) out[i] = tensor.strides[i] * unit;
}

}  // namespace

void use_ragged_loops(const char* instruction_set) {
  loops = &ragged_baseline;
#ifdef GENARM_X86
  if (!std::strcmp(instruction_set, "avx512")) loops = &ragged_avx512;
  if (!std::strcmp(instruction_set, "avx2")) loops = &ragged_avx2;
#else
  (void)instruction_set;
#endif
}

const RaggedLoops& ragged_loops() { return *loops; }

PyObject* ragged_attention_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  enum Argument { kQuery, kKeys, kValues, kSlots, kPositions, kScale, kWindow, kSoftcap, kLimit, kArguments };
  if (!takes(count, kArguments)) return nullptr;
  DLTensor query, keys, values;
  RaggedAttention call;
  if (!rows_of_vectors(in[kQuery], &query) || !ragged_cache(in + kKeys, &keys, &values)) Py_RETURN_NONE;
  call.rows = query.shape[0], call.heads = query.shape[1], call.block = query.shape[2], call.width = query.shape[3];
  call.kv_heads = keys.shape[1], call.value_width = values.shape[3];
  const ElementType type = type_of(query);
  call.bfloat16 = type == kBfloat16;
  if (!(call.bfloat16 || type == kFloat32) || !(type == type_of(keys)) || !(type == type_of(values)) ||
      keys.shape[3] != call.width || call.heads % call.kv_heads != 0 ||
      !ragged_places(in + kSlots, call.rows, call.block, &call.places)) {
    Py_RETURN_NONE;
  }
  call.scale = static_cast<float>(PyFloat_AsDouble(in[kScale]));
  call.window = in[kWindow] == Py_None ? INT64_MAX : PyLong_AsLongLong(in[kWindow]);
  const bool capped = in[kSoftcap] != Py_None;
  call.softcap = capped ? static_cast<float>(PyFloat_AsDouble(in[kSoftcap])) : 0.f;
  // The limit is only checked: the positions, which are known here, bound the entries more closely.
  const int64_t limit = in[kLimit] == Py_None ? keys.shape[2] : PyLong_AsLongLong(in[kLimit]);
  if (PyErr_Occurred()) {
    PyErr_Clear();  // check_attention of arguments.py raises a clearer error
    Py_RETURN_NONE;
  }
  if (call.window < 1 || limit < 1 || limit > keys.shape[2]) Py_RETURN_NONE;
  if (capped && !(call.softcap > 0.f && call.softcap <= FLT_MAX)) Py_RETURN_NONE;
  if (!places_in_range(call.places, call.rows, call.block, keys)) return nullptr;
  call.query = query.at<void>(), call.keys = keys.at<void>(), call.values = values.at<void>();
  copy_strides(query, 1, call.query_strides);
  copy_strides(keys, 1, call.key_strides);
  copy_strides(values, 1, call.value_strides);
  int64_t shape[4] = {call.rows, call.block, call.heads, call.value_width};
  PyObject* out = new_tensor(type, 4, shape, &call.out);
  if (!out) return nullptr;
  const int wanted = threads();
  try {
    const WithoutGil without_gil;
    ragged_attention(call, *loops, wanted);
  } catch (const std::bad_alloc&) {
    Py_DECREF(out);
    return PyErr_NoMemory();
  }
  return out;
}

PyObject* ragged_append_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  enum Argument { kKeys, kValues, kNewKeys, kNewValues, kSlots, kPositions, kArguments };
  if (!takes(count, kArguments)) return nullptr;
  DLTensor targets[2], sources[2];
  RaggedCopy copies[2];
  if (!ragged_cache(in + kKeys, &targets[0], &targets[1])) Py_RETURN_NONE;
  for (int i = 0; i < 2; ++i) {
    const DLTensor &target = targets[i], &source = sources[i];
    if (!rows_of_vectors(in[kNewKeys + i], &sources[i]) || !(type_of(source) == type_of(target)) ||
        source.shape[0] != sources[0].shape[0] || source.shape[1] != target.shape[1] ||
        source.shape[2] != sources[0].shape[2] || source.shape[3] != target.shape[3]) {
      Py_RETURN_NONE;
    }
    const int64_t unit = source.bits / 8;
    RaggedCopy& copy = copies[i];
    copy.source = source.at<char>(), copy.target = target.at<char>();
    copy_strides(source, unit, copy.source_strides);
    copy_strides(target, unit, copy.target_strides);
    copy.rows = source.shape[0], copy.heads = source.shape[1], copy.block = source.shape[2];
    copy.bytes = source.shape[3] * unit;
    if (!ragged_places(in + kSlots, copy.rows, copy.block, &copy.places)) Py_RETURN_NONE;
  }
  if (!places_in_range(copies[0].places, copies[0].rows, copies[0].block, targets[0])) return nullptr;
  {
    const WithoutGil without_gil;
    for (const RaggedCopy& copy : copies) ragged_copy(copy);
  }
  Py_RETURN_TRUE;
}

}  // namespace genarm
