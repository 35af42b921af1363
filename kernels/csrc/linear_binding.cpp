// Python arguments → small_linear. The tensors of `linear_prepare` were checked in Python, a call's are here.
#include <cstring>
#include <memory>
#include <new>

#include "small_linear.h"
#include "tensors.h"

namespace genarm {
namespace {

constexpr char kCapsule[] = "genarm.linear";
constexpr int kMaxDimensions = 8;

const LinearLoops* loops = nullptr;

void destroy(PyObject* capsule) { delete static_cast<Linear*>(PyCapsule_GetPointer(capsule, kCapsule)); }

const uint16_t* address(PyObject* number) { return static_cast<const uint16_t*>(PyLong_AsVoidPtr(number)); }

// Rows of x if they lie one after the other, or have one stride; the widths are checked.
bool rows_of(const DLTensor& x, int64_t in, int64_t* rows, int64_t* stride) {
  if (!(type_of(x) == kBfloat16) || x.ndim < 1 || x.ndim > kMaxDimensions || x.shape[x.ndim - 1] != in) return false;
  if (in > 1 && x.strides[x.ndim - 1] != 1) return false;
  *rows = 1, *stride = in;
  for (int i = x.ndim - 2; i >= 0; --i) {
    if (x.shape[i] != 1 && *rows != 0) {
      if (*rows == 1) *stride = x.strides[i];
      if (x.strides[i] != *rows * *stride) return false;
    }
    *rows *= x.shape[i];
  }
  return true;
}

// ((first row, last row, index of LoRA), ...); false with a Python error set.
bool spans_of(PyObject* tuple, const Linear& linear, int64_t rows, std::vector<Span>* out) {
  const Py_ssize_t count = PyTuple_Size(tuple);
  if (count < 0) return false;
  out->reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int64_t loras = static_cast<int64_t>(linear.loras.size());
    long long first, last, lora;
    if (!PyArg_ParseTuple(PyTuple_GetItem(tuple, i), "LLL", &first, &last, &lora)) return false;
    if (first < 0 || first > last || last > rows || lora < 0 || lora >= loras) {
      PyErr_Format(PyExc_ValueError, "span (%lld, %lld, %lld): expected rows within 0..%lld, one of %lld LoRAs", first,
                   last, lora, static_cast<long long>(rows), static_cast<long long>(loras));
      return false;
    }
    out->push_back({first, last, lora});
  }
  return true;
}

}  // namespace

void use_linear_loops(const char* instruction_set) {
  loops = nullptr;
#ifdef GENARM_X86
  if (!std::strcmp(instruction_set, "avx2")) loops = &linear_avx2;
  if (!std::strcmp(instruction_set, "avx512")) loops = &linear_avx512;
#endif
  (void)instruction_set;
}

// Addresses of weight and bias (0: none), out, in, ((address of a, address of b, rank, scale), ...) → a capsule for
// linear_run that keeps the instruction set of now, or None where that has no loops.
PyObject* linear_prepare_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected 5", count);
  if (!loops) Py_RETURN_NONE;
  try {
    auto linear = std::make_unique<Linear>();
    linear->loops = loops;
    linear->weight = address(arguments[0]), linear->bias = address(arguments[1]);
    linear->out = PyLong_AsLongLong(arguments[2]), linear->in = PyLong_AsLongLong(arguments[3]);
    for (Py_ssize_t i = 0; i < PyTuple_Size(arguments[4]); ++i) {
      PyObject *a, *b;
      long long rank;
      float scale;
      if (!PyArg_ParseTuple(PyTuple_GetItem(arguments[4], i), "OOLf", &a, &b, &rank, &scale)) return nullptr;
      linear->loras.push_back({address(a), address(b), rank, scale});
    }
    if (PyErr_Occurred()) return nullptr;
    PyObject* capsule = PyCapsule_New(linear.get(), kCapsule, destroy);
    if (capsule) linear.release();
    return capsule;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// ((capsule, ...) of one width, x, (spans of each), threads) → (y of each), or None for an x that they do not take.
PyObject* linear_run_binding(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected 4", count);
  const Py_ssize_t linears = PyTuple_Size(arguments[0]);
  if (linears < 1 || PyTuple_Size(arguments[2]) != linears) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected one linear or more, and spans for each");
    return nullptr;
  }
  DLTensor x;
  if (!borrow(arguments[1], &x)) Py_RETURN_NONE;
  PyObject* results = nullptr;
  try {
    std::vector<Product> products(linears);
    int64_t rows = 0, stride = 0, shape[kMaxDimensions];
    for (Py_ssize_t i = 0; i < linears; ++i) {
      PyObject* capsule = PyTuple_GetItem(arguments[0], i);
      const auto* linear = static_cast<const Linear*>(PyCapsule_GetPointer(capsule, kCapsule));
      if (!linear) return nullptr;
      if (!rows_of(x, linear->in, &rows, &stride)) Py_RETURN_NONE;
      products[i].linear = linear;
      if (!spans_of(PyTuple_GetItem(arguments[2], i), *linear, rows, &products[i].spans)) return nullptr;
    }
    const int threads = static_cast<int>(PyLong_AsLong(arguments[3]));
    if (PyErr_Occurred() || !(results = PyTuple_New(linears))) return nullptr;
    std::memcpy(shape, x.shape, x.ndim * sizeof *shape);
    for (Py_ssize_t i = 0; i < linears; ++i) {
      shape[x.ndim - 1] = products[i].linear->out;
      void* data = nullptr;
      PyObject* y = new_tensor(kBfloat16, x.ndim, shape, &data);
      if (!y) {
        Py_DECREF(results);
        return nullptr;
      }
      PyTuple_SetItem(results, i, y);
      products[i].y = static_cast<uint16_t*>(data);
    }

    const WithoutGil without_gil;
    small_linear(products, x.at<const uint16_t>(), stride, rows, threads);
  } catch (const std::bad_alloc&) {
    Py_XDECREF(results);
    return PyErr_NoMemory();
  }
  return results;
}

}  // namespace genarm
