// The dropout rule, once, for g++ and nvcc: thresholds, scales, the per-element
// arithmetic in each dtype, packed masks, and what one CUDA thread does.
//
//   keep element i  iff  philox_word(rng, i) >= threshold(p)
//   y[i] = keep ? x[i] * scale : 0
//   bit i of the packed mask is bit i % 8 of byte i / 8; padding bits are 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace dropout {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDtypes = 4;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// What dropout_forward, mask_apply and mask_draw work on. mask_apply reads
// `packed` and ignores `rng` and `threshold`; mask_draw has no `x` and `y`.
struct MaskArgs {
  const void* x;
  void* y;
  uint8_t* packed;
  const int64_t* rng;
  int64_t numel;
  uint64_t threshold;
  double scale;
  Dtype dtype;
};

struct CountArgs {
  const uint8_t* packed;
  int64_t packed_bytes;
  int64_t rows;
  int64_t units;
  int64_t* counts;
};

// ---- arguments

DROPOUT_HOST_DEVICE bool is_probability(double p) { return p >= 0.0 && p <= 1.0; }

// Of 2^32 words, how many drop. The bounds are spelt out for probabilities that
// nobody could check: a CUDA kernel reads p on the device.
DROPOUT_HOST_DEVICE uint64_t drop_threshold(double p) {
  if (!(p > 0.0)) return 0;
  if (p >= 1.0) return uint64_t{1} << 32;
  return static_cast<uint64_t>(p * 4294967296.0 + 0.5);
}

DROPOUT_HOST_DEVICE double keep_scale(double p) {
  return p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
}

// Whole 64-bit words, so that threads and vector units never share one.
DROPOUT_HOST_DEVICE int64_t packed_bytes(int64_t numel) {
  return (numel / 64 + (numel % 64 != 0)) * 8;
}

DROPOUT_HOST_DEVICE bool rows_fit(int64_t rows, int64_t units, int64_t bytes) {
  return units == 0 || rows <= bytes * 8 / units;
}

// ---- arithmetic

template <class To, class From>
DROPOUT_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

DROPOUT_HOST_DEVICE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Round to nearest even; a NaN becomes quiet and keeps sign and payload.
DROPOUT_HOST_DEVICE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16)};
}

DROPOUT_HOST_DEVICE float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact in float
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
  }
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000u : 0u;
    return bit_cast<float>(sign | 0x7f800000u | quiet | mantissa << 13);
  }
  return bit_cast<float>(sign | (exponent + 112u) << 23 | mantissa << 13);
#endif
}

// Round to nearest even, bit for bit what vcvtps2ph does, NaNs included.
DROPOUT_HOST_DEVICE Half to_half(float x) {
#ifdef __CUDA_ARCH__
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u | ((size >> 13) & 0x3ffu);
  } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (size < 0x38800000u) {
    // Below 2^-14 the unit of half is 2^-24, that of floats in [1/2, 1): adding
    // 1/2 lets the float adder do the rounding.
    half = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

DROPOUT_HOST_DEVICE float scaled(float x, double scale) {
  return x * static_cast<float>(scale);
}
DROPOUT_HOST_DEVICE double scaled(double x, double scale) { return x * scale; }
DROPOUT_HOST_DEVICE BFloat16 scaled(BFloat16 x, double scale) {
  return to_bfloat16(to_float(x) * static_cast<float>(scale));
}
DROPOUT_HOST_DEVICE Half scaled(Half x, double scale) {
  return to_half(to_float(x) * static_cast<float>(scale));
}

// ---- masks

// The four keep bits of one Philox block.
DROPOUT_HOST_DEVICE uint32_t keep_bits(uint64_t key, uint64_t stream,
                                       uint64_t block, uint64_t threshold) {
  const Words words = philox4x32_10(key, stream, block);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= static_cast<uint32_t>(words.lane[lane] >= threshold) << lane;
  }
  return bits;
}

// Byte `byte` of the packed mask: eight elements, two Philox blocks.
DROPOUT_HOST_DEVICE uint8_t keep_byte(const MaskArgs& args, uint64_t threshold,
                                      int64_t byte) {
  const int64_t left = args.numel - byte * 8;
  if (left <= 0) return 0;
  const uint64_t key = static_cast<uint64_t>(args.rng[0]);
  const uint64_t stream = static_cast<uint64_t>(args.rng[1]);
  const uint64_t block = static_cast<uint64_t>(byte) * 2;
  const uint32_t bits = keep_bits(key, stream, block, threshold) |
                        keep_bits(key, stream, block + 1, threshold) << 4;
  return static_cast<uint8_t>(left >= 8 ? bits : bits & ((1u << left) - 1u));
}

// ---- one CUDA thread: bytes first, first + stride, ... of the packed mask with
// the eight elements of each. A warp then writes 32 neighbouring mask bytes and
// eight neighbouring elements a thread move as 16-byte loads and stores.

template <class T>
struct alignas(16) Eight {
  T item[8];
};

template <class T>
DROPOUT_HOST_DEVICE void apply_byte(const MaskArgs& args, int64_t byte,
                                    uint32_t bits, bool aligned) {
  const T* x = static_cast<const T*>(args.x) + byte * 8;
  T* y = static_cast<T*>(args.y) + byte * 8;
  const int64_t left = args.numel - byte * 8;
  if (aligned && left >= 8) {
    Eight<T> eight = *reinterpret_cast<const Eight<T>*>(x);
    for (int i = 0; i < 8; ++i) {
      eight.item[i] = (bits >> i) & 1u ? scaled(eight.item[i], args.scale) : T{};
    }
    *reinterpret_cast<Eight<T>*>(y) = eight;
    return;
  }
  for (int i = 0; i < 8 && i < left; ++i) {
    y[i] = (bits >> i) & 1u ? scaled(x[i], args.scale) : T{};
  }
}

DROPOUT_HOST_DEVICE bool is_aligned(const MaskArgs& args) {
  const auto x = reinterpret_cast<uintptr_t>(args.x);
  const auto y = reinterpret_cast<uintptr_t>(args.y);
  return (x | y) % 16 == 0;
}

// `use` sees each byte of the mask while it is in a register.
template <class T, class Use>
DROPOUT_HOST_DEVICE void forward_bytes(const MaskArgs& args, int64_t first,
                                       int64_t stride, Use& use) {
  const bool aligned = is_aligned(args);
  const int64_t bytes = packed_bytes(args.numel);
  for (int64_t byte = first; byte < bytes; byte += stride) {
    const uint8_t bits = keep_byte(args, args.threshold, byte);
    args.packed[byte] = bits;
    apply_byte<T>(args, byte, bits, aligned);
    use(bits);
  }
}

struct Nothing {
  DROPOUT_HOST_DEVICE void operator()(uint32_t) const {}
};

template <class T>
DROPOUT_HOST_DEVICE void forward_thread(const MaskArgs& args, int64_t first,
                                        int64_t stride) {
  const Nothing nothing;
  forward_bytes<T>(args, first, stride, nothing);
}

// Counting in the forward pass. Where 8 * stride is a multiple of `units`, the eight
// elements of each of a thread's bytes lie in the same eight columns, so eight
// registers count them, and are added to the counts once.
struct KeptOfEight {
  uint32_t kept[8] = {};
  DROPOUT_HOST_DEVICE void operator()(uint32_t bits) {
    for (int i = 0; i < 8; ++i) kept[i] += (bits >> i) & 1u;
  }
};

template <class T>
DROPOUT_HOST_DEVICE KeptOfEight counted_thread(const MaskArgs& args, int64_t first,
                                               int64_t stride) {
  KeptOfEight count;
  forward_bytes<T>(args, first, stride, count);
  return count;
}

DROPOUT_HOST_DEVICE int64_t unit_of(int64_t first, int i, int64_t units) {
  return (first * 8 + i) % units;
}

// How many threads count in the forward pass: whole periods of columns, and, beyond
// the few for which any additions are cheap, at least kBytes of the mask for each. 0
// where there are too few rows for that: a second kernel then costs less.
DROPOUT_HOST_DEVICE int64_t counted_threads(int64_t numel, int64_t units) {
  constexpr int64_t kEnough = int64_t{1} << 18;
  constexpr int64_t kFew = int64_t{1} << 13;
  constexpr int64_t kBytes = 4;
  int64_t period = units;
  for (int i = 0; i < 3 && period % 2 == 0; ++i) period /= 2;
  const int64_t bytes = packed_bytes(numel);
  int64_t most = bytes / kBytes;
  if (most < kFew) most = bytes < kFew ? bytes : kFew;
  if (most > kEnough) most = kEnough;
  return most / period * period;
}

template <class T>
DROPOUT_HOST_DEVICE void apply_thread(const MaskArgs& args, int64_t first,
                                      int64_t stride) {
  const bool aligned = is_aligned(args);
  const int64_t bytes = (args.numel + 7) / 8;
  for (int64_t byte = first; byte < bytes; byte += stride) {
    apply_byte<T>(args, byte, args.packed[byte], aligned);
  }
}

DROPOUT_HOST_DEVICE void draw_thread(const MaskArgs& args, uint64_t threshold,
                                     int64_t first, int64_t stride) {
  const int64_t bytes = packed_bytes(args.numel);
  for (int64_t byte = first; byte < bytes; byte += stride) {
    args.packed[byte] = keep_byte(args, threshold, byte);
  }
}

// Column sums: the number of threads is a multiple of `units`, so a thread stays in
// column first % units, and its neighbours read neighbouring bits.
DROPOUT_HOST_DEVICE int64_t count_threads(const CountArgs& args) {
  constexpr int64_t kEnough = int64_t{1} << 18;
  const int64_t slices = kEnough / args.units;
  if (slices <= 1) return args.units;
  return (slices < args.rows ? slices : args.rows) * args.units;
}

DROPOUT_HOST_DEVICE int64_t count_thread(const CountArgs& args, int64_t first,
                                         int64_t stride) {
  const int64_t numel = args.rows * args.units;
  int64_t count = 0;
  for (int64_t i = first; i < numel; i += stride) {
    count += (args.packed[i / 8] >> (i % 8)) & 1;
  }
  return count;
}

}  // namespace dropout
