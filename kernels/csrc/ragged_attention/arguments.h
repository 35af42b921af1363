// Arguments that ops over a static cache share.
#pragma once

#include "common/tensors.h"
#include "ragged_attention.h"

namespace genarm {

// A tensor of four dimensions, contiguous in the last.
bool rows_of_vectors(PyObject* object, DLTensor* out);

// Keys and values, in[0] and in[1], that share slots, heads and capacity.
bool ragged_cache(PyObject* const* in, DLTensor* keys, DLTensor* values);

// in[0] and in[1]: int64 [rows] and [rows, block]
bool ragged_places(PyObject* const* in, int64_t rows, int64_t block, Places* out);

// Whether the cache has every slot and position; else a ValueError is set.
bool places_in_range(const Places& places, int64_t rows, int64_t block, const DLTensor& cache);

}  // namespace genarm
