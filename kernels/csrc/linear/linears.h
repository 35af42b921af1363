// Linears that Python made once, for calls that run several of them.
#pragma once

#include <vector>

#include "common/bindings.h"
#include "linear.h"

namespace genarm {

// Those of an object that `linears` returned, which must outlive them; null with a Python error set if it is no such
// object, or has another number of them.
const Linear* linears_in(PyObject* object, Py_ssize_t count);

// A sequence of (first row, last row, index of one of so many LoRAs); false with a Python error set.
bool spans_of(PyObject* sequence, int64_t loras, int64_t rows, std::vector<Span>* out);

// Linears of one width and type of inputs, whatever their bits: those of 16 first. Empties `products`. Throws std::bad_alloc.
void multiply(std::vector<Product>* products, const void* x, int64_t x_stride, int64_t rows, int threads);

}  // namespace genarm
