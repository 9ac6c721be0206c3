// The glue: checks arguments, allocates results, calls the device's backend, and
// registers all of it with torch. The schemas are in torch_dropout_ir/registration.py.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "dropout_backend.h"
#include "large_blocks.h"

#ifdef DROPOUT_WITH_CUDA
#include <dlfcn.h>
#endif

namespace dropout {

#ifdef DROPOUT_WITH_CUDA
// Linking libtorch_cuda would keep this library from loading in a CPU-only
// torch; where a CUDA tensor exists, libtorch_cuda is loaded already.
void* current_cuda_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library == nullptr
                       ? nullptr
                       : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(symbol);
  }();
  DROPOUT_CHECK(getter != nullptr,
                "torch_dropout_ir: libtorch_cuda.so is not loaded or has no "
                "aoti_torch_get_current_cuda_stream; use a CUDA build of torch");
  void* stream = nullptr;
  DROPOUT_TORCH(getter(device, &stream));
  return stream;
}
#endif

namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    if (device.type != aoti_torch_device_type_cuda()) return;
    DROPOUT_TORCH(aoti_torch_create_device_guard(device.index, &guard_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// ---- checks

Dtype check_dtype(const char* op, const Tensor& x) {
  const int32_t dtype = x.dtype();
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return Dtype::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  fail(op, ": expected `x` to be float32, float64, bfloat16 or float16, got ",
       dtype_name(dtype));
}

void check_device(const char* op, const char* name, const Tensor& tensor,
                  Device expected) {
  const Device got = tensor.device();
  DROPOUT_CHECK(got == expected, op, ": expected `", name, "` on ",
                name_of(expected), ", got ", name_of(got));
}

void check_rng(const char* op, const Tensor& rng) {
  DROPOUT_CHECK(rng.dtype() == aoti_torch_dtype_int64(), op,
                ": expected `rng` to be int64, got ", dtype_name(rng.dtype()));
  DROPOUT_CHECK(rng.dim() == 1 && rng.numel() == 2, op,
                ": expected `rng` of shape [2], got ", rng.dim(),
                " dimensions and ", rng.numel(), " elements");
}

void check_packed(const char* op, const Tensor& packed) {
  DROPOUT_CHECK(packed.dtype() == aoti_torch_dtype_uint8(), op,
                ": expected `packed` to be uint8, got ",
                dtype_name(packed.dtype()));
  DROPOUT_CHECK(packed.dim() == 1 && packed.numel() % 8 == 0, op,
                ": expected `packed` to have one dimension of whole 8-byte words, "
                "got ", packed.dim(), " dimensions and ", packed.numel(), " bytes");
}

Tensor empty_packed(int64_t numel, Device device) {
  const int64_t size = packed_bytes(numel);
  return Tensor::empty(1, &size, aoti_torch_dtype_uint8(), device);
}

// ---- keys

// What `torch.randint(2**63 - 1, (2,))` draws, without a way through Python.
Tensor draw_key(const char* op, Device device) {
  DROPOUT_CHECK(device.type == aoti_torch_device_type_cpu(), op,
                ": expected `rng` where `x` is on ", name_of(device), ", got None");
  const int64_t size = 2;
  int32_t dtype = aoti_torch_dtype_int64();
  AtenTensorHandle key;
  DROPOUT_TORCH(aoti_torch_cpu_randint(INT64_MAX, &size, 1, &dtype, nullptr,
                                       &device.type, 0, nullptr, &key));
  return Tensor(key);
}

// ---- the five ops

// Both forward ops: `run` launches the kernel.
template <class Run>
void forward_with(const char* op, StableIValue* stack, const Run& run) {
  Tensor x(from_stack<AtenTensorHandle>(stack[0]));
  Tensor rng(from_optional(stack[1]));
  const double p = from_stack<double>(stack[2]);
  DROPOUT_CHECK(is_probability(p), op,
                ": dropout probability has to be between 0 and 1, but got ", p);
  const Device device = x.device();
  const Dtype dtype = check_dtype(op, x);
  if (rng.get() == nullptr) rng = draw_key(op, device);
  check_rng(op, rng);
  check_device(op, "rng", rng, device);
  const DeviceGuard guard(device);
  x.make_contiguous();
  rng.make_contiguous();
  const int64_t numel = x.numel();
  Tensor y = empty_like(x, device);
  Tensor packed = empty_packed(numel, device);
  run(MaskArgs{x.data(), y.data(), static_cast<uint8_t*>(packed.data()),
               static_cast<const int64_t*>(rng.data()), numel, drop_threshold(p),
               keep_scale(p), dtype},
      device);
  stack[0] = to_stack(std::move(y));
  stack[1] = to_stack(std::move(packed));
}

template <const Backend& backend>
void dropout_forward(StableIValue* stack, uint64_t, uint64_t) {
  forward_with("dropout_forward", stack, [](const MaskArgs& args, Device device) {
    backend.forward(args, device.index);
  });
}

template <const Backend& backend>
void dropout_counted(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "dropout_counted";
  const Tensor counts(from_stack<AtenTensorHandle>(stack[3]));
  forward_with(op, stack, [&](const MaskArgs& args, Device device) {
    check_device(op, "counts", counts, device);
    DROPOUT_CHECK(counts.dtype() == aoti_torch_dtype_int64(), op,
                  ": expected `counts` to be int64, got ", dtype_name(counts.dtype()));
    const int64_t units = counts.numel();
    DROPOUT_CHECK(counts.dim() == 1 && counts.is_contiguous() && units > 0 &&
                      args.numel % units == 0,
                  op, ": expected contiguous `counts` of shape [units], with `x` of ",
                  args.numel, " elements in rows of as many units, got ",
                  counts.dim(), " dimensions and ", units, " elements");
    backend.forward_counted(args, units, static_cast<int64_t*>(counts.data()),
                            device.index);
  });
}

template <const Backend& backend>
void mask_apply(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "mask_apply";
  Tensor x(from_stack<AtenTensorHandle>(stack[0]));
  Tensor packed(from_stack<AtenTensorHandle>(stack[1]));
  const double scale = from_stack<double>(stack[2]);
  const Device device = x.device();
  const Dtype dtype = check_dtype(op, x);
  check_packed(op, packed);
  check_device(op, "packed", packed, device);
  const int64_t numel = x.numel();
  DROPOUT_CHECK(packed.numel() == packed_bytes(numel), op,
                ": expected `packed` of ", packed_bytes(numel), " bytes for ",
                numel, " elements, got ", packed.numel());
  const DeviceGuard guard(device);
  x.make_contiguous();
  packed.make_contiguous();
  Tensor y = empty_like(x, device);
  backend.apply({x.data(), y.data(), static_cast<uint8_t*>(packed.data()), nullptr,
                 numel, 0, scale, dtype},
                device.index);
  stack[0] = to_stack(std::move(y));
}

template <const Backend& backend>
void mask_draw(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "mask_draw";
  Tensor rng(from_stack<AtenTensorHandle>(stack[0]));
  const Tensor p(from_stack<AtenTensorHandle>(stack[1]));
  const int64_t numel = from_stack<int64_t>(stack[2]);
  const Device device = rng.device();
  check_rng(op, rng);
  check_device(op, "p", p, device);
  const bool is_double = p.dtype() == aoti_torch_dtype_float64();
  DROPOUT_CHECK(is_double || p.dtype() == aoti_torch_dtype_float32(), op,
                ": expected `p` to be float32 or float64, got ",
                dtype_name(p.dtype()));
  DROPOUT_CHECK(p.dim() == 0, op, ": expected `p` to have no dimension, got ",
                p.dim());
  DROPOUT_CHECK(numel >= 0, op, ": expected `numel` >= 0, got ", numel);
  const DeviceGuard guard(device);
  rng.make_contiguous();
  Tensor packed = empty_packed(numel, device);
  backend.draw({nullptr, nullptr, static_cast<uint8_t*>(packed.data()),
                static_cast<const int64_t*>(rng.data()), numel, 0, 0.0,
                Dtype::kFloat32},
               {p.data(), is_double}, device.index);
  stack[0] = to_stack(std::move(packed));
}

template <const Backend& backend>
void unit_counts(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "unit_counts";
  Tensor packed(from_stack<AtenTensorHandle>(stack[0]));
  const int64_t rows = from_stack<int64_t>(stack[1]);
  const int64_t units = from_stack<int64_t>(stack[2]);
  check_packed(op, packed);
  DROPOUT_CHECK(rows >= 0 && units >= 0, op,
                ": expected `rows` and `units` >= 0, got ", rows, " and ", units);
  const int64_t bytes = packed.numel();
  DROPOUT_CHECK(rows_fit(rows, units, bytes), op,
                ": expected `packed` to hold rows * units bits, got ", bytes,
                " bytes for ", rows, " rows of ", units, " units");
  const Device device = packed.device();
  const DeviceGuard guard(device);
  packed.make_contiguous();
  Tensor counts = Tensor::empty(1, &units, aoti_torch_dtype_int64(), device);
  backend.count({static_cast<const uint8_t*>(packed.data()), bytes, rows, units,
                 static_cast<int64_t*>(counts.data())},
                device.index);
  stack[0] = to_stack(std::move(counts));
}

template <const Backend& backend>
void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("dropout_forward", &dropout_forward<backend>);
  library.impl("dropout_counted", &dropout_counted<backend>);
  library.impl("mask_apply", &mask_apply<backend>);
  library.impl("mask_draw", &mask_draw<backend>);
  library.impl("unit_counts", &unit_counts<backend>);
}

}  // namespace
}  // namespace dropout

STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CPU, library) {
  dropout::register_ops<dropout::cpu_backend>(library);
}

#ifdef DROPOUT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_dropout_ir, CUDA, library) {
  dropout::register_ops<dropout::cuda_backend>(library);
}
#endif

// Importing the empty module runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  // What `registration.py` makes of the schemas that these kernels were written for.
  if (module != nullptr) PyModule_AddIntConstant(module, "SCHEMAS", 1625736529);
  return module;
}
