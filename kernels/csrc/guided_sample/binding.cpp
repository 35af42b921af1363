// Calls guided_sample with Python's arguments. Returns None for arguments that cpu.py has to convert or to refuse.
#include <cmath>
#include <limits>
#include <new>

#include "common/tensors.h"
#include "guided_sample.h"

namespace genarm {
namespace {

enum Argument {  // SamplingArguments of kernels/ops/guided_sample/arguments.py
  kBase, kArms, kWeights, kSeeds, kPositions, kTemperature, kTopK, kTopP, kMinP, kVocab, kBias, kLogprobs, kTopLogprobs,
  kArguments
};  // clang-format off

// Whether a value is an int or a float within low .. high. A NaN is not.
bool number(PyObject* value, double low, double high, float* out) {
  double found;
  if (PyFloat_CheckExact(value)) {
    found = PyFloat_AsDouble(value);
  } else if (PyLong_CheckExact(value)) {
    found = PyLong_AsDouble(value);
    if (PyErr_Occurred()) return PyErr_Clear(), false;
  } else {
    return false;
  }
  *out = static_cast<float>(found);
  return found >= low && found <= high;
}

bool number(PyObject* value, uint64_t low, uint64_t high, int64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  const uint64_t found = PyLong_AsUnsignedLongLong(value);  // sets an error for negative numbers
  if (PyErr_Occurred()) return PyErr_Clear(), false;
  *out = static_cast<int64_t>(found);
  return found >= low && found <= high;
}

// Takes a number in its range, or a tensor [], [R] or [R, q] of the parameter's own dtype; false for others.
template <typename T, typename Bound>
bool parameter(PyObject* value, ElementType type, const DLTensor& base, Bound low, Bound high, Parameter<T>* out) {
  DLTensor tensor;
  if (!borrow(value, &tensor)) return number(value, low, high, &out->scalar);
  if (!(type_of(tensor) == type) || tensor.ndim >= base.ndim) return false;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] != base.shape[i]) return false;
  }
  out->data = tensor.at<T>();
  if (tensor.ndim > 0) out->row_stride = tensor.strides[0];
  if (tensor.ndim > 1) out->block_stride = tensor.strides[1];
  return true;
}

// Takes a parameter that may also be None, which stands for `off`, the number that keeps all tokens.
template <typename T, typename Bound>
bool filter(PyObject* value, ElementType type, const DLTensor& base, Bound low, Bound high, Bound off,
            Parameter<T>* out) {
  out->scalar = static_cast<T>(off);
  return value == Py_None || parameter(value, type, base, low, high, out);
}

// Takes logits [R, V] or [R, q, V] of one of three dtypes, contiguous in V; false for others.
bool logits(PyObject* object, DLTensor* tensor, Member* out) {
  if (!borrow(object, tensor) || tensor->ndim < 2 || tensor->ndim > 3) return false;
  const ElementType type = type_of(*tensor);
  if (type == kFloat32) {
    out->dtype = Dtype::kFloat32;
  } else if (type == kBfloat16) {
    out->dtype = Dtype::kBfloat16;
  } else if (type == kFloat16) {
    out->dtype = Dtype::kFloat16;
  } else {
    return false;
  }
  out->data = tensor->at<void>();
  out->row_stride = tensor->strides[0], out->block_stride = tensor->ndim == 3 ? tensor->strides[1] : 0;
  return tensor->strides[tensor->ndim - 1] == 1;
}

// Takes a float32 tensor [width] or [rows, width], contiguous in its last dimension; false for others. wider: its last
// dimension may be larger than `width`.
bool rows_of_floats(const DLTensor& tensor, int64_t rows, int64_t width, bool wider, const float** data,
                    int64_t* stride) {
  if (!(type_of(tensor) == kFloat32) || tensor.ndim < 1 || tensor.ndim > 2) return false;
  const int64_t found = tensor.shape[tensor.ndim - 1];
  if (found < width || (found > width && !wider) || (found > 1 && tensor.strides[tensor.ndim - 1] != 1)) return false;
  if (tensor.ndim == 2 && tensor.shape[0] != rows) return false;
  *data = tensor.at<float>(), *stride = tensor.ndim == 2 ? tensor.strides[0] : 0;
  return true;
}

// Fills the request from all arguments but the base; false for arguments to convert or to refuse. `buffer` holds
// weights that are numbers.
bool fill(PyObject* const* in, const DLTensor& base, Request* q, std::vector<float>* buffer) {
  const Py_ssize_t arms = PyTuple_CheckExact(in[kArms])  ? PyTuple_Size(in[kArms])
                          : PyList_CheckExact(in[kArms]) ? PyList_Size(in[kArms])
                                                         : -1;
  if (arms < 0) return false;
  int64_t narrowest = base.shape[base.ndim - 1];
  for (Py_ssize_t i = 0; i < arms; ++i) {
    DLTensor arm;
    Member member;
    if (!logits(PyTuple_CheckExact(in[kArms]) ? PyTuple_GetItem(in[kArms], i) : PyList_GetItem(in[kArms], i), &arm,
                &member)) {
      return false;
    }
    if (arm.ndim != base.ndim || arm.shape[0] != base.shape[0]) return false;
    if (arm.ndim == 3 && arm.shape[1] != base.shape[1]) return false;
    if (arm.shape[arm.ndim - 1] < narrowest) narrowest = arm.shape[arm.ndim - 1];
    q->members.push_back(member);
  }
  q->vocab = narrowest;
  if (in[kVocab] != Py_None && !number(in[kVocab], uint64_t{1}, static_cast<uint64_t>(narrowest), &q->vocab)) {
    return false;
  }
  if (q->vocab < 1 || !number(in[kTopLogprobs], uint64_t{0}, static_cast<uint64_t>(q->vocab), &q->top_n)) return false;

  DLTensor tensor;
  if (borrow(in[kWeights], &tensor)) {
    if (!rows_of_floats(tensor, q->rows, arms, false, &q->weights, &q->weights_row_stride)) return false;
  } else {
    if (!PyList_CheckExact(in[kWeights]) || PyList_Size(in[kWeights]) != arms) return false;
    buffer->resize(arms);
    for (Py_ssize_t i = 0; i < arms; ++i) {
      PyObject* weight = PyList_GetItem(in[kWeights], i);
      if (!PyFloat_CheckExact(weight)) return false;
      (*buffer)[i] = static_cast<float>(PyFloat_AsDouble(weight));
    }
    q->weights = buffer->data();
  }
  if (in[kBias] != Py_None) {
    if (!borrow(in[kBias], &tensor)) return false;
    if (!rows_of_floats(tensor, q->rows, q->vocab, true, &q->bias, &q->bias_row_stride)) return false;
  }
  constexpr double kHottest = std::numeric_limits<float>::max();
  constexpr uint64_t kInt64Max = std::numeric_limits<int64_t>::max();
  return parameter(in[kTemperature], kFloat32, base, 0., kHottest, &q->temperature) &&
         filter(in[kTopK], kInt64, base, uint64_t{0}, kInt64Max, uint64_t{0}, &q->top_k) &&
         filter(in[kTopP], kFloat32, base, 0., 1., 1., &q->top_p) &&
         filter(in[kMinP], kFloat32, base, 0., 1., 0., &q->min_p) &&
         parameter(in[kSeeds], kInt64, base, uint64_t{0}, ~uint64_t{0}, &q->seeds) &&
         parameter(in[kPositions], kInt64, base, uint64_t{0}, uint64_t{0xffffffff}, &q->positions);
}

}  // namespace

PyObject* guided_sample_binding(const TileLoops& loops, PyObject* const* in, Py_ssize_t count) {
  if (count != kArguments) return PyErr_Format(PyExc_TypeError, "%zd arguments: expected %d", count, int{kArguments});
  try {
    DLTensor base;
    Request q{};
    std::vector<float> weights;
    q.members.emplace_back();
    if (!logits(in[kBase], &base, &q.members[0])) Py_RETURN_NONE;
    const bool blocks = base.ndim == 3;
    q.rows = base.shape[0], q.block = blocks ? base.shape[1] : 1;
    if (!fill(in, base, &q, &weights)) Py_RETURN_NONE;

    Outputs outputs(6);
    const auto add = [&](int index, ElementType type, auto** data) {
      blocks ? outputs.add(index, type, {q.rows, q.block}, data) : outputs.add(index, type, {q.rows}, data);
    };
    const auto add_top = [&](int index, ElementType type, auto** data) {
      blocks ? outputs.add(index, type, {q.rows, q.block, q.top_n}, data)
             : outputs.add(index, type, {q.rows, q.top_n}, data);
    };
    add(0, kInt64, &q.tokens);
    add(1, kInt32, &q.status);
    if (PyObject_IsTrue(in[kLogprobs]) || q.top_n > 0) {
      const int64_t members = static_cast<int64_t>(q.members.size());
      add(2, kFloat32, &q.logprobs);
      blocks ? outputs.add(3, kFloat32, {members, q.rows, q.block}, &q.member_logprobs)
             : outputs.add(3, kFloat32, {members, q.rows}, &q.member_logprobs);
    }
    if (q.top_n > 0) {
      add_top(4, kInt64, &q.top_tokens);
      add_top(5, kFloat32, &q.top_logprobs);
    }
    if (outputs.failed()) return nullptr;
    const int wanted = threads();
    {
      const WithoutGil without_gil;
      guided_sample(q, loops, wanted);
    }
    return outputs.release();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

}  // namespace genarm
