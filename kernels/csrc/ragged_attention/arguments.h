// Checks of arguments that ops over a static cache share.
#pragma once

#include "common/tensors.h"
#include "ragged_attention.h"

namespace genarm {

// Takes a tensor of four dimensions, contiguous in the last; false for others.
bool rows_of_vectors(PyObject* object, DLTensor* out);

// Takes keys and values from in[0] and in[1]; false if they do not have the same slots, heads and capacity.
bool ragged_cache(PyObject* const* in, DLTensor* keys, DLTensor* values);

// Takes slots and positions from in[0] and in[1], int64 [rows] and [rows, block]; false for others.
bool ragged_places(PyObject* const* in, int64_t rows, int64_t block, Places* out);

// Whether the cache has every slot and position; if not, a ValueError is set.
bool places_in_range(const Places& places, int64_t rows, int64_t block, const DLTensor& cache);

}  // namespace genarm
