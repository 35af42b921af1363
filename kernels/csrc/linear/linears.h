// Access to the linears that Python prepared once, for calls that run several of them.
#pragma once

#include <vector>

#include "common/bindings.h"
#include "linear.h"

namespace genarm {

// Returns the `count` linears of an object that Python's `linears` made; the object must outlive them. Returns null,
// with a Python error set, for another type of object or another number of linears.
const Linear* linears_in(PyObject* object, Py_ssize_t count);

// Appends a Python sequence of (first row, last row, index of a LoRA) to `out`. Returns false, with a Python error set,
// for another object, a row beyond `rows`, or an index that is not below `loras`.
bool spans_of(PyObject* sequence, int64_t loras, int64_t rows, std::vector<Span>* out);

// Multiplies x by linears of one width and one type of inputs: those with 32 or 16 bits by small_linear first, then the
// others by quant_linear. Empties `products`. Throws std::bad_alloc.
void multiply(std::vector<Product>* products, const void* x, int64_t x_stride, int64_t rows, int threads);

}  // namespace genarm
