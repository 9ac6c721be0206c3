// CUDA: grid-stride kernels around the per-thread code of dropout.h. No torch
// header, so nvcc takes seconds; the caller holds the device guard.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "dropout_backend.h"

namespace dropout {
namespace {

constexpr int kBlock = 256;

// The stride is the whole grid; element indices stay 64-bit.
__device__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <class T>
__global__ void __launch_bounds__(kBlock) forward_kernel(MaskArgs args) {
  forward_thread<T>(args, thread_index(), thread_count());
}

template <class T>
__global__ void __launch_bounds__(kBlock) apply_kernel(MaskArgs args) {
  apply_thread<T>(args, thread_index(), thread_count());
}

// p stays on the device: reading it on the host would wait for the stream and
// break graph capture.
template <class P>
__global__ void __launch_bounds__(kBlock) draw_kernel(MaskArgs args, const P* p) {
  draw_thread(args, drop_threshold(*p), thread_index(), thread_count());
}

__device__ void add_count(int64_t* count, int64_t more) {
  // Two's complement: what is added to an unsigned number is added to a signed one.
  atomicAdd(reinterpret_cast<unsigned long long*>(count),
            static_cast<unsigned long long>(more));
}

__global__ void __launch_bounds__(kBlock)
    count_kernel(CountArgs args, int64_t stride) {
  const int64_t first = thread_index();
  if (first >= stride) return;
  add_count(args.counts + first % args.units, count_thread(args, first, stride));
}

// Up to this many units the threads of a block add up in shared memory, so that a
// unit's count in global memory is touched once a block. A block has few elements or
// less than 2^-9 of all, so 32 bits hold its count up to 2^41 of them.
constexpr int64_t kSharedUnits = 2048;

template <class T>
__global__ void __launch_bounds__(kBlock)
    counted_kernel(MaskArgs args, int64_t units, int64_t* counts, int64_t stride) {
  __shared__ uint32_t of_block[kSharedUnits];
  const bool shared = units <= kSharedUnits;
  if (shared) {
    for (int unit = threadIdx.x; unit < units; unit += kBlock) of_block[unit] = 0;
    __syncthreads();
  }
  const int64_t first = thread_index();
  if (first < stride) {
    const KeptOfEight count = counted_thread<T>(args, first, stride);
    for (int i = 0; i < 8; ++i) {
      const int64_t unit = unit_of(first, i, units);
      if (shared) {
        atomicAdd(of_block + unit, count.kept[i]);
      } else {
        add_count(counts + unit, count.kept[i]);
      }
    }
  }
  if (!shared) return;
  __syncthreads();
  for (int unit = threadIdx.x; unit < units; unit += kBlock) {
    if (of_block[unit] != 0) add_count(counts + unit, of_block[unit]);
  }
}

void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": the CUDA kernel was not launched: " +
                           cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

cudaStream_t stream(int device) {
  return static_cast<cudaStream_t>(current_cuda_stream(device));
}

// Enough blocks to fill any GPU several times over; the kernels stride.
int grid(int64_t threads) {
  constexpr int64_t kMaxBlocks = 1 << 14;
  return static_cast<int>(std::min((threads + kBlock - 1) / kBlock, kMaxBlocks));
}

void forward(const MaskArgs& args, int device) {
  const int64_t bytes = packed_bytes(args.numel);
  if (bytes == 0) return;
  using Kernel = void (*)(MaskArgs);
  constexpr Kernel kernels[kNumDtypes] = {
      forward_kernel<float>, forward_kernel<double>, forward_kernel<BFloat16>,
      forward_kernel<Half>};
  kernels[static_cast<int>(args.dtype)]<<<grid(bytes), kBlock, 0, stream(device)>>>(
      args);
  check(cudaGetLastError(), "dropout_forward");
}

void apply(const MaskArgs& args, int device) {
  if (args.numel == 0) return;
  using Kernel = void (*)(MaskArgs);
  constexpr Kernel kernels[kNumDtypes] = {apply_kernel<float>, apply_kernel<double>,
                                          apply_kernel<BFloat16>, apply_kernel<Half>};
  const int blocks = grid((args.numel + 7) / 8);
  kernels[static_cast<int>(args.dtype)]<<<blocks, kBlock, 0, stream(device)>>>(args);
  check(cudaGetLastError(), "mask_apply");
}

void draw(const MaskArgs& args, ProbabilityArg arg, int device) {
  const int64_t bytes = packed_bytes(args.numel);
  if (bytes == 0) return;
  const int blocks = grid(bytes);
  if (arg.is_double) {
    draw_kernel<<<blocks, kBlock, 0, stream(device)>>>(
        args, static_cast<const double*>(arg.p));
  } else {
    draw_kernel<<<blocks, kBlock, 0, stream(device)>>>(
        args, static_cast<const float*>(arg.p));
  }
  check(cudaGetLastError(), "mask_draw");
}

void add_counts(const CountArgs& args, int device, const char* op) {
  if (args.units == 0 || args.rows == 0) return;
  const int64_t stride = count_threads(args);
  const int64_t blocks = (stride + kBlock - 1) / kBlock;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(op) + ": expected at most 2^39 units, got " +
                             std::to_string(args.units));
  }
  count_kernel<<<static_cast<int>(blocks), kBlock, 0, stream(device)>>>(args, stride);
  check(cudaGetLastError(), op);
}

void count(const CountArgs& args, int device) {
  if (args.units == 0) return;
  const size_t bytes = static_cast<size_t>(args.units) * sizeof(int64_t);
  check(cudaMemsetAsync(args.counts, 0, bytes, stream(device)), "unit_counts");
  add_counts(args, device, "unit_counts");
}

// One pass; a second kernel over the packed mask where that is faster.
void forward_counted(const MaskArgs& args, int64_t units, int64_t* counts, int device) {
  const int64_t threads = counted_threads(args.numel, units);
  if (threads == 0) {
    forward(args, device);
    add_counts({args.packed, packed_bytes(args.numel), args.numel / units, units, counts},
               device, "dropout_counted");
    return;
  }
  using Kernel = void (*)(MaskArgs, int64_t, int64_t*, int64_t);
  constexpr Kernel kernels[kNumDtypes] = {
      counted_kernel<float>, counted_kernel<double>, counted_kernel<BFloat16>,
      counted_kernel<Half>};
  const int blocks = static_cast<int>((threads + kBlock - 1) / kBlock);
  kernels[static_cast<int>(args.dtype)]<<<blocks, kBlock, 0, stream(device)>>>(
      args, units, counts, threads);
  check(cudaGetLastError(), "dropout_counted");
}

}  // namespace

const Backend cuda_backend = {forward, apply, draw, count, forward_counted};

}  // namespace dropout
