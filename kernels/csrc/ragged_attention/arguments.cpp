#include "arguments.h"

namespace genarm {

bool rows_of_vectors(PyObject* object, DLTensor* out) {
  return borrow(object, out) && out->ndim == 4 && (out->strides[3] == 1 || out->shape[3] == 1);
}

bool ragged_cache(PyObject* const* in, DLTensor* keys, DLTensor* values) {
  return rows_of_vectors(in[0], keys) && rows_of_vectors(in[1], values) && keys->shape[0] == values->shape[0] &&
         keys->shape[1] == values->shape[1] && keys->shape[2] == values->shape[2] && keys->shape[1] > 0;
}

bool ragged_places(PyObject* const* in, int64_t rows, int64_t block, Places* out) {
  DLTensor slots, positions;
  if (!borrow(in[0], &slots) || !(type_of(slots) == kInt64) || slots.ndim != 1 || slots.shape[0] != rows) return false;
  if (!borrow(in[1], &positions) || !(type_of(positions) == kInt64) || positions.ndim != 2) return false;
  *out = {slots.at<int64_t>(), positions.at<int64_t>(), slots.strides[0], positions.strides[0], positions.strides[1]};
  return positions.shape[0] == rows && positions.shape[1] == block;
}

bool places_in_range(const Places& places, int64_t rows, int64_t block, const DLTensor& cache) {
  for (int64_t row = 0; row < rows; ++row) {
    if (const int64_t slot = places.slot(row); slot < 0 || slot >= cache.shape[0]) {
      PyErr_Format(PyExc_ValueError, "slots[%zd] = %zd: expected 0..%zd, as the cache has", Py_ssize_t(row),
                   Py_ssize_t(slot), Py_ssize_t(cache.shape[0] - 1));
      return false;
    }
    for (int64_t i = 0; i < block; ++i) {
      const int64_t position = places.position(row, i);
      if (position >= 0 && position < cache.shape[2]) continue;
      PyErr_Format(PyExc_ValueError, "positions[%zd, %zd] = %zd: expected 0..%zd, the capacity of the cache",
                   Py_ssize_t(row), Py_ssize_t(i), Py_ssize_t(position), Py_ssize_t(cache.shape[2] - 1));
      return false;
    }
  }
  return true;
}

}  // namespace genarm
