// What a device has to provide. `device` is the CUDA device index, -1 on the CPU.
#pragma once

#include "dropout.h"

namespace dropout {

// `p` points to a 0-d float or double on the device of `rng`.
struct ProbabilityArg {
  const void* p;
  bool is_double;
};

struct Backend {
  void (*forward)(const MaskArgs&, int device);
  void (*apply)(const MaskArgs&, int device);
  void (*draw)(const MaskArgs&, ProbabilityArg, int device);
  // The counts of the units: set, and added to by the forward pass itself.
  void (*count)(const CountArgs&, int device);
  void (*forward_counted)(const MaskArgs&, int64_t units, int64_t* counts, int device);
};

extern const Backend cpu_backend;

#ifdef DROPOUT_WITH_CUDA
extern const Backend cuda_backend;

// torch's current stream on `device`; the .cu file sees no torch header.
void* current_cuda_stream(int device);
#endif

}  // namespace dropout
