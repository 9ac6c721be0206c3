// Memory of large CPU results, kept for the next one. malloc maps blocks from 32 MiB
// up anew each time and returns them when freed; the page faults of a first touch
// then cost several times what filling the block does.
//
// At most kSlots freed blocks of at most kLargest bytes wait here, in huge pages and
// marked MADV_FREE: the kernel takes them back whenever it is short of memory.
// Linux, and torch from 2.11 on, which lets a tensor call us when its memory is free;
// elsewhere results come from torch's allocator.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tensor_handle.h"

#ifdef __linux__
// Newer than the torch this library targets, hence weak: null under torch 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context),
    void* deleter_context);

namespace dropout {

class LargeBlock {
 public:
  static constexpr size_t kSmallest = size_t{1} << 25;
  static constexpr size_t kLargest = size_t{1} << 28;

  // A kept block of this size, or a new one; null where the system has none.
  static LargeBlock* get(size_t size) {
    size = (size + kHugePage - 1) & ~(kHugePage - 1);
    for (auto& slot : slots_) {
      LargeBlock* block = slot.exchange(nullptr);
      if (block == nullptr) continue;
      if (block->size_ == size) return block;
      block->keep();
    }
    void* map = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return map == MAP_FAILED ? nullptr : new LargeBlock(map, size);
  }

  void* data() const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(map_);
    return reinterpret_cast<void*>((begin + kHugePage - 1) & ~(kHugePage - 1));
  }

  static void release(void*, void* block) { static_cast<LargeBlock*>(block)->free(); }

  void free() {
    madvise(data(), size_, MADV_FREE);
    keep();
  }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;
  static constexpr unsigned kSlots = 4;

  LargeBlock(void* map, size_t size) : map_(map), size_(size) {
    madvise(data(), size_, MADV_HUGEPAGE);
  }
  ~LargeBlock() { munmap(map_, size_ + kHugePage); }

  // Into an empty slot, else in place of the block that has waited longest.
  void keep() {
    for (auto& slot : slots_) {
      LargeBlock* empty = nullptr;
      if (slot.compare_exchange_strong(empty, this)) return;
    }
    delete slots_[oldest_++ % kSlots].exchange(this);
  }

  // Trivially destroyed: tensors may die after the statics of this library.
  static inline std::atomic<LargeBlock*> slots_[kSlots] = {};
  static inline std::atomic<unsigned> oldest_ = 0;

  void* map_;
  size_t size_;
};

}  // namespace dropout
#endif

namespace dropout {

// An uninitialised row-major tensor of the shape, dtype and device of `x`.
inline Tensor empty_like(const Tensor& x, Device device) {
#ifdef __linux__
  const size_t bytes =
      static_cast<size_t>(x.numel()) * aoti_torch_dtype_element_size(x.dtype());
  if (torch_from_blob != nullptr && device.type == aoti_torch_device_type_cpu() &&
      bytes >= LargeBlock::kSmallest && bytes <= LargeBlock::kLargest) {
    LargeBlock* block = LargeBlock::get(bytes);
    DROPOUT_CHECK(block != nullptr, "torch_dropout_ir: not enough memory: you tried "
                  "to allocate ", bytes, " bytes");
    const auto strides = Tensor::row_major_strides(x.dim(), x.sizes());
    AtenTensorHandle handle;
    const AOTITorchError error = torch_from_blob(
        block->data(), x.dim(), x.sizes(), strides.data(), 0, x.dtype(), device.type,
        device.index, &handle, aoti_torch_layout_strided(), nullptr, 0,
        LargeBlock::release, block);
    if (error == 0) return Tensor(handle);
    block->free();
  }
#endif
  return Tensor::empty(x.dim(), x.sizes(), x.dtype(), device);
}

}  // namespace dropout
