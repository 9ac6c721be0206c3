// What the ops of this library are given, off torch's stack.
#pragma once

#include <torch/csrc/stable/library.h>

#include "tensor_handle.h"

namespace dropout {

// Lists: the callee owns them and what it takes out.
class List {
 public:
  explicit List(StableIValue value) : handle_(from_stack<StableListHandle>(value)) {
    DROPOUT_TORCH(torch_list_size(handle_, &size_));
  }
  List(const List&) = delete;
  ~List() { torch_delete_list(handle_); }

  size_t size() const { return size_; }
  template <class T>
  T at(size_t i) const {
    StableIValue element;
    DROPOUT_TORCH(torch_list_get_item(handle_, i, &element));
    return from_stack<T>(element);
  }

 private:
  StableListHandle handle_;
  size_t size_;
};

inline bool is_double(const char* op, const Tensor& x) {
  const int32_t dtype = x.dtype();
  DROPOUT_CHECK(
      dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64(), op,
      ": expected float32 or float64, got ", dtype_name(dtype));
  return dtype == aoti_torch_dtype_float64();
}

// An optional argument comes as null or in a box, which is ours to free.
inline AtenTensorHandle from_optional(StableIValue value) {
  auto* boxed = bit_cast<StableIValue*>(value);
  if (boxed == nullptr) return nullptr;
  const auto handle = from_stack<AtenTensorHandle>(*boxed);
  delete boxed;
  return handle;
}

}  // namespace dropout
