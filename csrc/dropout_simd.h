// The CPU kernels for every instruction set this compiler can emit, and the
// choice among them at run time. No torch: the tests compile it alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "dropout.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DROPOUT_INLINE inline __attribute__((always_inline))
#define DROPOUT_EACH_CHAIN \
  _Pragma("GCC unroll 4") for (uint32_t i = 0; i < kChains; ++i)

namespace dropout {

// A bit matrix inside a packed mask, whose column sums are added to `totals`.
struct Columns {
  const uint8_t* packed;
  int64_t num_words;
  int64_t first_bit;
  int64_t rows;
  int64_t width;
  int64_t* totals;
};

// All take a range of 64-element words, `count` one of 64-column chunks.
struct Kernels {
  void (*forward[kNumDtypes])(const MaskArgs&, int64_t, int64_t);
  void (*apply[kNumDtypes])(const MaskArgs&, int64_t, int64_t);
  void (*draw)(const MaskArgs&, int64_t, int64_t);
  void (*count)(const Columns&, int64_t, int64_t);
};

inline uint64_t little_endian(uint64_t bits) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return __builtin_bswap64(bits);
#else
  return bits;
#endif
}

// Philox as far as it is the same for all blocks with one high half: the key
// schedule, and the words of rounds 1 and 2 that the low half does not reach.
struct Schedule {
  uint32_t k0[kPhiloxRounds];
  uint32_t k1[kPhiloxRounds];
  uint32_t round1_c2;  // xor hi(M0 * c0) gives c2 after round 1
  uint32_t round2_c0;  // xor hi(M1 * c2) gives c0 after round 2
  uint32_t round2_c2;  // xor c3          gives c2 after round 2
  uint32_t round2_c3;  //                 is    c3 after round 2
  uint32_t threshold;

  Schedule(uint64_t key, uint64_t stream, uint32_t block_high, uint32_t threshold)
      : threshold(threshold) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = static_cast<uint32_t>(key) + round * kPhiloxW0;
      k1[round] = static_cast<uint32_t>(key >> 32) + round * kPhiloxW1;
    }
    const uint64_t p1 = uint64_t{kPhiloxM1} * static_cast<uint32_t>(stream);
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ k0[0];
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0;
    round1_c2 = static_cast<uint32_t>(stream >> 32) ^ k1[0];
    round2_c0 = static_cast<uint32_t>(p1) ^ k0[1];
    round2_c2 = static_cast<uint32_t>(p0 >> 32) ^ k1[1];
    round2_c3 = static_cast<uint32_t>(p0);
  }
};

}  // namespace dropout

#if defined(__clang__)
#define DROPOUT_PRAGMA(text) _Pragma(#text)
#define DROPOUT_TARGET_BEGIN(isa) \
  DROPOUT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DROPOUT_TARGET_END _Pragma("clang attribute pop")
#else
#define DROPOUT_PRAGMA(text) _Pragma(#text)
#define DROPOUT_TARGET_BEGIN(isa) \
  _Pragma("GCC push_options") DROPOUT_PRAGMA(GCC target(isa))
#define DROPOUT_TARGET_END _Pragma("GCC pop_options")
#endif

#include "dropout_portable.h"
#if defined(__x86_64__)
#include "dropout_avx2.h"
#include "dropout_avx512.h"
#elif defined(__aarch64__)
#include "dropout_neon.h"
#endif

namespace dropout {

// TORCH_DROPOUT_IR_ISA=portable|avx2|avx512|neon asks for less than the machine
// has; what it has not is never used. F16C is older than AVX2, and not every
// compiler has a name for it here.
inline const Kernels& choose_kernels(const char* wanted) {
  const bool any = wanted == nullptr || wanted[0] == '\0';
  const auto is = [&](const char* name) { return any || !strcmp(wanted, name); };
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (has_avx512 && is("avx512")) return avx512::kernels;
  if (has_avx2 && (is("avx2") || is("avx512"))) return avx2::kernels;
#elif defined(__aarch64__)
  if (is("neon")) return neon::kernels;
#endif
  (void)is;
  return portable::kernels;
}

}  // namespace dropout
