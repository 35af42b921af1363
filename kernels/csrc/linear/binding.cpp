// Turns Python arguments into calls of small_linear and quant_linear. Python has checked the tensors of a `Linears`
// object. This file checks the arguments of each call.
#include <cstddef>
#include <cstring>
#include <new>

#include "common/tensors.h"
#include "linears.h"
#include "loops.h"
#include "quant_linear/loops.h"
#include "small_linear/loops.h"

namespace genarm {
namespace {

constexpr int kMaxDimensions = 8;

constexpr LinearTables kBaseline{{nullptr, &output_baseline}, {nullptr, nullptr}, &quant_baseline};

LinearTables tables = kBaseline;

// A Python object that holds linears of one width in its own memory, which saves one cache miss before the weights.
struct Linears {
  PyVarObject head;
  Linear linear[1];
};

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  for (Py_ssize_t i = 0; i < Py_SIZE(self); ++i) reinterpret_cast<Linears*>(self)->linear[i].~Linear();
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

const void* address(PyObject* number) { return PyLong_AsVoidPtr(number); }

// Fills in a linear from (address of the weight, address of the bias or 0, out, in, LoRAs, bits). Each LoRA is (address
// of a, address of b, rank, scale). Sets a Python error for anything else.
void fill(PyObject* tuple, Linear* linear) {
  PyObject *weight, *bias, *loras, *a, *b;
  long long out, in, rank;
  float scale;
  if (!PyArg_ParseTuple(tuple, "OOLLO!i", &weight, &bias, &out, &in, &PyTuple_Type, &loras, &linear->bits)) return;
  linear->loops = tables;
  linear->weight = address(weight), linear->packed = static_cast<const uint8_t*>(linear->weight);
  linear->bias = address(bias), linear->out = out, linear->in = in;
  for (Py_ssize_t i = 0; i < PyTuple_Size(loras); ++i) {
    if (!PyArg_ParseTuple(PyTuple_GetItem(loras, i), "OOLf", &a, &b, &rank, &scale)) return;
    linear->loras.push_back({address(a), address(b), rank, scale});
  }
}

// Returns the type of a linear's inputs and outputs.
ElementType type_of(const Linear& linear) { return linear.is_float32() ? kFloat32 : kBfloat16; }

// Gives the number of x's rows and the stride between them. Returns false for another type or width than the linear's,
// or if the rows do not have one stride.
bool rows_of(const DLTensor& x, const Linear& linear, int64_t* rows, int64_t* stride) {
  const int64_t in = linear.in;
  if (!(type_of(x) == type_of(linear)) || x.ndim < 1 || x.ndim > kMaxDimensions || x.shape[x.ndim - 1] != in) return false;
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

// Form of the outputs: a tensor for each linear, or one tensor with the outputs of all linears as its columns.
enum class Form { kEach, kStacked };

// Allocates the outputs and points `products` to them. Returns a tuple of tensors [..., out], or one tensor
// [..., sum of out]; null with a Python error set.
PyObject* outputs_of(const DLTensor& x, Form form, std::vector<Product>* products) {
  int64_t shape[kMaxDimensions], columns = 0;
  void* data = nullptr;
  const ElementType type = type_of(x);
  std::memcpy(shape, x.shape, x.ndim * sizeof *shape);
  if (form == Form::kStacked) {
    for (const Product& product : *products) columns += product.linear->out;
    shape[x.ndim - 1] = columns;
    PyObject* y = new_tensor(type, x.ndim, shape, &data);
    char* next = static_cast<char*>(data);
    for (Product& product : *products) {
      product.y = next, product.stride = columns, next += product.linear->out * (type.bits / 8);
    }
    return y;
  }
  PyObject* all = PyTuple_New(static_cast<Py_ssize_t>(products->size()));
  for (size_t i = 0; all && i < products->size(); ++i) {
    Product& product = (*products)[i];
    shape[x.ndim - 1] = product.stride = product.linear->out;
    PyObject* y = new_tensor(type, x.ndim, shape, &data);
    if (!y) {
      Py_DECREF(all);
      return nullptr;
    }
    product.y = data;
    PyTuple_SetItem(all, static_cast<Py_ssize_t>(i), y);
  }
  return all;
}

PyObject* outputs(PyObject* self, PyObject* const* arguments, Py_ssize_t count, Form form) {
  const Linear* const linears = reinterpret_cast<Linears*>(self)->linear;
  const Py_ssize_t n = Py_SIZE(self);
  if (count != 1 + n) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected %zd", count, 1 + n);
  DLTensor x;
  int64_t rows = 0, stride = 0;
  if (!borrow(arguments[0], &x) || !rows_of(x, linears[0], &rows, &stride)) Py_RETURN_NONE;
  const int wanted = threads();
  PyObject* results = nullptr;
  try {
    std::vector<Product> products(n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      products[i].linear = &linears[i];
      const int64_t loras = static_cast<int64_t>(linears[i].loras.size());
      if (!spans_of(arguments[1 + i], loras, rows, &products[i].spans)) return nullptr;
    }
    if (!(results = outputs_of(x, form, &products))) return nullptr;
    const WithoutGil without_gil;
    multiply(&products, x.at<const void>(), stride, rows, wanted);
  } catch (const std::bad_alloc&) {
    Py_XDECREF(results);
    return PyErr_NoMemory();
  }
  return results;
}

PyObject* run(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return outputs(self, arguments, count, Form::kEach);
}

PyObject* run_stacked(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return outputs(self, arguments, count, Form::kStacked);
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyObject* linears_type() {
  // Both methods take (x, spans of the first linear, spans of the second, ...) by position.
  static PyMethodDef methods[] = {
      {"run", fast(run), METH_FASTCALL, "The outputs of each, a tuple; None for an x that they do not take."},
      {"run_stacked", fast(run_stacked), METH_FASTCALL, "The outputs of all, side by side; or None."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)}, {Py_tp_methods, methods}, {0, nullptr}};
  static PyType_Spec spec{"genarm_fast.kernels._C.Linears", offsetof(Linears, linear), sizeof(Linear),
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyObject* type = nullptr;  // The GIL guards it. A guard of C++ could deadlock with the GIL.
  if (!type) type = PyType_FromSpec(&spec);
  return type;
}

}  // namespace

void use_linear_loops(const char* instruction_set) {
  tables = kBaseline;
#ifdef GENARM_X86
  constexpr LinearTables kAvx512{{&linear_avx512, &output_avx512}, {&float_linear_avx512, &float_output_avx512}, &quant_avx512};
  if (!std::strcmp(instruction_set, "avx2")) {
    tables = {{&linear_avx2, &output_avx2}, {&float_linear_avx2, &float_output_avx2}, &quant_avx2};
  }
  if (!std::strncmp(instruction_set, "avx512", 6)) tables = kAvx512;
  if (!std::strcmp(instruction_set, "avx512vnni")) tables.quant = &quant_avx512vnni;
  if (!std::strcmp(instruction_set, "avx512bf16")) tables.quant = &quant_avx512vnni, tables.bfloat16.small = &linear_avx512bf16;
#endif
  (void)instruction_set;
}

LinearTables linear_tables() { return tables; }

const Linear* linears_in(PyObject* object, Py_ssize_t count) {
  if (Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(linears_type()) && Py_SIZE(object) == count) {
    return reinterpret_cast<Linears*>(object)->linear;
  }
  if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%R: expected Linears, %zd of them", object, count);
  return nullptr;
}

bool spans_of(PyObject* sequence, int64_t loras, int64_t rows, std::vector<Span>* out) {
  const Py_ssize_t count = PySequence_Size(sequence);
  if (count < 0) PyErr_Format(PyExc_TypeError, "spans=%R: expected a sequence of (first row, last row, LoRA)", sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    long long first, last, lora;
    PyObject* span = PySequence_GetItem(sequence, i);
    if (!span) return false;
    const bool parsed = PyTuple_Check(span) && PyArg_ParseTuple(span, "LLL", &first, &last, &lora);
    if (!parsed) PyErr_Format(PyExc_TypeError, "span %R: expected (first row, last row, LoRA), three ints", span);
    Py_DECREF(span);
    if (!parsed) return false;
    if (first < 0 || first > last || last > rows || lora < 0 || lora >= loras) {
      PyErr_Format(PyExc_ValueError, "span (%lld, %lld, %lld): expected rows within 0..%lld, one of %lld LoRAs", first,
                   last, lora, static_cast<long long>(rows), static_cast<long long>(loras));
      return false;
    }
    out->push_back({first, last, lora});
  }
  return count >= 0;
}

// Takes a tuple of linears of one width, each as `fill` takes it. Returns Linears that keep the loops of the
// instruction set now in use. Returns None if it has no loops for them, or if some linears take float32 and some
// bfloat16.
PyObject* linears(PyObject*, PyObject* all) {
  const Py_ssize_t n = PyTuple_Size(all);
  if (n < 1) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_TypeError, "expected one linear or more");
  PyObject* type = linears_type();
  PyObject* self = type ? PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), n) : nullptr;
  if (!self) return nullptr;
  Linear* const made = reinterpret_cast<Linears*>(self)->linear;
  for (Py_ssize_t i = 0; i < n; ++i) new (made + i) Linear{};
  try {
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); ++i) fill(PyTuple_GetItem(all, i), made + i);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  bool runs = true;
  for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); ++i) {
    const bool has_loops = made[i].is_float32() ? tables.float32.small != nullptr : tables.bfloat16.small != nullptr;
    runs = runs && made[i].is_float32() == made[0].is_float32() && (has_loops || (made[i].bits < 16 && made[i].loras.empty()));
  }
  if (PyErr_Occurred()) Py_CLEAR(self);
  if (runs || !self) return self;
  Py_DECREF(self);
  Py_RETURN_NONE;
}

}  // namespace genarm
