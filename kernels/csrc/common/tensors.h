// torch's tensors without torch's headers. DLPack's C exchange table (DLPack 1.3, an attribute of torch.Tensor since
// torch 2.11) borrows or makes a tensor in tens of nanoseconds. One abi3 build serves every torch and Python >= 3.10.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/bindings.h"

namespace genarm {

struct DLTensor {  // has the layout that DLPack prescribes
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;

  template <typename T>
  T* at() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
};

constexpr int32_t kCpu = 1;
struct ElementType {
  uint8_t code, bits;
  bool operator==(ElementType other) const { return code == other.code && bits == other.bits; }
};
constexpr ElementType kInt32{0, 32}, kInt64{0, 64}, kFloat16{2, 16}, kFloat32{2, 32}, kBfloat16{4, 16}, kBool{6, 8},
    kInt8{0, 8}, kUint8{1, 8};

inline ElementType type_of(const DLTensor& tensor) { return {tensor.code, tensor.bits}; }

// Takes the class torch.Tensor and returns None. ImportError if it has no exchange table of DLPack 1.
PyObject* use_tensors(PyObject*, PyObject* tensor_class);

// Gives a view of a plain torch.Tensor on the CPU, valid while the tensor lives. False for anything else, and if the
// memory does not hold the values. Sets no Python error.
bool borrow(PyObject* object, DLTensor* out);

bool contiguous(const DLTensor& tensor);

// Returns a new, uninitialised CPU tensor and gives its memory, or returns null with a Python error set.
PyObject* new_tensor(ElementType type, int32_t ndim, int64_t* shape, void** data);

// A tuple of new, uninitialised CPU tensors. Fields that were not added are None.
class Outputs {
 public:
  explicit Outputs(int fields);
  ~Outputs() { Py_XDECREF(tuple_); }
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  template <typename T>
  void add(int index, ElementType type, std::initializer_list<int64_t> shape, T** data) {
    *data = static_cast<T*>(allocate(index, type, shape));
  }

  bool failed() const { return !tuple_; }  // if true, a Python error is set

  PyObject* release() {
    PyObject* tuple = tuple_;
    tuple_ = nullptr;
    return tuple;
  }

 private:
  void* allocate(int index, ElementType type, std::initializer_list<int64_t> shape);

  PyObject* tuple_;
};

}  // namespace genarm
