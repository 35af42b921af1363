#include "common/tensors.h"

#include <algorithm>

namespace genarm {
namespace {

struct Managed {  // DLPack's DLManagedTensorVersioned
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  DLTensor tensor;
};

struct Exchange {  // DLPack's DLPackExchangeAPI
  uint32_t major, minor;
  Exchange* previous;
  int (*allocate)(DLTensor* prototype, Managed** out, void* context, void (*fail)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, Managed** out);
  int (*object_from_managed)(Managed* tensor, void** object);
  int (*borrow)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

PyTypeObject* tensor_type = nullptr;
const Exchange* exchange = nullptr;
PyObject *is_neg = nullptr, *is_conj = nullptr;  // methods of the class of tensors

// Whether a method of the tensor returns anything but False.
bool tells(PyObject* method, PyObject* tensor) {
  PyObject* answer = PyObject_CallFunctionObjArgs(method, tensor, nullptr);
  const bool yes = answer != Py_False;
  Py_XDECREF(answer);
  PyErr_Clear();
  return yes;
}

// Whether the memory holds the values. PyTorch negates and conjugates lazily (`z.conj().imag`), by a bit of the tensor.
// Only complex tensors and their parts have such a bit. So integers and bfloat16 are not asked for it, which saves a
// decode step 0.15 µs for each tensor.
bool as_stored(PyObject* object, const DLTensor& tensor) {
  constexpr uint8_t kFloat = 2, kComplex = 5;
  if (tensor.code != kFloat && tensor.code != kComplex) return true;
  return !tells(is_neg, object) && !(tensor.code == kComplex && tells(is_conj, object));
}

// Whether the tensor has memory. A wrapper of torch.func, a tensor of zeros that is not yet made, and a tensor whose
// storage was freed have none.
bool in_memory(const DLTensor& tensor) {
  return tensor.data || std::find(tensor.shape, tensor.shape + tensor.ndim, 0) != tensor.shape + tensor.ndim;
}

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); }

}  // namespace

PyObject* use_tensors(PyObject*, PyObject* tensor_class) {
  PyObject* capsule = PyObject_GetAttrString(tensor_class, "__dlpack_c_exchange_api__");
  const void* table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);
  PyErr_Clear();
  const auto* found = static_cast<const Exchange*>(table);
  while (found && found->major != 1) found = found->previous;
  if (!found || !found->borrow) {
    PyErr_SetString(PyExc_ImportError, "torch.Tensor has no DLPack 1 exchange table: expected torch 2.11 or later");
    return nullptr;
  }
  is_neg = PyObject_GetAttrString(tensor_class, "is_neg");
  is_conj = is_neg ? PyObject_GetAttrString(tensor_class, "is_conj") : nullptr;
  if (!is_conj) return nullptr;
  Py_INCREF(tensor_class);  // never released
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor_class);
  exchange = found;
  Py_RETURN_NONE;
}

bool borrow(PyObject* object, DLTensor* out) {
  if (Py_TYPE(object) != tensor_type) return false;  // the memory of a subclass may not hold its values (fake tensors)
  if (exchange->borrow(object, out) == 0) {
    return out->device_type == kCpu && out->lanes == 1 && in_memory(*out) && as_stored(object, *out);
  }
  PyErr_Clear();  // the tensor is sparse, quantised, or similar
  return false;
}

bool contiguous(const DLTensor& tensor) {
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0; stride *= tensor.shape[i--]) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
  }
  return true;
}

Outputs::Outputs(int fields) : tuple_(PyTuple_New(fields)) {
  for (int i = 0; tuple_ && i < fields; ++i) {
    Py_INCREF(Py_None);
    PyTuple_SetItem(tuple_, i, Py_None);
  }
}

PyObject* new_tensor(ElementType type, int32_t ndim, int64_t* shape, void** data) {
  DLTensor prototype{nullptr, kCpu, 0, ndim, type.code, type.bits, 1, shape, nullptr, 0};
  Managed* managed = nullptr;
  void* object = nullptr;
  if (exchange->allocate(&prototype, &managed, nullptr, set_error) != 0) return nullptr;
  *data = managed->tensor.at<void>();
  return exchange->object_from_managed(managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

void* Outputs::allocate(int index, ElementType type, std::initializer_list<int64_t> shape) {
  int64_t sizes[4];
  std::copy(shape.begin(), shape.end(), sizes);
  void* data = nullptr;
  PyObject* tensor = tuple_ ? new_tensor(type, static_cast<int32_t>(shape.size()), sizes, &data) : nullptr;
  if (tensor) {
    PyTuple_SetItem(tuple_, index, tensor);
  } else {
    Py_CLEAR(tuple_);
  }
  return data;
}

}  // namespace genarm
