// Called from Python: the search for codes that give a matrix back bit for bit, and outputs of a packed weight.
#include <algorithm>
#include <atomic>

#include "common/pool.h"
#include "common/tensors.h"
#include "linear/linear.h"
#include "loops.h"

namespace genarm {

constexpr int64_t kThreadValues = 1 << 16;  // values for one thread: 0.1 ms of work; waking one takes a tenth of it

// (weight bfloat16 [out, in], bits) → (codes [out, groups · 32], scales [out, groups], minimums [out, groups] or None).
// False if the search finds no codes that give the weight back, and None for other arguments.
PyObject* exact_codes_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (!takes(count, 2)) return nullptr;
  DLTensor weight;
  const long bits = PyLong_AsLong(in[1]);
  if (PyErr_Occurred()) return nullptr;
  if (!borrow(in[0], &weight) || !(type_of(weight) == kBfloat16) || weight.ndim != 2 || !contiguous(weight) ||
      (bits != 8 && bits != 4)) {
    Py_RETURN_NONE;
  }
  const int64_t out = weight.shape[0], width = weight.shape[1], groups = (width + kGroup - 1) / kGroup;
  Outputs outputs(3);
  uint8_t* codes = nullptr;
  uint16_t *scales = nullptr, *minimums = nullptr;
  outputs.add(0, bits == 8 ? kInt8 : kUint8, {out, groups * kGroup}, &codes);
  outputs.add(1, kFloat16, {out, groups}, &scales);
  if (bits == 4) outputs.add(2, kFloat16, {out, groups}, &minimums);
  if (outputs.failed()) return nullptr;
  std::atomic<bool> found{true};
  const int wanted = threads();
  const QuantLoops& loops = *linear_tables().quant;
  {
    const WithoutGil without_gil;
    parallel(wanted, out, [&](int64_t first, int64_t last) {
      for (int64_t at = first * groups; at < last * groups && found.load(std::memory_order_relaxed); ++at) {
        const int64_t begin = at % groups * kGroup;
        const uint16_t* from = weight.at<const uint16_t>() + at / groups * width + begin;
        uint16_t short_one[kGroup];
        if (width - begin < kGroup) {  // a short group repeats its last value, which changes neither minimum nor scale
          for (int i = 0; i < kGroup; ++i) short_one[i] = from[std::min<int64_t>(i, width - begin - 1)];
          from = short_one;
        }
        uint16_t none;
        if (!loops.grid(static_cast<int>(bits), from, codes + at * kGroup, scales + at,
                               bits == 4 ? minimums + at : &none)) {
          found = false;
        }
      }
    });
  }
  if (!found) Py_RETURN_FALSE;
  return outputs.release();
}

// (packed uint8, indices int64 [...], out, width, bits) → (bfloat16 [n, width],): the outputs of these indices. None
// for other arguments.
PyObject* quant_rows_binding(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (!takes(count, 5)) return nullptr;
  DLTensor packed, indices;
  const long long out = PyLong_AsLongLong(in[2]), width = PyLong_AsLongLong(in[3]), bits = PyLong_AsLongLong(in[4]);
  if (PyErr_Occurred()) return nullptr;
  if (!borrow(in[0], &packed) || !(type_of(packed) == kUint8) || !contiguous(packed) || !borrow(in[1], &indices) ||
      !(type_of(indices) == kInt64) || !contiguous(indices) || (bits != 8 && bits != 4)) {
    Py_RETURN_NONE;
  }
  int64_t size = 1, rows = 1;
  for (int i = 0; i < packed.ndim; ++i) size *= packed.shape[i];
  for (int i = 0; i < indices.ndim; ++i) rows *= indices.shape[i];
  if (width < 1 || width > 2 * size || out < 1 || out > size) Py_RETURN_NONE;  // keeps products below from overflowing
  const int64_t groups = (width + kGroup - 1) / kGroup, tiles = (out + kTileOutputs - 1) / kTileOutputs;
  const int64_t tile_bytes = groups * group_bytes(static_cast<int>(bits));
  if (size % tile_bytes || size / tile_bytes != tiles) Py_RETURN_NONE;
  const int64_t* const index = indices.at<const int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    if (index[i] >= 0 && index[i] < out) continue;
    return PyErr_Format(PyExc_IndexError, "index %lld: expected one of %lld rows", static_cast<long long>(index[i]), out);
  }
  Outputs outputs(1);
  uint16_t* y = nullptr;
  outputs.add(0, kBfloat16, {rows, width}, &y);
  if (outputs.failed()) return nullptr;
  const int wanted = rows * width < kThreadValues ? 1 : threads();
  const QuantLoops& loops = *linear_tables().quant;
  {
    const WithoutGil without_gil;
    parallel(wanted, rows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const uint8_t* tile = packed.at<const uint8_t>() + index[i] / kTileOutputs * tile_bytes;
        loops.output(static_cast<int>(bits), tile, static_cast<int>(index[i] % kTileOutputs), width, y + i * width);
      }
    });
  }
  return outputs.release();
}

}  // namespace genarm
