// Python arguments → ragged_attention and ragged_append. Shapes were checked in Python, slots and positions are here.
#include "bindings.h"

#include <cstring>
#include <new>

#include "ragged_attention.h"

namespace genarm {
namespace {

const RaggedLoops* loops = &ragged_baseline;

template <typename T>
T* pointer(PyObject* address) {
  return static_cast<T*>(PyLong_AsVoidPtr(address));
}

// The first N entries of a tensor's shape or stride().
template <int N>
void unpack(PyObject* tuple, int64_t (&out)[N], int64_t unit = 1) {
  for (int i = 0; i < N; ++i) out[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i)) * unit;
}

// Whether every slot is one of `slots` and every position one of `capacity`; else a ValueError is set.
bool in_range(const int64_t* slot, const int64_t* position, int64_t rows, int64_t block, int64_t slots,
              int64_t capacity) {
  for (int64_t row = 0; row < rows; ++row) {
    if (slot[row] < 0 || slot[row] >= slots) {
      PyErr_Format(PyExc_ValueError, "slots[%lld] = %lld: expected 0..%lld, as the cache has", (long long)row,
                   (long long)slot[row], (long long)slots - 1);
      return false;
    }
    for (int64_t i = 0; i < block; ++i) {
      const int64_t p = position[row * block + i];
      if (p >= 0 && p < capacity) continue;
      PyErr_Format(PyExc_ValueError, "positions[%lld, %lld] = %lld: expected 0..%lld, the capacity of the cache",
                   (long long)row, (long long)i, (long long)p, (long long)capacity - 1);
      return false;
    }
  }
  return true;
}

bool has_arguments(Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) PyErr_Format(PyExc_TypeError, "%zd arguments: expected %zd", count, expected);
  return count == expected;
}

}  // namespace

void use_ragged_loops(const char* instruction_set) {
  loops = &ragged_baseline;
#ifdef GENARM_X86
  if (!std::strncmp(instruction_set, "avx512", 6)) loops = &ragged_avx512;  // avx512_bf16 too
  if (!std::strcmp(instruction_set, "avx2")) loops = &ragged_avx2;
#endif
}

// query, keys, values: (address, shape, strides) each; addresses of slots, positions and out; bfloat16, scale, window,
// softcap
PyObject* ragged_attention_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_arguments(count, 16)) return nullptr;
  RaggedAttention call;
  int64_t query_shape[4], key_shape[4], value_shape[4];
  call.query = pointer<void>(arguments[0]);
  call.keys = pointer<void>(arguments[3]);
  call.values = pointer<void>(arguments[6]);
  unpack(arguments[1], query_shape), unpack(arguments[2], call.query_strides);
  unpack(arguments[4], key_shape), unpack(arguments[5], call.key_strides);
  unpack(arguments[7], value_shape), unpack(arguments[8], call.value_strides);
  call.slots = pointer<int64_t>(arguments[9]);
  call.positions = pointer<int64_t>(arguments[10]);
  call.out = pointer<void>(arguments[11]);
  call.bfloat16 = PyObject_IsTrue(arguments[12]);
  call.scale = static_cast<float>(PyFloat_AsDouble(arguments[13]));
  call.window = PyLong_AsLongLong(arguments[14]);
  call.softcap = static_cast<float>(PyFloat_AsDouble(arguments[15]));
  if (PyErr_Occurred()) return nullptr;
  call.rows = query_shape[0], call.heads = query_shape[1], call.block = query_shape[2], call.width = query_shape[3];
  call.kv_heads = key_shape[1], call.value_width = value_shape[3];
  if (!in_range(call.slots, call.positions, call.rows, call.block, key_shape[0], key_shape[2])) return nullptr;
  try {
    const WithoutGil without_gil;
    ragged_attention(call, *loops);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_NONE;
}

// keys, values, new keys, new values: (address, shape, strides) each; addresses of slots and positions; element size
PyObject* ragged_append_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_arguments(count, 15)) return nullptr;
  RaggedCopy copies[2];
  int64_t cache_shape[4], shape[4];
  const int64_t unit = PyLong_AsLongLong(arguments[14]);
  for (int i = 0; i < 2; ++i) {
    RaggedCopy& copy = copies[i];
    PyObject* const* target = arguments + 3 * i;
    PyObject* const* source = arguments + 6 + 3 * i;
    copy.target = pointer<char>(target[0]);
    copy.source = pointer<char>(source[0]);
    unpack(target[1], cache_shape), unpack(target[2], copy.target_strides, unit);
    unpack(source[1], shape), unpack(source[2], copy.source_strides, unit);
    copy.rows = shape[0], copy.heads = shape[1], copy.block = shape[2], copy.bytes = shape[3] * unit;
    copy.slots = pointer<int64_t>(arguments[12]);
    copy.positions = pointer<int64_t>(arguments[13]);
  }
  if (PyErr_Occurred()) return nullptr;
  if (!in_range(copies[0].slots, copies[0].positions, shape[0], shape[2], cache_shape[0], cache_shape[2])) {
    return nullptr;
  }
  for (const RaggedCopy& copy : copies) ragged_copy(copy);
  Py_RETURN_NONE;
}

}  // namespace genarm
