// A tensor of the stable ABI as this library needs it: one owned handle and its
// metadata, straight through torch's C shim. torch::stable::Tensor would add a
// shared_ptr, a control block and a new handle for each argument and result.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

#include "dropout.h"

namespace dropout {

// STD_TORCH_CHECK without its "<function>, <file>:<line>" in front: what a user
// reads first is the name of the op.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define DROPOUT_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) ::dropout::fail(__VA_ARGS__); \
  } while (false)

#define DROPOUT_TORCH(call) \
  DROPOUT_CHECK((call) == 0, "torch_dropout_ir: torch's ", #call, " failed")

struct Device {
  int32_t type;
  int32_t index;
  bool operator==(const Device& other) const {
    return type == other.type && index == other.index;
  }
};

inline std::string name_of(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_cuda()) {
    return "cuda:" + std::to_string(device.index);
  }
  return "device of type " + std::to_string(device.type);
}

inline std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& [code, name] : names) {
    if (code == dtype) return name;
  }
  return "dtype number " + std::to_string(dtype);
}

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t numel() const {
    int64_t numel;
    DROPOUT_TORCH(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }
  int64_t dim() const {
    int64_t dim;
    DROPOUT_TORCH(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    DROPOUT_TORCH(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  int32_t dtype() const {
    int32_t dtype;
    DROPOUT_TORCH(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  Device device() const {
    Device device;
    DROPOUT_TORCH(aoti_torch_get_device_type(handle_, &device.type));
    DROPOUT_TORCH(aoti_torch_get_device_index(handle_, &device.index));
    return device;
  }
  bool is_contiguous() const {
    bool is_contiguous;
    DROPOUT_TORCH(aoti_torch_is_contiguous(handle_, &is_contiguous));
    return is_contiguous;
  }
  void* data() const {
    void* data;
    DROPOUT_TORCH(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

  static Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype,
                      Device device) {
    AtenTensorHandle handle;
    DROPOUT_TORCH(aoti_torch_empty_strided(dim, sizes,
                                           row_major_strides(dim, sizes).data(),
                                           dtype, device.type, device.index, &handle));
    return Tensor(handle);
  }

  static std::vector<int64_t> row_major_strides(int64_t dim, const int64_t* sizes) {
    std::vector<int64_t> strides(static_cast<size_t>(dim));
    int64_t stride = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      strides[static_cast<size_t>(i)] = stride;
      if (sizes[i] > 1) stride *= sizes[i];
    }
    return strides;
  }

  // Row-major memory, copied only where it is not row-major already.
  void make_contiguous() {
    if (is_contiguous()) return;
    Tensor copy = empty(dim(), sizes(), dtype(), device());
    DROPOUT_TORCH(aoti_torch_copy_(copy.handle_, handle_, 0));
    std::swap(handle_, copy.handle_);
  }

 private:
  AtenTensorHandle handle_;
};

// ---- the boxed calling convention: the callee owns the handles it is given

template <class T>
T from_stack(StableIValue value) {
  static_assert(sizeof(T) == sizeof(value), "an 8-byte argument");
  return bit_cast<T>(value);
}

inline StableIValue to_stack(Tensor tensor) {
  return bit_cast<StableIValue>(tensor.release());
}

}  // namespace dropout
