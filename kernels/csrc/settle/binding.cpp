// settle on the CPU; kernels/ops/settle/reference.py is the specification.
#include <algorithm>

#include "common/tensors.h"

namespace genarm {
namespace {

enum Argument { kTargets, kDrafts, kLengths, kLimits, kFinished, kStopIds, kDraftCounts, kArguments };

struct Matrix {  // a view of an int64 tensor; a vector has one column
  const int64_t* data;
  int64_t rows, columns, row_stride, column_stride;

  int64_t at(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

bool matrix(PyObject* object, Matrix* out) {
  DLTensor tensor;
  if (!borrow(object, &tensor) || !(type_of(tensor) == kInt64) || tensor.ndim != 2) return false;
  *out = {tensor.at<int64_t>(), tensor.shape[0], tensor.shape[1], tensor.strides[0], tensor.strides[1]};
  return true;
}

bool column(PyObject* object, int64_t rows, ElementType type, DLTensor* out) {
  return borrow(object, out) && type_of(*out) == type && out->ndim == 1 && out->shape[0] == rows;
}

bool column(PyObject* object, int64_t rows, Matrix* out) {
  DLTensor tensor;
  if (!column(object, rows, kInt64, &tensor)) return false;
  *out = {tensor.at<int64_t>(), rows, 1, tensor.strides[0], 0};
  return true;
}

// Takes stop ids [rows, S], or [S] for every row; false for others.
bool stops(PyObject* object, int64_t rows, Matrix* out) {
  DLTensor tensor;
  if (matrix(object, out)) return out->rows == rows;
  if (!borrow(object, &tensor) || !(type_of(tensor) == kInt64) || tensor.ndim != 1) return false;
  *out = {tensor.at<int64_t>(), rows, tensor.shape[0], 0, tensor.strides[0]};
  return true;
}

}  // namespace

PyObject* settle_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (count != kArguments) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected %d", count, int{kArguments});
  Matrix targets, drafts, lengths, limits, stop_ids, draft_counts;
  DLTensor finished;
  if (!matrix(in[kTargets], &targets) || targets.columns < 1 || !matrix(in[kDrafts], &drafts)) Py_RETURN_NONE;
  const int64_t rows = targets.rows, width = targets.columns;
  if (drafts.rows != rows || drafts.columns != width - 1 || !column(in[kLengths], rows, &lengths) ||
      !column(in[kLimits], rows, &limits) || !column(in[kFinished], rows, kBool, &finished) ||
      !stops(in[kStopIds], rows, &stop_ids)) {
    Py_RETURN_NONE;
  }
  const bool ragged = in[kDraftCounts] != Py_None;
  if (ragged && !column(in[kDraftCounts], rows, &draft_counts)) Py_RETURN_NONE;

  Outputs outputs(4);
  int64_t *counts, *next_tokens, *new_lengths;
  bool* new_finished;
  outputs.add(0, kInt64, {rows}, &counts);
  outputs.add(1, kInt64, {rows}, &next_tokens);
  outputs.add(2, kInt64, {rows}, &new_lengths);
  outputs.add(3, kBool, {rows}, &new_finished);
  if (outputs.failed()) return nullptr;

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t length = lengths.at(row, 0), limit = limits.at(row, 0);
    const int64_t drafted = ragged ? std::min(draft_counts.at(row, 0), width - 1) : width - 1;
    const bool done = finished.at<uint8_t>()[row * finished.strides[0]] != 0;
    // Unsigned, because int64 may not hold the difference of two int64 numbers.
    const uint64_t room = limit > length ? static_cast<uint64_t>(limit) - static_cast<uint64_t>(length) : 0;
    const int64_t most = done ? 0 : static_cast<int64_t>(std::min<uint64_t>(room, width));
    int64_t settled = 0;
    bool stopped = false;
    for (bool right = true; right && !stopped && settled < most; ++settled) {
      const int64_t token = targets.at(row, settled);
      for (int64_t i = 0; i < stop_ids.columns; ++i) stopped |= stop_ids.at(row, i) == token;
      right = settled < drafted && drafts.at(row, settled) == token;
    }
    counts[row] = settled;
    next_tokens[row] = targets.at(row, std::max<int64_t>(settled - 1, 0));
    new_lengths[row] = length + settled;
    new_finished[row] = done || stopped || length + settled >= limit;
  }
  return outputs.release();
}

}  // namespace genarm
